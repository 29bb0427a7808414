"""What telemetry says of demand, and of how far the model is off: the surface that a decision is made on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals_ray.control.replica.candidates import corrected
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.latency_feedback import follow
from pals_ray.control.replica.prediction import Surface
from pals_ray.control.replica.throughput_feedback import correct
from pals_ray.models.power_model import FloatArray
from pals_ray.types import ReplicaTelemetry


def with_feedback(
    state: ControllerState, seen: Situation, config: ControllerConfig, raw: Surface, here: int, dt_s: float
) -> tuple[ControllerState, Surface, float, float]:
    """The surface as feedback corrects it, and demand and what is wanted of it, tokens/s."""
    telemetry, batch = seen.telemetry, raw.batch

    def now(values: FloatArray) -> float:
        """At the cap in force and what runs now."""
        return float(np.interp(telemetry.running, batch, values[here]))

    busy = telemetry.running > 0
    tails = {"window_s": seen.recent_s, "hold_s": config.tail_hold_s, "lag_s": config.tail_lag_s}
    # Held against what the point in force was chosen on: whatever is assumed too high in there cancels out.
    then = state.expected
    said_ttft_s = then.ttft_p99_s / (state.ttft.factor * seen.largest_prompt) if then else now(raw.ttft_p99_s)
    said_itl_s = then.itl_p99_s / state.itl.factor if then else now(raw.itl_p99_s)
    ttft = follow(state.ttft, telemetry.ttft.recent_p99_s, said_ttft_s if busy else None, dt_s, **tails)
    itl = follow(state.itl, telemetry.itl.recent_p99_s, said_itl_s if busy else None, dt_s, **tails)

    queue = state.queue_since_s is not None and seen.now_s - state.queue_since_s >= config.gains.persist_s
    point = state.point
    served = telemetry.throughput_tokens_per_s
    pid, need = correct(
        state.pid,
        _error(state, seen, config) if queue else None,
        seen.now_s,
        dt_s,
        config.gains,
        at_most=here == len(raw.cap_w) - 1,
        at_least=here == 0,
        spare=telemetry.waiting == 0 and point is not None and telemetry.running < config.spare * point.batch_limit,
    )
    on = corrected(raw, need * (1.0 + config.margin), itl.factor, ttft.factor * seen.largest_prompt)

    makes = now(on.capacity_tokens_per_s) if busy else 0.0
    promised = now(raw.capacity_tokens_per_s) / need if busy else 0.0
    # What runs tells of a rise before a mean over seconds does; by Little's law it does so whatever the model's bias.
    arriving = max(served, makes)
    # More come in than the batch has yet made anything of: their prompts are still being computed, at a cap for fewer.
    before = state.rush_tokens_per_s
    rising = before is not None and telemetry.running >= config.crowd and arriving > config.leap * before
    rose_s = seen.now_s if rising else state.rose_s
    lag_s = config.demand_s if rose_s is None or seen.now_s - rose_s >= config.demand_s else config.rush_s
    rush = _toward(state.rush_tokens_per_s, arriving, dt_s, config.rush_s)
    steady = _toward(state.demand_tokens_per_s, arriving, dt_s, lag_s)
    made = _toward(state.made_tokens_per_s, makes, dt_s, lag_s)
    if busy and rush > config.leap * steady:
        steady = made = rush
    # Between sparse requests the cap waits for the next prompt; in a longer silence it does not.
    if not busy and telemetry.waiting == 0 and steady < config.silent_tokens_per_s:
        steady = rush = 0.0
    state = replace(
        state,
        ttft=ttft,
        itl=itl,
        pid=pid,
        need=need,
        demand_tokens_per_s=steady,
        rush_tokens_per_s=rush,
        made_tokens_per_s=made,
        rose_s=rose_s,
        promised_tokens_per_s=_toward(state.promised_tokens_per_s, promised, dt_s, config.rush_s),
    )
    pressed = point is not None and telemetry.running >= config.pressed * point.batch_limit
    demand = max(steady, rush) if queue or pressed else steady
    if queue or (telemetry.waiting > 0 and not busy):
        demand = demand_with_queue_tokens_per_s(demand, telemetry, on)
    if rising:
        together = telemetry.running + telemetry.waiting
        demand = max(demand, float(np.interp(together, batch, on.capacity_tokens_per_s[-1])))
    target = seen.target.throughput_tokens_per_s
    return state, on, demand, demand if target is None else min(demand, target)


def demand_with_queue_tokens_per_s(demand: float, seen: ReplicaTelemetry, on: Surface) -> float:
    """What a replica is to serve now, tokens/s: its demand, and more where requests wait or soon may.

    Those who wait are to be let in within the time that those who run, half done on average, have still to go; and
    never faster than the engine could make of all of them. A short queue so asks for a little more than arrives, not
    for all that a full batch makes, which others would have to do without. What runs varies as a Poisson number does:
    those who would be one deviation above the batch limit count as waiting already.
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


def _error(state: ControllerState, seen: Situation, config: ControllerConfig) -> float | None:
    """1 - served / what was to be served, while requests wait: the target, or what the model promised if that is less.

    Above a target is too much; above what the model promised is only a pleasant surprise (None).
    """
    promised = state.promised_tokens_per_s or 0.0
    target = seen.target.throughput_tokens_per_s
    aim = promised if target is None else min(promised, target)
    if aim <= 0:
        return None
    error = 1.0 - seen.telemetry.throughput_tokens_per_s / aim
    targeted = target is not None and aim >= target * (1.0 - config.gains.dead_band)
    return error if error > 0 or targeted else None


def _toward(before: float | None, value: float, dt_s: float, time_constant_s: float) -> float:
    return value if before is None else before + (value - before) * (1.0 - float(np.exp(-dt_s / time_constant_s)))
