"""The replica's operating point: chosen inside the grant on every beat, with its reason.

Pure: the agent keeps the state and passes in its own monotonic clock. `decide` is told the highest cap that the lease
allows (`control.ledger.lease.ceiling_w`) and what telemetry says. A grant that comes between two beats is obeyed by
calling it again at once, for a ceiling below the present cap is always obeyed in the same decision.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pals_ray.control.replica.batch_choice import EPS, graph_sizes, limit_under_kv_pressure, paced_limit, snap
from pals_ray.control.replica.candidates import candidates, cap_axis_w
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Decision, Situation
from pals_ray.control.replica.demand_feedback import apply_feedback
from pals_ray.control.replica.hysteresis import next_cap, with_hysteresis
from pals_ray.control.replica.latency_feedback import with_reachable
from pals_ray.control.replica.prediction import predict_at
from pals_ray.types import Expected, OperatingPoint

DEFAULTS = ControllerConfig()


def decide(state: ControllerState, seen: Situation, config: ControllerConfig = DEFAULTS) -> Decision:
    """Choose the operating point: a cap in [lowest limit, ceiling], and a graph size up to the start value as the batch
    limit. A ceiling below the present cap is obeyed at once."""
    state, dt_s = _advanced(state, seen, config)
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

    terms = seen.terms
    axis = cap_axis_w(terms.min_limit_w, seen.ceiling_w, terms.max_limit_w, present_w)
    here = int(np.searchsorted(axis, min(max(present_w, axis[0]), seen.ceiling_w)))
    raw = predict_at(seen.model, axis, np.array(graph_sizes(seen.max_batch), dtype=np.float64))
    state, on, demand, wanted = apply_feedback(state, seen, config, raw, here, dt_s)
    found = candidates(on, demand, wanted, state, seen, config)
    best = with_hysteresis(found, here, found.best(), wanted * (1.0 + config.hysteresis))
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
        demand_tokens_per_s=demand,
        wanted_tokens_per_s=wanted,
        capacity_tokens_per_s=float(found.capacity_tokens_per_s[chosen]),
        served_share=float(found.score[chosen]),
        running=float(found.running[chosen]),
        node_w=terms.overhead.charge_w(float(found.power_w[chosen]), terms.num_gpus, terms.node_gpus),
        itl_p99_s=float(found.itl_p99_s[chosen]),
        ttft_p99_s=float(found.ttft_p99_s[chosen]),
    )
    point = OperatingPoint(float(axis[chosen]), snap(limit, seen.max_batch))
    state = replace(
        state,
        itl=with_reachable(state.itl, seen.target.itl_p99_s, float(found.itl_p99_s[-1])),
        ttft=with_reachable(state.ttft, seen.target.ttft_p99_s, float(found.ttft_p99_s[-1])),
    )
    return _decided(state, seen, point, _reason(seen, point, expected, why), expected)


def _advanced(state: ControllerState, seen: Situation, config: ControllerConfig) -> tuple[ControllerState, float]:
    """The state at this instant, and the time step, s. After a clock went back all waiting times begin anew."""
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
            jumped_s=None,
            last_s=now_s,
        )
    dt_s = min(now_s - state.last_s, config.most_step_s)
    since_s = (state.queue_since_s if state.queue_since_s is not None else now_s) if seen.telemetry.waiting else None
    return replace(state, last_s=now_s, queue_since_s=since_s), dt_s


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
    limited = seen.target.itl_p99_s is not None or seen.target.ttft_p99_s is not None
    within = "within the limits" if limited else "as fast as at full load"
    short = "" if expected.served_share >= 1.0 - EPS else f" ({expected.served_share:.0%} of it {within})"
    ceiling = ", the ceiling" if point.cap_w >= seen.ceiling_w else ""
    return (
        f"{cap}{ceiling}, batch {point.batch_limit}: {expected.wanted_tokens_per_s:.4g} tokens/s wanted{short} with "
        f"about {expected.running:.0f} running, {expected.node_w:.0f} W at the node; {why}"
    )
