"""The latency feedback: by how much measured p99 latencies exceed what the model predicted over the same window."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

#: A tail is further off than a mean: a model of mean requests knows nothing of the longest prompts.
_MOST_LOG = math.log(4.0)


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest value of the last one to two holds, of fixed size, unlike a window.

    `high` is that of the present hold, which has lasted `held_s`, `before` that of the one before; None: no value yet.
    """

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
        return max((peak for peak in (self.high, self.before) if peak is not None), default=None)


@dataclass(frozen=True, slots=True)
class TailState:
    """What is known of one latency's p99.

    `predicted` holds the peak of what the model predicted of late (log s), `excess` that of the log of measured /
    predicted. `log_factor` is the log of the factor in use. `reachable` is the log of measured / predicted up to which
    the highest cap allowed keeps the limit, None without a limit. `ignored_s` is how long ago an excess beyond that was
    first ignored, None where none was within a hold.
    """

    predicted: Peak = field(default_factory=Peak)
    excess: Peak = field(default_factory=Peak)
    log_factor: float = 0.0
    reachable: float | None = None
    ignored_s: float | None = None

    @property
    def factor(self) -> float:
        """What to multiply a predicted p99 with, in [0.25, 4]."""
        return math.exp(self.log_factor)


def update_tail(
    state: TailState,
    measured_s: float | None,
    predicted_s: float | None,
    dt_s: float,
    *,
    window_s: float,
    hold_s: float,
    lag_s: float,
) -> TailState:
    """Let `dt_s` pass, and take in what was measured and predicted meanwhile; either is None while there is none.

    `measured_s` is the p99 over the last `window_s`, `predicted_s` the model's for the point in force and what runs.

    Every short interval has to be within the limits, not their mean, so the highest excess of the last one to two
    `hold_s` counts. A percentile over `window_s` shows the slowest part of the window, so it is compared with the
    highest prediction in it: otherwise each raise of the cap would seem to have had no effect and call for the next.

    An excess that no cap would have kept within the limit (`state.reachable`) is no reason for a higher cap. The first
    in a hold is taken for chance and ignored for as long as the window shows it; a second one counts.
    """
    predicted = state.predicted.after(math.log(predicted_s) if predicted_s else None, dt_s, window_s)
    ratio = None
    if measured_s and predicted.value is not None:
        ratio = min(max(math.log(measured_s) - predicted.value, -_MOST_LOG), _MOST_LOG)
    ignored_s = None if state.ignored_s is None else state.ignored_s + dt_s
    # The window shows an excess for its own length, and for somewhat longer where beats come late.
    seen_s = 1.5 * window_s
    if ignored_s is not None and ignored_s >= max(hold_s, 2.0 * seen_s):
        ignored_s = None
    if ratio is not None and state.reachable is not None and ratio > state.reachable:
        ignored_s = 0.0 if ignored_s is None else ignored_s
        if ignored_s <= seen_s:
            ratio = None
    excess = state.excess.after(ratio, dt_s, hold_s)
    share = 1.0 if state.excess.value is None else 1.0 - math.exp(-dt_s / lag_s)
    log_factor = state.log_factor + ((excess.value or 0.0) - state.log_factor) * share
    return TailState(predicted, excess, log_factor, state.reachable, ignored_s)


def with_reachable(state: TailState, limit_s: float | None, planned_s: float) -> TailState:
    """Note what the highest cap allowed can keep: its p99 is `planned_s`, the factor in use included."""
    if limit_s is None or planned_s <= 0.0:
        return replace(state, reachable=None)
    return replace(state, reachable=math.log(limit_s / planned_s) + state.log_factor)
