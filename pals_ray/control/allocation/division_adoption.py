"""When a new division of the budget replaces the present one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: A new division has to gain more than this share of the present value.
LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Adoption:
    """Whether to adopt, and why, for an operator to read."""

    adopt: bool
    reason: str


def adoption(
    forced: str | None,
    repairs: Sequence[str],
    present_value: Sequence[float],
    new_value: Sequence[float],
    frees: Sequence[str] = (),
) -> Adoption:
    """Adopt only what is forced, repairs a violation, frees or gains more than 1 %; ties keep the present division.

    `forced` says what forces it (None: nothing), `repairs` names the replicas that are in violation and would get
    more, `frees` those that their grants hold down and that would get more, at nobody's cost: how much they could do
    shows only then, for clients that wait for their answers ask no more than they are served. Values are per priority
    class, first class first: the first that differs by more than 1 % decides.
    """
    if forced is not None:
        return Adoption(True, forced)
    if repairs:
        return Adoption(True, f"more for {', '.join(repairs)}, in violation")
    if frees:
        return Adoption(True, f"more for {', '.join(frees)}, held by their grants, out of watts that nobody uses")
    gain = 0.0
    for present, new in zip(present_value, new_value, strict=True):
        gain = (new - present) / max(abs(present), 1e-9)
        if abs(gain) > LEAST_GAIN:
            break
    if gain > LEAST_GAIN:
        return Adoption(True, f"gains {gain:.1%}")
    return Adoption(False, f"kept: a new division would gain {max(gain, 0.0):.1%}, under {LEAST_GAIN:.0%}")
