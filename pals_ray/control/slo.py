"""Service-level objectives: the verdict on each request, and how a model keeps its SLO and its tokens/s target.

Pure. A `RequestJudge` stands beside one engine, real or simulated, and judges each request as soon as its verdict is
certain. Its counts travel with the agent's beat as a `Tally`; the manager takes those of a model's replicas in on its
own beat (`observe`), and `status_of` and `by_priority` say what status and metrics show.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Slo, SloStatus, Target, Verdicts

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: With fewer judged requests in the window one may be late.
FEW_REQUESTS = 100
#: Share of token gaps that may be longer than `Slo.itl_p99_s`.
LONG_GAPS = 0.01
#: A tokens/s target is judged in intervals of so many s (PALS), which end up to `SLACK_S` early, and not if they took
#: more than `MOST_INTERVAL_S` (nobody looked meanwhile). An interval with work waiting at every look is under target
#: below `SERVED` of it.
INTERVAL_S = 5.0
SLACK_S = 0.25
MOST_INTERVAL_S = 10.0
SERVED = 0.95
#: A window moves in so many steps.
_STEPS = 60


class RequestJudge:
    """Judges one engine's requests; times are s of any one clock. `verdicts` counts those judged so far.

    `ttft_limit_s` and `tpot_limit_s` (inf: none) may change at any time, and hold for verdicts from then on. A request
    that is judged is forgotten: what is told of it afterwards changes nothing.
    """

    def __init__(self, ttft_limit_s: float = inf, tpot_limit_s: float = inf) -> None:
        self.ttft_limit_s = ttft_limit_s
        self.tpot_limit_s = tpot_limit_s
        self.good = self.late_ttft = self.late_tpot = self.late_failed = self.good_tokens = 0
        # By request, in the order of arrival: when it came. And when its first token came.
        self._waiting: dict[Hashable, float] = {}
        self._first_s: dict[Hashable, float] = {}

    @property
    def verdicts(self) -> Verdicts:
        """The counts so far."""
        return Verdicts(self.good, self.late_ttft, self.late_tpot, self.late_failed, self.good_tokens)

    @property
    def unjudged(self) -> int:
        """How many have come and have neither ended nor been judged."""
        return len(self._waiting) + len(self._first_s)

    def arrived(self, request: Hashable, arrival_s: float) -> None:
        """A request has come in."""
        self._waiting[request] = arrival_s

    def look(self, now_s: float) -> None:
        """Judge the requests that have waited longer than the TTFT limit: they are late whatever comes."""
        limit_s, waiting = self.ttft_limit_s, self._waiting
        while waiting:
            request = next(iter(waiting))
            if now_s - waiting[request] <= limit_s:
                return
            del waiting[request]
            self.late_ttft += 1

    def first_token(self, request: Hashable, now_s: float) -> None:
        """Its first token has come."""
        arrival_s = self._waiting.pop(request, None)
        if arrival_s is None:
            return
        if now_s - arrival_s > self.ttft_limit_s:
            self.late_ttft += 1
        else:
            self._first_s[request] = now_s

    def ended(self, request: Hashable, last_token_s: float, output_tokens: int) -> None:
        """It has ended as it should. With one output token, or none, it is judged by TTFT alone."""
        self.first_token(request, last_token_s)
        first_s = self._first_s.pop(request, None)
        if first_s is None:
            return
        if self._slow(first_s, last_token_s, output_tokens):
            self.late_tpot += 1
        else:
            self.good += 1
            self.good_tokens += output_tokens

    def aborted(self, request: Hashable, now_s: float, output_tokens: int) -> None:
        """Its client has gone: it is late if a limit is broken already, and else not judged."""
        arrival_s, first_s = self._waiting.pop(request, None), self._first_s.pop(request, None)
        if arrival_s is not None and now_s - arrival_s > self.ttft_limit_s:
            self.late_ttft += 1
        elif first_s is not None and self._slow(first_s, now_s, output_tokens):
            self.late_tpot += 1

    def failed(self, request: Hashable) -> None:
        """It ends without an answer, by our fault."""
        waited, decoded = self._waiting.pop(request, None), self._first_s.pop(request, None)
        self.late_failed += waited is not None or decoded is not None

    def _slow(self, first_s: float, last_s: float, output_tokens: int) -> bool:
        return output_tokens > 1 and (last_s - first_s) / (output_tokens - 1) > self.tpot_limit_s


def allowed_late(judged: int, attainment: float) -> float:
    """How many of so many judged requests may be late: the share that the SLO leaves, and one of a few."""
    allowed = (1.0 - attainment) * judged
    return max(allowed, 1.0) if judged < FEW_REQUESTS else allowed


@dataclass(frozen=True, slots=True)
class Tally:
    """One replica's engine in the few numbers that SLOs need: counts since engine start, and how many requests wait or
    are `unjudged`.

    Of `gaps` between tokens `gaps_over` were longer than `gap_limit_s` (None: no limit).
    """

    verdicts: Verdicts
    tokens: int
    waiting: int
    gaps: int
    gaps_over: float
    gap_limit_s: float | None
    unjudged: int = 0

    def same_engine(self, first: Tally) -> bool:
        """Whether it may be of the engine that an earlier one was of."""
        return self.tokens >= first.tokens and self.gaps >= first.gaps and self.verdicts.judged >= first.verdicts.judged

    def follows(self, first: Tally) -> bool:
        """Whether it may be compared with an earlier one: by the same engine, against the same limit."""
        return self.same_engine(first) and self.gap_limit_s == first.gap_limit_s


def over_count(counts: Sequence[int], limit_s: float | None) -> float:
    """How many latencies of a histogram over `LATENCY_EDGES_S` exceed a limit, s.

    Those in the bucket that the limit falls into count as spread evenly over it, as in `telemetry.quantile_s`; those in
    the overflow bucket exceed every limit.
    """
    if limit_s is None:
        return 0.0
    at = bisect_left(LATENCY_EDGES_S, limit_s)
    if at == len(LATENCY_EDGES_S):
        return float(counts[-1])
    lower_s, upper_s = LATENCY_EDGES_S[at - 1] if at else 0.0, LATENCY_EDGES_S[at]
    return float(sum(counts[at + 1 :])) + counts[at] * (upper_s - limit_s) / (upper_s - lower_s)


def tally_of(engine: EngineTelemetry, slo: Slo) -> Tally:
    """The tally of one reading."""
    gaps = sum(engine.itl_counts)
    over = over_count(engine.itl_counts, slo.itl_p99_s)
    return Tally(engine.verdicts, engine.generation_tokens, engine.waiting, gaps, over, slo.itl_p99_s, engine.unjudged)


@dataclass(frozen=True, slots=True)
class Step:
    """What was judged in one step of the window, which began at `since_s`."""

    since_s: float
    verdicts: Verdicts = field(default_factory=Verdicts)
    gaps: int = 0
    gaps_over: float = 0.0


@dataclass(frozen=True, slots=True)
class SloState:
    """One model's account, of bounded size; times are s of the observer's clock.

    `steps` are those of the window, oldest first. `last` holds the tallies by replica at the last look, `opened` those
    at the start of the present interval of the tokens/s target, `waited` whether work has waited at every look since.
    """

    steps: tuple[Step, ...] = ()
    total: Verdicts = field(default_factory=Verdicts)
    last: Mapping[str, Tally] = field(default_factory=dict)
    opened_s: float | None = None
    opened: Mapping[str, Tally] = field(default_factory=dict)
    waited: bool = False
    intervals: int = 0
    under_target: int = 0


def observe(state: SloState, now_s: float, tallies: Mapping[str, Tally], target: Target) -> SloState:
    """Take the replicas' present tallies in. A replica counts from its second tally on."""
    state = _judged(state, now_s, tallies, target.slo.window_s)
    return replace(_throughput(state, now_s, tallies, target.throughput_tokens_per_s), last=dict(tallies))


def _judged(state: SloState, now_s: float, tallies: Mapping[str, Tally], window_s: float) -> SloState:
    """Add what was judged since the last look to the window: requests that were with an engine that is gone failed."""
    ended = (first for name, first in state.last.items() if name not in tallies or not tallies[name].same_engine(first))
    verdicts, gaps, gaps_over = Verdicts(late_failed=sum(first.unjudged for first in ended)), 0, 0.0
    for first, last in _pairs(state.last, tallies):
        verdicts += last.verdicts - first.verdicts
        gaps += last.gaps - first.gaps
        gaps_over += last.gaps_over - first.gaps_over
    steps = [step for step in state.steps if now_s - window_s < step.since_s <= now_s]
    if not steps or now_s - steps[-1].since_s >= window_s / _STEPS:
        steps.append(Step(now_s))
    at = steps[-1]
    steps[-1] = Step(at.since_s, at.verdicts + verdicts, at.gaps + gaps, at.gaps_over + gaps_over)
    return replace(state, steps=tuple(steps), total=state.total + verdicts)


def _throughput(state: SloState, now_s: float, tallies: Mapping[str, Tally], target: float | None) -> SloState:
    """Judge an interval of the tokens/s target where it is over."""
    waits = any(tally.waiting > 0 for tally in tallies.values())
    begun = replace(state, opened_s=now_s, opened=dict(tallies), waited=waits)
    if state.opened_s is None or now_s < state.opened_s or target is None:
        return begun
    waited, passed_s = state.waited and waits, now_s - state.opened_s
    if passed_s < INTERVAL_S - SLACK_S:
        return replace(state, waited=waited)
    if passed_s > MOST_INTERVAL_S:
        return begun
    served = sum(last.tokens - first.tokens for first, last in _pairs(state.opened, tallies)) / passed_s
    under = waited and served < SERVED * target
    return replace(begun, intervals=state.intervals + 1, under_target=state.under_target + under)


def _pairs(before: Mapping[str, Tally], now: Mapping[str, Tally]) -> list[tuple[Tally, Tally]]:
    pairs = [(before[name], tally) for name, tally in now.items() if name in before]
    return [(first, last) for first, last in pairs if last.follows(first)]


def status_of(model: str, target: Target, state: SloState) -> SloStatus:
    """How one model keeps its targets."""
    recent = sum((step.verdicts for step in state.steps), Verdicts())
    gaps = sum(step.gaps for step in state.steps)
    over = sum(step.gaps_over for step in state.steps)
    allowed = allowed_late(recent.judged, target.slo.attainment)
    return SloStatus(
        model=model,
        priority=target.priority,
        slo=target.slo,
        recent=recent,
        total=state.total,
        allowed=allowed,
        error_budget_left=1.0 - recent.late / allowed if target.slo.judges else None,
        itl_over_share=over / gaps if gaps and target.slo.itl_p99_s is not None else None,
        under_target_share=state.under_target / state.intervals if state.intervals else None,
        intervals=state.intervals,
    )


def by_priority(statuses: Iterable[SloStatus]) -> tuple[SloStatus, ...]:
    """The same of each priority class, first class first: its models' requests together, each model's own allowance."""
    classes: dict[int, list[SloStatus]] = {}
    for status in statuses:
        classes.setdefault(status.priority, []).append(status)
    return tuple(_together(priority, classes[priority]) for priority in sorted(classes))


def _together(priority: int, models: Sequence[SloStatus]) -> SloStatus:
    recent = sum((status.recent for status in models), Verdicts())
    limited = [status for status in models if status.error_budget_left is not None]
    allowed = sum(status.allowed for status in limited)
    intervals = sum(status.intervals for status in models)
    under = sum((status.under_target_share or 0.0) * status.intervals for status in models)
    return SloStatus(
        model=None,
        priority=priority,
        slo=None,
        recent=recent,
        total=sum((status.total for status in models), Verdicts()),
        allowed=allowed,
        error_budget_left=1.0 - recent.late / allowed if limited else None,
        itl_over_share=None,
        under_target_share=under / intervals if intervals else None,
        intervals=intervals,
    )


def good_requests(
    arrival_s: FloatArray, first_s: FloatArray, last_s: FloatArray, output_tokens: IntArray, slo: Slo, now_s: float
) -> tuple[BoolArray, BoolArray]:
    """(n,) each: which of these requests are good by now, and which are late: the verdicts of `RequestJudge` in arrays.

    `first_s` and `last_s` are nan before the first and the last token, `output_tokens` those of the whole answer.
    """
    ttft_s = np.where(np.isnan(first_s), now_s, first_s) - arrival_s
    late = ttft_s > (slo.ttft_s or inf)
    done = np.isfinite(last_s)
    tpot_s = np.where(done & (output_tokens > 1), last_s - first_s, 0.0) / np.maximum(output_tokens - 1, 1)
    late |= done & (tpot_s > (slo.tpot_s or inf))
    return done & ~late, late
