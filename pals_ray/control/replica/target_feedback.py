"""What telemetry says of a tokens/s target: how much more capacity than predicted it takes to serve it."""

from __future__ import annotations

from dataclasses import replace
from math import exp

import numpy as np

from pals_ray.control.replica.attainment import tpot_p99_s
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.latency_feedback import LatencyFeedback
from pals_ray.control.replica.prediction import Surface
from pals_ray.control.replica.throughput_feedback import pid_step
from pals_ray.models.power_model import FloatArray


def with_throughput(
    state: ControllerState, seen: Situation, config: ControllerConfig, on: Surface, here: int
) -> ControllerState:
    """The state with `need` brought up to date; `here` is the row of the cap in force in the surface."""
    telemetry, dt_s = seen.telemetry, state.step_s
    now = float(np.interp(telemetry.running, on.batch, on.capacity_tokens_per_s[here])) if telemetry.running else 0.0
    before = state.predicted_tokens_per_s
    predicted = now if before is None else before + (now - before) * (1.0 - exp(-dt_s / config.predicted_s))
    queue = state.queue_since_s is not None and seen.now_s - state.queue_since_s >= config.gains.persist_s
    limit = state.point.batch_limit if state.point is not None else 0
    pid, need = pid_step(
        state.pid,
        _error(predicted, seen, config) if queue else None,
        seen.now_s,
        dt_s,
        config.gains,
        at_most=here == len(on.cap_w) - 1,
        at_least=here == 0,
        spare=telemetry.waiting == 0 and telemetry.running < config.spare_share * limit,
    )
    return replace(state, predicted_tokens_per_s=predicted, pid=pid, need=need)


def _error(predicted: float, seen: Situation, config: ControllerConfig) -> float | None:
    """1 - served / what was to be served while requests wait: the target, or the model's prediction if that is less.

    Serving more than the target is an error too; serving more than was predicted is none (None).
    """
    target = seen.target.throughput_tokens_per_s
    aim = predicted if target is None else min(predicted, target)
    if aim <= 0:
        return None
    error = 1.0 - seen.telemetry.throughput_tokens_per_s / aim
    targeted = target is not None and aim >= target * (1.0 - config.gains.dead_band)
    return error if error > 0 or targeted else None


def with_latency(state: ControllerState, seen: Situation, on: Surface, here: int) -> ControllerState:
    """The state with what measured latencies say of the predicted ones at the cap in force and what runs."""
    telemetry, dt_s, before = seen.telemetry, state.step_s, state.latency
    if telemetry.running == 0:
        return state

    def now(values: FloatArray) -> float:
        return float(np.interp(telemetry.running_mean, on.batch, values[here]))

    return replace(
        state,
        latency=LatencyFeedback(
            before.ttft_p50.after(telemetry.ttft.p50_s, now(on.ttft_p50_s), dt_s),
            before.ttft_p99.after(telemetry.ttft.p99_s, now(on.ttft_p99_s), dt_s),
            before.tpot_p99.after(telemetry.tpot.p99_s, now(tpot_p99_s(on, telemetry.output_tokens)), dt_s),
        ),
    )
