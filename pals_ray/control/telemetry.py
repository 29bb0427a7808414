"""From counters to telemetry: rates, percentiles and power over a window of recent readings."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from operator import attrgetter, sub

from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Latency, ReplicaTelemetry

#: Over what rates and power are taken, s, and latencies.
RATE_S = 5.0
LATENCY_S = 60.0
#: The mean request of the longer window is told by so many requests or more.
FEW_REQUESTS = 100


@dataclass(frozen=True, slots=True)
class Reading:
    """One instant of a replica: its engine (None while there is none yet), its GPUs' energy and whether a cap binds.

    `energy_j` is the sum of the group's energy counters; `binding` the share of its GPUs whose cap binds.
    """

    time_s: float
    engine: EngineTelemetry | None
    energy_j: float
    power_w: float
    binding: float = 0.0


def quantile_s(counts: Sequence[int], q: float) -> float | None:
    """The `q` quantile of a latency histogram over `LATENCY_EDGES_S`, s; None where it is empty.

    Linear within a bucket, so off by less than a bucket (10 %); the overflow bucket answers with its lower edge.
    """
    return _quantile_s(list(accumulate(counts)), q)


def _quantile_s(sums: Sequence[int], q: float) -> float | None:
    """The quantile, given the histogram's running sums."""
    total = sums[-1] if sums else 0
    if total == 0:
        return None
    at = bisect_left(sums, q * total) if q > 0 else bisect_right(sums, 0)
    if at >= len(LATENCY_EDGES_S):
        return LATENCY_EDGES_S[-1]
    below = sums[at - 1] if at else 0
    lower = LATENCY_EDGES_S[at - 1] if at else 0.0
    return lower + (LATENCY_EDGES_S[at] - lower) * (q * total - below) / (sums[at] - below)


def _latency(last: Sequence[int], first: Sequence[int]) -> Latency:
    """From a histogram's counts now and at the start of the window."""
    if last is first or last == first:
        return Latency()
    sums = list(accumulate(map(sub, last, first)))
    return Latency(_quantile_s(sums, 0.5), _quantile_s(sums, 0.99))


def _per_s(first: EngineTelemetry, last: EngineTelemetry) -> float:
    """Requests/s that came in between two readings."""
    passed_s = last.time_s - first.time_s
    return (last.arrived - first.arrived) / passed_s if passed_s > 0.0 else 0.0


def _output_tokens(first: EngineTelemetry, last: EngineTelemetry) -> float:
    """Output tokens of the mean request between two readings, with `FEW_REQUESTS` of the mean one since the start.

    Those that still run are half done on average. 0 before any has ended.
    """
    if not last.requests_finished:
        return 0.0
    mean = last.generation_tokens / (last.requests_finished + last.running / 2)
    tokens, ended = last.generation_tokens - first.generation_tokens, last.requests_finished - first.requests_finished
    return (tokens + FEW_REQUESTS * mean) / (ended + (last.running - first.running) / 2 + FEW_REQUESTS)


def between(first: Reading, last: Reading) -> ReplicaTelemetry:
    """What a replica did between two readings: rates, power and latencies of all that time."""
    elapsed_s = last.time_s - first.time_s
    window = TelemetryWindow(rate_s=elapsed_s, latency_s=elapsed_s)
    window.add(first)
    window.add(last)
    return window.summary()


class TelemetryWindow:
    """The recent readings of one replica. Rates and power are over `rate_s`, latencies over `latency_s`."""

    def __init__(self, rate_s: float = RATE_S, latency_s: float = LATENCY_S) -> None:
        self._rate_s = rate_s
        self._latency_s = latency_s
        self._readings: deque[Reading] = deque()
        self._summary: ReplicaTelemetry | None = ReplicaTelemetry()

    def add(self, reading: Reading) -> None:
        """Add a reading and drop those older than the longer window; all of them where the clock went back."""
        self._summary = None
        if self._readings and reading.time_s <= self._readings[-1].time_s:
            self._readings.clear()
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].time_s <= reading.time_s - self._latency_s:
            self._readings.popleft()

    def summary(self) -> ReplicaTelemetry:
        """What the window says; all zero before the first reading."""
        if self._summary is None:
            self._summary = self._summarize()
        return self._summary

    def _summarize(self) -> ReplicaTelemetry:
        last = self._readings[-1]
        since_s = last.time_s - self._rate_s
        recent = list(takewhile(lambda r: r.time_s > since_s, reversed(self._readings)))
        # The newest reading that is at least as old as the rates reach back, or the oldest there is.
        first = self._readings[-min(len(recent) + 1, len(self._readings))]
        elapsed_s = last.time_s - first.time_s
        power_w = (last.energy_j - first.energy_j) / elapsed_s if elapsed_s > 0 else last.power_w
        binding = sum(r.binding for r in recent) / len(recent)
        if last.engine is None:
            return ReplicaTelemetry(power_w=power_w, energy_j=last.energy_j, binding_share=binding)
        now, before = last.engine, first.engine or self._engine_since(first.time_s)
        oldest = self._engine_since(last.time_s - self._latency_s)
        span_s = max(elapsed_s, 1e-9)
        steps, wall_s = now.steps - before.steps, now.wall_s - before.wall_s
        ran = [reading.engine.running for reading in recent if reading.engine is not None]
        ended = now.requests_finished
        return ReplicaTelemetry(
            running=now.running,
            waiting=now.waiting,
            running_mean=sum(ran) / len(ran),
            running_least=min(ran),
            kv_use=now.kv_use,
            throughput_tokens_per_s=(now.generation_tokens - before.generation_tokens) / span_s,
            prompt_tokens_per_s=(now.prompt_tokens - before.prompt_tokens) / span_s,
            arriving_per_s=_per_s(before, now),
            arriving_long_per_s=_per_s(oldest, now),
            # Those that still run have computed their prompts.
            prompt_tokens=now.prompt_tokens / (ended + now.running) if ended else 0.0,
            output_tokens=_output_tokens(oldest, now),
            power_w=power_w,
            energy_j=last.energy_j,
            tokens=now.generation_tokens,
            verdicts=now.verdicts,
            ttft=_latency(now.ttft_counts, oldest.ttft_counts),
            tpot=_latency(now.tpot_counts, oldest.tpot_counts),
            itl=_latency(now.itl_counts, oldest.itl_counts),
            late_share=(now.late_steps - before.late_steps) / steps if steps else 0.0,
            modelled_over_wall=(now.modelled_s - before.modelled_s) / wall_s if wall_s > 0 else 1.0,
            binding_share=binding,
        )

    def power_p95_w(self) -> float:
        """The 95th percentile of the draws read in the longer window, W; 0 before the first."""
        drawn_w = sorted(reading.power_w for reading in self._readings)
        return drawn_w[min(int(0.95 * len(drawn_w)), len(drawn_w) - 1)] if drawn_w else 0.0

    def _engine_since(self, time_s: float) -> EngineTelemetry:
        """The engine at the newest reading that is at least as old as `time_s`, or the oldest there is of it."""
        at = self._readings[max(bisect_right(self._readings, time_s, key=attrgetter("time_s")) - 1, 0)].engine
        return at if at is not None else next(r.engine for r in self._readings if r.engine is not None)
