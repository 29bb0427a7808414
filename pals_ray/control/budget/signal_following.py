"""Following a signal: the draw wanted now, and the budget, under a hard ceiling, that makes the fleet draw it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pals_ray.control.budget.schedule import at_least

#: A fleet that leaves more than this share of its budget uncharged would not draw more under a larger budget.
UNUSED_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Following:
    """How to follow: the target is `base_w + range_w * y`, y in [-1, 1]; the budget never passes `ceiling_w`, W.

    `integral_s` is the time in which feedback makes up for a constant gap, `trim_limit` the largest correction as a
    share of the target. The caller gives y as the signal's mean over the last `smooth_s`: PJM compares draw with the
    signal of 10 s before, so a draw that follows at once would be ahead of it and lose precision, and the mean also
    moves the caps more gently.
    """

    base_w: float
    range_w: float
    ceiling_w: float
    integral_s: float = 5.0
    trim_limit: float = 0.25
    smooth_s: float = 8.0

    def target_w(self, y: float) -> float:
        """The draw that the signal asks for, W, before ceiling and lowest caps."""
        return self.base_w + self.range_w * y


@dataclass(frozen=True, slots=True)
class FollowState:
    """One step's outcome, and what the next one goes on from: the correction, the step's time (s, any clock), target
    and budget; W at node level. `warning` is set while the signal asks for what cannot be had."""

    trim_w: float = 0.0
    step_s: float | None = None
    target_w: float = 0.0
    budget_w: float = 0.0
    reason: str = ""
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class FleetWatts:
    """What the fleet needs at its lowest caps, its charge in force with the reserve, and its mean draw since the last
    call (None: not known), W at node level."""

    needed_w: float
    occupied_w: float
    drawn_w: float | None


def step(state: FollowState, following: Following, y: float, now_s: float, watts: FleetWatts) -> FollowState:
    """Move to the (smoothed) value `y` of the signal and correct the budget by what the fleet drew since the last step.

    Nothing is corrected where the draw is not known. The budget is at most the ceiling, and above it only where the
    watts needed are, with a warning.
    """
    needed_w, measured_w = watts.needed_w, watts.drawn_w
    asked_w = following.target_w(y)
    target_w, warning = asked_w, None
    if asked_w > following.ceiling_w:
        target_w = following.ceiling_w
        warning = f"the signal asks for {asked_w:.0f} W, over the ceiling of {target_w:g} W: held at that"
    if following.ceiling_w < needed_w:
        target_w, warning = at_least(following.ceiling_w, needed_w, "the ceiling of the followed signal")
    elif target_w < needed_w:
        target_w, warning = at_least(target_w, needed_w, "the signal")

    most_w, limit_w = max(following.ceiling_w, needed_w), following.trim_limit * target_w
    trim_w, held = state.trim_w, ", nothing measured yet"
    if state.step_s is not None and measured_w is not None and math.isfinite(measured_w):
        gap_w = state.target_w - measured_w
        # Anti-windup: the correction moves no further against a bound that the budget is at, nor up while the fleet
        # leaves watts unused.
        if gap_w > 0 and state.budget_w >= most_w:
            held = ", held: the budget is at its ceiling"
        elif gap_w > 0 and watts.occupied_w < (1.0 - UNUSED_SHARE) * state.budget_w:
            held = f", held: the fleet uses {watts.occupied_w:.0f} W and wants no more"
        elif gap_w < 0 and state.budget_w <= needed_w:
            held = ", held: every cap is at its lowest"
        else:
            # After a jump of the clock or a time without a manager, one whole correction is the most, never a negative.
            elapsed_s = min(max(now_s - state.step_s, 0.0), following.integral_s)
            trim_w = state.trim_w + gap_w * elapsed_s / following.integral_s
            held = f" after a draw of {measured_w:.0f} W against {state.target_w:.0f} W"
    note = f"correction {trim_w:+.0f} W{held}"
    trim_w = min(max(trim_w, -limit_w), limit_w)
    budget_w = min(max(target_w + trim_w, needed_w), most_w)
    reason = f"signal {y:+.2f}: target {target_w:.0f} W, budget {budget_w:.0f} W ({note})"
    if warning is not None:
        reason = f"{reason}; {warning}"
    return FollowState(trim_w, now_s, target_w, budget_w, reason, warning)
