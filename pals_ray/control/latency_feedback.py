"""The latency feedback: a measured tail against what the model said over the same window."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: A tail is further off than a mean: a model of mean requests knows nothing of the longest prompts.
_MOST_LOG = math.log(4.0)


@dataclass(frozen=True, slots=True)
class TailState:
    """One latency's p99: what the model said, smoothed as the window smooths what is measured (log s; None before the
    first), and the log of measured / predicted."""

    said_log: float | None = None
    log: float = 0.0

    @property
    def factor(self) -> float:
        """What to multiply a predicted p99 with, in [0.25, 4]."""
        return math.exp(self.log)


def follow(
    state: TailState, measured_s: float | None, predicted_s: float | None, dt_s: float, *, window_s: float, lag_s: float
) -> TailState:
    """Let `dt_s` pass. `predicted_s` is for the point in force and the batch that runs; None while nothing runs.

    A percentile over `window_s` answers to what held half a window ago, so the prediction is smoothed that much before
    the two are compared: else each raise of the cap would look as if it had not helped, and call for the next.
    """
    said = state.said_log
    if predicted_s is not None and predicted_s > 0.0:
        new = math.log(predicted_s)
        said = new if said is None else said + (new - said) * _share(dt_s, window_s / 2.0)
    if measured_s is None or said is None or measured_s <= 0.0:
        return TailState(said, state.log * math.exp(-dt_s / window_s))
    off = min(max(math.log(measured_s) - said, -_MOST_LOG), _MOST_LOG)
    return TailState(said, state.log + (off - state.log) * _share(dt_s, lag_s))


def _share(dt_s: float, time_constant_s: float) -> float:
    return 1.0 - math.exp(-dt_s / time_constant_s)
