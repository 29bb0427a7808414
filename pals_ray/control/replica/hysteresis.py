"""How a replica's cap moves to a better one: hysteresis, dwell and slew, and raises that would change nothing."""

from __future__ import annotations

import numpy as np

from pals_ray.control.replica.batch_choice import EPS
from pals_ray.control.replica.candidates import Candidates
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.demand import SILENT_PER_S


def firm_cut(firm: Candidates, here: int) -> int:
    """The best candidate below the present cap of those that would do for a little more demand; `here` without one.

    Otherwise noise would move the cap down and up again.
    """
    lower = np.flatnonzero(firm.score[:here] >= 1.0 - EPS)
    return int(lower[firm.joules_per_token[lower].argmin()]) if len(lower) else here


def next_cap(
    state: ControllerState, seen: Situation, config: ControllerConfig, found: Candidates, here: int, best: int
) -> tuple[int, str]:
    """The candidate to take next on the way from `here` to `best`, within dwell and slew, and why."""
    gain = 1.0 - found.score[here] / found.score[best]
    saving = 1.0 - found.joules_per_token[best] / found.joules_per_token[here]
    resting = best < here and state.demand.per_s < SILENT_PER_S
    if best == here or (gain < config.least_gain and saving < config.least_saving and not resting):
        return here, "stays: nothing to gain"
    since_s = seen.now_s - state.cap_changed_s
    span_w = seen.terms.max_limit_w - seen.terms.min_limit_w
    cap_w = found.cap_w
    if best < here:
        if since_s < config.cut_dwell_s:
            return here, f"{cap_w[best]:.0f} W would do, if still so in {config.cut_dwell_s - since_s:.1f} s"
        least_w = cap_w[here] - config.cut_slew_per_s * min(since_s, 2 * config.cut_dwell_s) * span_w
        return max(best, min(int(np.searchsorted(cap_w, least_w)), here - 1)), "fewer watts serve"
    drawn_w, natural_w = seen.telemetry.power_w, config.natural_share * float(cap_w[here]) * seen.terms.num_gpus
    binds = drawn_w >= natural_w or seen.telemetry.binding_share >= config.least_binding_share
    # A cap that seldom binds may still slow the prompts down that a TTFT depends on.
    if not binds and not seen.target.slo.judges:
        return here, "stays: the cap does not bind, more would change nothing"
    if _is_draining(state, seen, config):
        return here, "stays: the cap comes back once the batch has drained"
    if since_s < config.raise_dwell_s:
        return here, f"{cap_w[best]:.0f} W wanted, in {config.raise_dwell_s - since_s:.1f} s"
    most_w = cap_w[here] + config.raise_slew_per_s * min(since_s, 2 * config.raise_dwell_s) * span_w
    raised = min(best, max(int(np.searchsorted(cap_w, most_w, side="right")) - 1, here + 1))
    return raised, "more is wanted than this cap serves"


def _is_draining(state: ControllerState, seen: Situation, config: ControllerConfig) -> bool:
    """Whether, after a cut of the ceiling, more sequences still run than the batch limit allows."""
    if state.ceiling_cut_s is None or state.point is None or seen.now_s - state.ceiling_cut_s >= config.drain_s:
        return False
    return seen.telemetry.running > state.point.batch_limit
