"""When a new division of the budget replaces the present one."""

from __future__ import annotations

from collections.abc import Sequence

#: A new division has to gain more than this share of the present value.
LEAST_GAIN = 0.01


def adoption(
    forced: str | None,
    repairs: Sequence[str],
    present_value: Sequence[float],
    new_value: Sequence[float],
    frees: Sequence[str] = (),
) -> tuple[bool, str]:
    """Whether to adopt a new division, and why: it is forced, helps who falls short, frees replicas or gains over 1 %.

    `forced` says what forces it (None: nothing), `repairs` names the replicas that fall short and would get more.
    `frees` names replicas that their grants hold down and that would get more at no other replica's cost. What those
    could serve shows only afterwards, because clients that wait for their answers ask for no more than they are served.
    Values are per priority class, first class first; the first that differs by more than 1 % decides.
    """
    if forced is not None:
        return True, forced
    if repairs:
        return True, f"more for {', '.join(repairs)}, which fall short"
    if frees:
        return True, f"more for {', '.join(frees)}, held by their grants, out of watts that nobody uses"
    gain = 0.0
    for present, new in zip(present_value, new_value, strict=True):
        gain = (new - present) / max(abs(present), 1e-9)
        if abs(gain) > LEAST_GAIN:
            break
    if gain > LEAST_GAIN:
        return True, f"gains {gain:.1%}"
    return False, f"kept: a new division would gain {max(gain, 0.0):.1%}, under {LEAST_GAIN:.0%}"
