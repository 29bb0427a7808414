"""The throughput feedback: a PID controller on how far what is served falls short of what was predicted or wanted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Gains, PidState, Situation
from pals_ray.control.replica.prediction import Surface

#: A correction doubles what is planned for at most, and takes a little off it where a target is exceeded.
_MOST_LOG, _LEAST_LOG = math.log(2.0), -0.03


def with_throughput(
    state: ControllerState, seen: Situation, config: ControllerConfig, on: Surface, here: int
) -> ControllerState:
    """The state with `need` brought up to date; `here` is the row of the cap in force in the surface."""
    telemetry, dt_s = seen.telemetry, state.step_s
    now = float(np.interp(telemetry.running, on.batch, on.capacity_tokens_per_s[here])) if telemetry.running else 0.0
    before = state.predicted_tokens_per_s
    predicted = now if before is None else before + (now - before) * (1.0 - math.exp(-dt_s / config.predicted_s))
    queue = state.queue_since_s is not None and seen.now_s - state.queue_since_s >= config.gains.persist_s
    limit = state.point.batch_limit if state.point is not None else 0
    pid, need = pid_step(
        state.pid,
        _error(predicted, seen) if queue else None,
        seen.now_s,
        dt_s,
        config.gains,
        at_most=here == len(on.cap_w) - 1,
        at_least=here == 0,
        spare=_has_spare(seen, config, limit),
    )
    return replace(state, predicted_tokens_per_s=predicted, pid=pid, need=need)


def _has_spare(seen: Situation, config: ControllerConfig, limit: int) -> bool:
    """Whether more could be served than is to be: the batch is not full."""
    return seen.telemetry.waiting == 0 and seen.telemetry.running < config.spare_share * limit


def _error(predicted: float, seen: Situation) -> float | None:
    """1 - served / what was to be served while requests wait: the target, or the model's prediction if that is less.

    Serving more than predicted is none (None); more than the target is one.
    """
    target = seen.target.throughput_tokens_per_s
    aim = predicted if target is None else min(predicted, target)
    if aim <= 0:
        return None
    error = 1.0 - seen.telemetry.throughput_tokens_per_s / aim
    return error if error > 0 or aim == target else None


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
    """One step: the new state and the factor, in [0.97, 2], that the required capacity is to be multiplied by.

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
    return min(max(log, _LEAST_LOG), _MOST_LOG)
