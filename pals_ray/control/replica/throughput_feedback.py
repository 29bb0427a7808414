"""The throughput feedback: a PID controller on how far what is served falls short of what was predicted or wanted."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: A correction doubles or halves at most.
_MOST_LOG = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Gains:
    """PID on the relative error e = 1 - served / wanted; the output is a factor exp(u), u within +-log 2.

    `proportional` is u per unit of e, `integral_per_s` u per unit and second, `derivative_s` u per unit/s. Errors
    within `dead_band` count as none; a larger one must have lasted `persist_s` before it counts. While there is no
    error to see but capacity to spare, the integral decays with `unwind_s`. The throughput behind e is a mean over
    5 s, so the integral must stay well below 1 / 2.5 s, the inverse of its delay.
    """

    proportional: float = 0.3
    integral_per_s: float = 0.1
    derivative_s: float = 0.3
    dead_band: float = 0.01
    persist_s: float = 1.5
    unwind_s: float = 20.0


@dataclass(frozen=True, slots=True)
class PidState:
    """The integral (of log factor), the error last seen, and since when it has been beyond the dead band, s."""

    integral: float = 0.0
    error: float | None = None
    beyond_since_s: float | None = None


def pid_step(
    state: PidState,
    error: float | None,
    now_s: float,
    dt_s: float,
    gains: Gains,
    *,
    at_most: bool,
    at_least: bool,
    spare: bool,
) -> tuple[PidState, float]:
    """One step: the new state and the factor, in [0.5, 2], that the required capacity is to be multiplied by.

    `error` is None where what is served says nothing of capacity, because nothing waits: then only the integral counts,
    and it unwinds with `spare` capacity. With `at_most` or `at_least` the cap is at that end of its range, and the
    integral does not grow any further that way.
    """
    if error is None:
        integral = state.integral * math.exp(-dt_s / gains.unwind_s) if spare else state.integral
        return PidState(integral), math.exp(integral)
    since_s = None
    if abs(error) > gains.dead_band:
        same_side = state.error is not None and state.error * error > 0
        since_s = state.beyond_since_s if same_side and state.beyond_since_s is not None else now_s
    if since_s is None or now_s - since_s < gains.persist_s:
        return PidState(state.integral, error, since_s), math.exp(state.integral)
    slope_per_s = (error - state.error) / dt_s if state.error is not None and dt_s > 0 else 0.0
    blocked = (error > 0 and at_most) or (error < 0 and at_least)
    integral = _clamped(state.integral if blocked else state.integral + gains.integral_per_s * error * dt_s)
    log = _clamped(gains.proportional * error + integral + gains.derivative_s * slope_per_s)
    return PidState(integral, error, since_s), math.exp(log)


def _clamped(log: float) -> float:
    return min(max(log, -_MOST_LOG), _MOST_LOG)
