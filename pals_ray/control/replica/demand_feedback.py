"""What telemetry says of a replica's demand, and of how far its model is off."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.latency_feedback import update_tail
from pals_ray.control.replica.prediction import Surface
from pals_ray.control.replica.throughput_feedback import pid_step
from pals_ray.models.power_model import FloatArray
from pals_ray.types import ReplicaTelemetry


def apply_feedback(
    state: ControllerState, seen: Situation, config: ControllerConfig, raw: Surface, here: int, dt_s: float
) -> tuple[ControllerState, Surface, float, float]:
    """The surface as feedback corrects it, the demand, and what of it is wanted, tokens/s.

    `raw` is what the model predicts, `here` the row of the cap in force in it.
    """
    telemetry = seen.telemetry

    def now(values: FloatArray) -> float:
        """At the cap in force and what runs now."""
        return float(np.interp(telemetry.running, raw.batch, values[here]))

    busy = telemetry.running > 0
    windows = {"window_s": seen.recent_s, "hold_s": config.tail_hold_s, "lag_s": config.tail_lag_s}
    # Latencies are compared with what the point in force was chosen on: margins in there cancel out.
    then = state.expected
    ttft_s = then.ttft_p99_s / (state.ttft.factor * seen.largest_prompt) if then else now(raw.ttft_p99_s)
    itl_s = then.itl_p99_s / state.itl.factor if then else now(raw.itl_p99_s)
    ttft = update_tail(state.ttft, telemetry.ttft.recent_p99_s, ttft_s if busy else None, dt_s, **windows)
    itl = update_tail(state.itl, telemetry.itl.recent_p99_s, itl_s if busy else None, dt_s, **windows)

    queue = state.queue_since_s is not None and seen.now_s - state.queue_since_s >= config.gains.persist_s
    limit = state.point.batch_limit if state.point is not None else 0
    pid, need = pid_step(
        state.pid,
        _throughput_error(state, seen, config) if queue else None,
        seen.now_s,
        dt_s,
        config.gains,
        at_most=here == len(raw.cap_w) - 1,
        at_least=here == 0,
        spare=telemetry.waiting == 0 and telemetry.running < config.spare_share * limit,
    )
    on = replace(
        raw,
        capacity_tokens_per_s=raw.capacity_tokens_per_s / (need * (1.0 + config.margin)),
        itl_p99_s=raw.itl_p99_s * itl.factor,
        ttft_p99_s=raw.ttft_p99_s * (ttft.factor * seen.largest_prompt),
    )

    modelled = now(on.capacity_tokens_per_s) if busy else 0.0
    predicted = now(raw.capacity_tokens_per_s) / need if busy else 0.0
    # What runs shows a rise before a mean over seconds does, by Little's law whatever the model's bias.
    arriving = max(telemetry.throughput_tokens_per_s, modelled)
    # After a jump many prompts are still being computed, at a cap chosen for fewer, and show in no throughput yet.
    before = state.fast_demand_tokens_per_s
    many = telemetry.running >= config.jump_min_running
    jumps = many and before is not None and arriving > config.jump_factor * before
    jumped_s = seen.now_s if jumps else state.jumped_s
    lag_s = config.demand_s if jumped_s is None or seen.now_s - jumped_s >= config.demand_s else config.fast_demand_s
    fast = _toward(before, arriving, dt_s, config.fast_demand_s)
    slow = _toward(state.demand_tokens_per_s, arriving, dt_s, lag_s)
    modelled = _toward(state.modelled_tokens_per_s, modelled, dt_s, lag_s)
    if busy and fast > config.jump_factor * slow:
        slow = modelled = fast
    # Between sparse requests the cap waits for the next prompt; in a longer silence it does not.
    if not busy and telemetry.waiting == 0 and slow < config.silent_tokens_per_s:
        slow = fast = 0.0
    state = replace(
        state,
        ttft=ttft,
        itl=itl,
        pid=pid,
        need=need,
        demand_tokens_per_s=slow,
        fast_demand_tokens_per_s=fast,
        modelled_tokens_per_s=modelled,
        jumped_s=jumped_s,
        predicted_tokens_per_s=_toward(state.predicted_tokens_per_s, predicted, dt_s, config.fast_demand_s),
    )
    nearly_full = limit > 0 and telemetry.running >= config.nearly_full_share * limit
    demand = max(slow, fast) if queue or nearly_full else slow
    if queue or (telemetry.waiting > 0 and not busy):
        demand = demand_with_queue_tokens_per_s(demand, telemetry, on)
    if jumps:
        together = telemetry.running + telemetry.waiting
        demand = max(demand, float(np.interp(together, raw.batch, on.capacity_tokens_per_s[-1])))
    target = seen.target.throughput_tokens_per_s
    return state, on, demand, demand if target is None else min(demand, target)


def demand_with_queue_tokens_per_s(demand: float, seen: ReplicaTelemetry, on: Surface) -> float:
    """What a replica is to serve now, tokens/s: its demand, and more where requests wait or soon may.

    Waiting requests are to be let in within the time that those running, half done on average, still take; but no
    faster than the engine could serve all of them. So a short queue asks for a little more than arrives, not for all
    the tokens of a full batch, which other replicas would have to do without. The number running varies as a Poisson
    number does: those by which one standard deviation more would exceed the batch limit count as waiting already.
    """
    limit = float(on.batch[-1])
    inside = seen.running + seen.waiting
    waiting = max(float(seen.waiting), inside + float(np.sqrt(seen.running)) - limit)
    if waiting <= 0.0:
        return demand
    together = int(np.searchsorted(on.batch, min(inside, limit)))
    fastest = max(demand, float(on.capacity_tokens_per_s[-1, together]))
    if seen.running == 0 or demand <= 0.0:
        return fastest
    return min(demand * (1.0 + 2.0 * waiting / seen.running), fastest)


def _throughput_error(state: ControllerState, seen: Situation, config: ControllerConfig) -> float | None:
    """1 - served / what was to be served while requests wait: the target, or the model's prediction if that is less.

    Serving more than the target is an error too; serving more than was predicted is none (None).
    """
    predicted = state.predicted_tokens_per_s or 0.0
    target = seen.target.throughput_tokens_per_s
    aim = predicted if target is None else min(predicted, target)
    if aim <= 0:
        return None
    error = 1.0 - seen.telemetry.throughput_tokens_per_s / aim
    targeted = target is not None and aim >= target * (1.0 - config.gains.dead_band)
    return error if error > 0 or targeted else None


def _toward(before: float | None, value: float, dt_s: float, time_constant_s: float) -> float:
    return value if before is None else before + (value - before) * (1.0 - float(np.exp(-dt_s / time_constant_s)))
