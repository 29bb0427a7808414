"""Quality of service: violations of targets, and misses per request, per model and priority class.

Pure and incremental. The agent turns engine telemetry into a few counts (`tally_of`) that travel with its beat. The
manager takes the counts of a model's replicas in on its own beat (`observe`), and `status_of` and `by_priority` say
what status and metrics show of a model and of a priority class.

Latencies in the histogram bucket that a limit falls into count as spread evenly over the bucket, as in `quantile_s`.
So an interval's misses exceed 1 % exactly where its p99 exceeds the limit, and a count of misses may be a fraction.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, QosStatus, QosTotals, Target


@dataclass(frozen=True, slots=True)
class QosConfig:
    """What counts as a violation: intervals of `interval_s`, tokens/s under `served` of the target while requests
    waited at both ends, more than `late` of the latencies over their limit, and at least one.

    An interval ends at the first observation at most `slack_s` before its time; one that lasted over `most_s` (nobody
    looked meanwhile) is not judged.
    """

    interval_s: float = 5.0
    slack_s: float = 0.25
    most_s: float = 10.0
    served: float = 0.98
    late: float = 0.01


@dataclass(frozen=True, slots=True)
class Tally:
    """One replica's engine in the few numbers that QoS needs: gauges, and counts since engine start.

    `arrived` requests are those finished or in the engine. `ttft_late` are the TTFTs over `ttft_limit_s` (None: no
    limit, and none is late), of `ttft` in all; `itl...` alike.
    """

    time_s: float
    running: int
    waiting: int
    tokens: int
    finished: int
    ttft: int
    ttft_late: float
    ttft_limit_s: float | None
    itl: int
    itl_late: float
    itl_limit_s: float | None

    @property
    def arrived(self) -> int:
        """Requests that have ever come in."""
        return self.finished + self.running + self.waiting


def late_count(counts: Sequence[int], limit_s: float | None) -> float:
    """How many latencies of a histogram over `LATENCY_EDGES_S` exceed a limit, s; see the module for its bucket.

    Those in the overflow bucket exceed every limit.
    """
    if limit_s is None:
        return 0.0
    at = bisect_left(LATENCY_EDGES_S, limit_s)
    if at == len(LATENCY_EDGES_S):
        return float(counts[-1])
    lower_s, upper_s = LATENCY_EDGES_S[at - 1] if at else 0.0, LATENCY_EDGES_S[at]
    return float(sum(counts[at + 1 :])) + counts[at] * (upper_s - limit_s) / (upper_s - lower_s)


def tally_of(engine: EngineTelemetry, target: Target) -> Tally:
    """The tally of one reading, against the limits of its model's target."""
    return Tally(
        time_s=engine.time_s,
        running=engine.running,
        waiting=engine.waiting,
        tokens=engine.generation_tokens,
        finished=engine.requests_finished,
        ttft=sum(engine.ttft_counts),
        ttft_late=late_count(engine.ttft_counts, target.ttft_p99_s),
        ttft_limit_s=target.ttft_p99_s,
        itl=sum(engine.itl_counts),
        itl_late=late_count(engine.itl_counts, target.itl_p99_s),
        itl_limit_s=target.itl_p99_s,
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an interval was a violation, and by what."""

    throughput: bool
    ttft: bool
    itl: bool
    reason: str

    @property
    def violation(self) -> bool:
        """Whether any of the three was."""
        return self.throughput or self.ttft or self.itl


@dataclass(frozen=True, slots=True)
class QosState:
    """One model's account. `opened` and `last` are tallies by replica at the interval's start and at the last look."""

    opened_s: float | None = None
    opened: Mapping[str, Tally] = field(default_factory=dict)
    last: Mapping[str, Tally] = field(default_factory=dict)
    active: bool = False
    totals: QosTotals = field(default_factory=QosTotals)
    latest: Verdict | None = None


def observe(
    state: QosState, now_s: float, tallies: Mapping[str, Tally], target: Target, config: QosConfig | None = None
) -> QosState:
    """Take the replicas' present tallies in, and judge the interval where it is over.

    A replica counts in an interval that it was seen at both ends of, by one engine and against one pair of limits. A
    clock that went back begins a new interval.
    """
    config = config if config is not None else QosConfig()
    active = state.active or any(_active(tally, state.last.get(name)) for name, tally in tallies.items())
    if state.opened_s is None or now_s < state.opened_s:
        return QosState(now_s, dict(tallies), dict(tallies), _has_requests(tallies), state.totals, state.latest)
    if now_s - state.opened_s < config.interval_s - config.slack_s:
        return QosState(state.opened_s, state.opened, dict(tallies), active, state.totals, state.latest)
    judged = _judge(now_s - state.opened_s, state.opened, tallies, target, config) if active else None
    totals, verdict = (state.totals + judged[0], judged[1]) if judged else (state.totals, state.latest)
    return QosState(now_s, dict(tallies), dict(tallies), _has_requests(tallies), totals, verdict)


def _has_requests(tallies: Mapping[str, Tally]) -> bool:
    return any(tally.running + tally.waiting > 0 for tally in tallies.values())


def _active(now: Tally, before: Tally | None) -> bool:
    """A request is there, or came and went since the last look."""
    return now.running + now.waiting > 0 or (before is not None and now.finished > before.finished)


def _comparable(first: Tally, last: Tally) -> bool:
    """Not so after the engine began anew, or a limit was changed."""
    same_limits = (first.ttft_limit_s, first.itl_limit_s) == (last.ttft_limit_s, last.itl_limit_s)
    return same_limits and last.tokens >= first.tokens and last.finished >= first.finished and last.ttft >= first.ttft


def _judge(
    duration_s: float, opened: Mapping[str, Tally], closed: Mapping[str, Tally], target: Target, config: QosConfig
) -> tuple[QosTotals, Verdict] | None:
    """What one interval counts, over all replicas seen at both ends, and whether it was a violation as ARCHITECTURE.md
    defines it; None where there was nothing to judge. A model without a target tokens/s is to serve what arrives."""
    pairs = [(opened[name], last) for name, last in closed.items() if name in opened]
    pairs = [(first, last) for first, last in pairs if _comparable(first, last)]
    if not pairs or not 0 < duration_s <= config.most_s:
        return None
    wanted, finished = target.throughput_tokens_per_s, sum(last.finished for _, last in pairs)
    if wanted is None and finished:
        # Tokens of requests that still run are counted too; on average those are half done.
        outputs = finished + sum(last.running for _, last in pairs) / 2
        arrived = sum(last.arrived - first.arrived for first, last in pairs)
        wanted = max(arrived, 0) * (sum(last.tokens for _, last in pairs) / outputs) / duration_s
    served = sum(last.tokens - first.tokens for first, last in pairs) / duration_s
    waited = any(first.waiting > 0 for first, _ in pairs) and any(last.waiting > 0 for _, last in pairs)
    short = waited and wanted is not None and served < config.served * wanted
    words = [f"{served:.4g} of {wanted:.4g} tokens/s while requests waited"] if short else []
    ttft, itl = sum(last.ttft - first.ttft for first, last in pairs), sum(last.itl - first.itl for first, last in pairs)
    ttft_late = sum(last.ttft_late - first.ttft_late for first, last in pairs)
    itl_late = sum(last.itl_late - first.itl_late for first, last in pairs)
    slow_ttft, slow_itl = (
        limit_s is not None and late >= 1.0 and late > config.late * total
        for limit_s, late, total in ((target.ttft_p99_s, ttft_late, ttft), (target.itl_p99_s, itl_late, itl))
    )
    if slow_ttft:
        words.append(f"{ttft_late:.0f} of {ttft} TTFTs over {target.ttft_p99_s:g} s")
    if slow_itl:
        words.append(f"{itl_late:.0f} of {itl} inter-token latencies over {target.itl_p99_s:g} s")
    verdict = Verdict(short, slow_ttft, slow_itl, "; ".join(words) or "no violation")
    causes = int(verdict.violation), int(short), int(slow_ttft), int(slow_itl)
    return QosTotals(1, *causes, ttft, ttft_late, itl, itl_late), verdict


def status_of(model: str, target: Target, state: QosState) -> QosStatus:
    """One model's QoS since its account began."""
    latest = state.latest.reason if state.latest is not None else "no interval judged yet"
    return _status(model, target.priority, state.totals, latest)


def by_priority(statuses: Iterable[QosStatus]) -> tuple[QosStatus, ...]:
    """The same per priority class, first class first."""
    totals: dict[int, QosTotals] = {}
    for status in statuses:
        totals[status.priority] = totals.get(status.priority, QosTotals()) + status.totals
    return tuple(_status(None, priority, totals[priority], "") for priority in sorted(totals))


def _status(model: str | None, priority: int, totals: QosTotals, latest: str) -> QosStatus:
    def share(part: float, whole: int) -> float | None:
        return part / whole if whole else None

    return QosStatus(
        model=model,
        priority=priority,
        intervals=totals.intervals,
        violations=totals.violations,
        violation_share=share(totals.violations, totals.intervals),
        throughput_violations=totals.throughput,
        ttft_violations=totals.ttft,
        itl_violations=totals.itl,
        ttft_miss_share=share(totals.requests_late, totals.requests),
        itl_miss_share=share(totals.tokens_late, totals.tokens),
        latest=latest,
        totals=totals,
    )
