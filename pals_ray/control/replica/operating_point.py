"""The replica's operating point: chosen inside the grant on every beat, with its reason.

Pure: the agent keeps the state and passes in its own monotonic clock. `decide` is told the highest cap that the lease
allows (`control.ledger.lease.ceiling_w`) and what telemetry says. A grant that comes between two beats is obeyed by
calling it again at once, for a ceiling below the present cap is always obeyed in the same decision.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals_ray.control.replica.attainment import QueueingModel, tpot_p99_s
from pals_ray.control.replica.batch_choice import EPS, batch_axis, limit_under_kv_pressure, paced_limit, snap
from pals_ray.control.replica.candidates import candidates, cap_axis_w, wanted_tokens_per_s
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Decision, Situation
from pals_ray.control.replica.demand import RATE_LAG_S, toward
from pals_ray.control.replica.hysteresis import firm_cut, next_cap
from pals_ray.control.replica.latency_feedback import LatencyFeedback
from pals_ray.control.replica.prediction import Surface, predict_at
from pals_ray.control.replica.throughput_feedback import with_throughput
from pals_ray.models.power_model import FloatArray
from pals_ray.types import Expected, OperatingPoint

DEFAULTS = ControllerConfig()


def decide(state: ControllerState, seen: Situation, config: ControllerConfig = DEFAULTS) -> Decision:
    """Choose the operating point: a cap in [lowest limit, ceiling], and a graph size up to the start value as the batch
    limit. A ceiling below the present cap is obeyed at once."""
    state = _learnt(state, seen, config)
    present_w = seen.ceiling_w if state.point is None else state.point.cap_w
    if seen.in_force_w is not None:
        present_w = min(present_w, seen.in_force_w)
    cut = present_w > seen.ceiling_w + EPS
    if cut:
        state = replace(state, ceiling_cut_s=seen.now_s)
    state = limit_under_kv_pressure(state, seen, config)
    batch = state.point.batch_limit if state.point else seen.max_batch
    if seen.model is None:
        limit = seen.max_batch if seen.pin_batch_limit is None else seen.pin_batch_limit
        point = OperatingPoint(seen.ceiling_w, snap(min(limit, state.kv_limit or limit), seen.max_batch))
        return _decided(state, seen, point, "no model yet: as much as the grant allows", None)

    arrivals = state.demand.arrivals(seen.telemetry, state.slo.strain, state.latency.factors)
    if seen.alike is not None:
        arrivals = toward(arrivals, seen.alike)
    # Of the first requests the short ones end first, so at first both lengths and demand seem less than they are.
    if arrivals is None or (arrivals.per_s > 0.0 and state.demand.seen_s < RATE_LAG_S):
        limit = seen.max_batch if seen.pin_batch_limit is None else seen.pin_batch_limit
        point = OperatingPoint(seen.ceiling_w, snap(limit, seen.max_batch))
        return _decided(state, seen, point, "demand is not known yet: as much as the grant allows", None)
    terms = seen.terms
    axis = cap_axis_w(terms.min_limit_w, seen.ceiling_w, terms.max_limit_w, present_w)
    here = int(np.searchsorted(axis, min(max(present_w, axis[0]), seen.ceiling_w)))
    on = predict_at(seen.model, axis, batch_axis(seen.max_batch))
    state = with_throughput(state, seen, config, on, here)
    if state.demand.seen_s > RATE_LAG_S:
        state = _with_latency(state, seen, on, here)
    queue = QueueingModel.of(on, arrivals, seen.target.slo)
    found = candidates(queue, arrivals, state, seen, config)
    best = found.best()
    if best < here and found.score[best] >= 1.0 - EPS:
        more = arrivals.times(1.0 + config.hysteresis)
        best = firm_cut(candidates(queue, more, state, seen, config), here)
    if seen.pin_cap_w is not None:
        chosen, why = len(axis) - 1, "the grant pins the cap"
    elif cut:
        chosen, why = here, "the ceiling fell: cap first, at once"
    elif state.point is None:
        chosen, why = best, "first point"
    else:
        chosen, why = next_cap(state, seen, config, found, here, best)
    limit = int(found.batch_limit[max(chosen, best)])
    if state.point is not None and seen.pin_batch_limit is None:
        # When the ceiling falls the cap is cut first: that acts in milliseconds, while a batch drains over seconds.
        limit = batch if cut else paced_limit(state, seen, config, batch, limit)
    expected = Expected(
        demand_tokens_per_s=arrivals.tokens_per_s,
        wanted_tokens_per_s=wanted_tokens_per_s(arrivals.tokens_per_s, seen.target.throughput_tokens_per_s),
        capacity_tokens_per_s=float(found.capacity_tokens_per_s[chosen]),
        attainment=float(found.attainment[chosen]),
        running=float(found.running[chosen]),
        node_w=terms.overhead.charge_w(float(found.power_w[chosen]), terms.num_gpus, terms.node_gpus),
    )
    point = OperatingPoint(float(axis[chosen]), snap(limit, seen.max_batch))
    state = replace(state, servable=bool(found.score.max() >= 1.0 - EPS))
    return _decided(state, seen, point, _reason(seen, point, expected, why), expected)


def _with_latency(state: ControllerState, seen: Situation, on: Surface, here: int) -> ControllerState:
    """The state with what measured latencies say of the predicted ones at the cap in force and what runs."""
    telemetry, dt_s, before = seen.telemetry, state.step_s, state.latency
    tpot_s = on.batch / np.maximum(on.capacity_tokens_per_s, EPS)
    if telemetry.running == 0:
        return state

    def now(values: FloatArray) -> float:
        return float(np.interp(telemetry.running_mean, on.batch, values[here]))

    return replace(
        state,
        latency=LatencyFeedback(
            before.ttft_p50.after(telemetry.ttft.p50_s, now(on.ttft_p50_s), dt_s),
            before.ttft_p99.after(telemetry.ttft.p99_s, now(on.ttft_p99_s), dt_s),
            before.tpot_p99.after(telemetry.tpot.p99_s, now(tpot_p99_s(on, tpot_s, telemetry.output_tokens)), dt_s),
        ),
    )


def _learnt(state: ControllerState, seen: Situation, config: ControllerConfig) -> ControllerState:
    """The state at this instant, with what telemetry says. After a clock went back all waiting times begin anew."""
    now_s = seen.now_s
    if state.point is None or now_s < state.last_s:
        state = replace(
            state,
            cap_changed_s=now_s,
            batch_changed_s=now_s,
            kv_changed_s=now_s,
            queue_since_s=None,
            pid=replace(state.pid, beyond_since_s=None),
            ceiling_cut_s=None if state.ceiling_cut_s is None else now_s,
            last_s=now_s,
        )
    dt_s = min(now_s - state.last_s, config.most_step_s)
    since_s = (state.queue_since_s if state.queue_since_s is not None else now_s) if seen.telemetry.waiting else None
    demand = state.demand.after(seen.telemetry, dt_s)
    # Requests that came before demand was known were served at caps that nobody had chosen for them.
    verdicts = seen.telemetry.verdicts
    if demand.seen_s > RATE_LAG_S:
        slo = state.slo.after(verdicts, seen.target.slo, dt_s, servable=state.servable)
    else:
        slo = replace(state.slo, seen=verdicts)
    return replace(state, last_s=now_s, step_s=dt_s, queue_since_s=since_s, demand=demand, slo=slo)


def _decided(
    state: ControllerState, seen: Situation, point: OperatingPoint, reason: str, expected: Expected | None
) -> Decision:
    was = state.point
    state = replace(
        state,
        point=point,
        expected=expected,
        cap_changed_s=state.cap_changed_s if was and was.cap_w == point.cap_w else seen.now_s,
        batch_changed_s=state.batch_changed_s if was and was.batch_limit == point.batch_limit else seen.now_s,
    )
    return Decision(point, reason, state)


def _reason(seen: Situation, point: OperatingPoint, expected: Expected, why: str) -> str:
    """The reason as an operator reads it."""
    cap = "lowest cap" if point.cap_w <= seen.terms.min_limit_w else f"cap {point.cap_w:.0f} W"
    if expected.demand_tokens_per_s == 0.0:
        return f"{cap}, batch {point.batch_limit}: no demand; {why}"
    ceiling = ", the ceiling" if point.cap_w >= seen.ceiling_w else ""
    good = f" ({expected.attainment:.1%} good)" if seen.target.slo.judges else ""
    return (
        f"{cap}{ceiling}, batch {point.batch_limit}: {expected.wanted_tokens_per_s:.4g} tokens/s wanted{good} with "
        f"about {expected.running:.0f} running, {expected.node_w:.0f} W at the node; {why}"
    )
