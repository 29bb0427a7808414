"""The latency feedback: a measured tail against what the model said over the same window."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

#: A tail is further off than a mean: a model of mean requests knows nothing of the longest prompts.
_MOST_LOG = math.log(4.0)


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest value of the last one to two holds: of the present one (`high`), which has lasted `held_s`, and of
    the one before it; None where there was none. Of fixed size, unlike a window."""

    high: float | None = None
    before: float | None = None
    held_s: float = 0.0

    def after(self, value: float | None, dt_s: float, hold_s: float) -> Peak:
        """Let `dt_s` pass; `value` is what is seen then, None where nothing is."""
        high, before, held_s = self.high, self.before, self.held_s + dt_s
        if held_s >= hold_s:
            high, before, held_s = None, high, 0.0
        if value is not None:
            high = value if high is None else max(high, value)
        return Peak(high, before, held_s)

    @property
    def value(self) -> float | None:
        """The highest; None where there was none."""
        known = [peak for peak in (self.high, self.before) if peak is not None]
        return max(known) if known else None


@dataclass(frozen=True, slots=True)
class TailState:
    """One latency's p99: what the model said of late and by how much it was exceeded (log s, log of measured /
    predicted: the peaks of both), and the log of the factor in use.

    `reach` is the log of measured / predicted up to which the highest cap allowed keeps the limit, None without one.
    `passed_s` is how long ago an excess beyond it was passed over, None where none was within a hold.
    """

    said: Peak = field(default_factory=Peak)
    off: Peak = field(default_factory=Peak)
    log: float = 0.0
    reach: float | None = None
    passed_s: float | None = None

    @property
    def factor(self) -> float:
        """What to multiply a predicted p99 with, in [0.25, 4]."""
        return math.exp(self.log)


def follow(
    state: TailState,
    measured_s: float | None,
    predicted_s: float | None,
    dt_s: float,
    *,
    window_s: float,
    hold_s: float,
    lag_s: float,
) -> TailState:
    """Let `dt_s` pass. `measured_s` is the p99 over the last `window_s`, `predicted_s` for the point in force and the
    batch that runs; either is None while there is none.

    Every short interval is to be within the limits, not their mean: what counts is the highest of the last one to two
    `hold_s`. A percentile over `window_s` answers to the slowest part of it, so it is held against the highest that was
    predicted meanwhile: else each raise of the cap would look as if it had not helped, and call for the next.

    What no cap would have kept within the limit (`state.reach`) is no reason for a higher one: one such excess in a
    hold is passed over, for as long as the window shows it. A second says that there is more to it than chance.
    """
    said = state.said.after(math.log(predicted_s) if predicted_s else None, dt_s, window_s)
    ratio = None
    if measured_s and said.value is not None:
        ratio = min(max(math.log(measured_s) - said.value, -_MOST_LOG), _MOST_LOG)
    passed_s = None if state.passed_s is None else state.passed_s + dt_s
    # Seen for as long as the window, and somewhat longer where beats come late: a hold has to outlast that.
    seen_s = 1.5 * window_s
    if passed_s is not None and passed_s >= max(hold_s, 2.0 * seen_s):
        passed_s = None
    if ratio is not None and state.reach is not None and ratio > state.reach:
        passed_s = 0.0 if passed_s is None else passed_s
        if passed_s <= seen_s:
            ratio = None
    off = state.off.after(ratio, dt_s, hold_s)
    share = 1.0 if state.off.value is None else 1.0 - math.exp(-dt_s / lag_s)
    return TailState(said, off, state.log + ((off.value or 0.0) - state.log) * share, state.reach, passed_s)


def within_reach(state: TailState, limit_s: float | None, planned_s: float) -> TailState:
    """Know what the highest cap allowed can keep: its p99 is `planned_s`, the factor in use included."""
    if limit_s is None or planned_s <= 0.0:
        return replace(state, reach=None)
    return replace(state, reach=math.log(limit_s / planned_s) + state.log)
