"""How fast a newly ordered power cap takes effect on a GPU, as measured on a V100-SXM2."""

from __future__ import annotations

from bisect import bisect_right

#: GridPilot E2 (arXiv 2605.26384), the step of cap at t = 20.0 s from 200 to 280 W on a V100-SXM2: share of the rise in
#: draw done, against s since the order. The driver lifts the clock in two jumps.
_RISE_S = (0.105, 0.140, 0.210, 0.277, 0.300, 0.330, 0.450, 0.600)
_RISE_SHARE = (0.0, 0.46, 0.56, 0.60, 0.77, 0.90, 0.95, 1.0)
#: The same file's step down near t = 10 s, from 280 to 200 W: the clock falls at once, the draw follows in 30 to 50 ms.
_FALL_S = 0.04


def settled_cap_w(before_w: float, ordered_w: float, since_s: float) -> float:
    """The cap in effect `since_s` seconds after `ordered_w` was ordered while `before_w` was in effect, W.

    Down is fast (30 ms), up is slow (starts after 0.1 s, nearly there after 0.33 s); fitted to GridPilot's E2.
    """
    if since_s <= 0.0:
        return before_w
    share = min(since_s / _FALL_S, 1.0) if ordered_w <= before_w else _rise_share(since_s)
    return before_w + (ordered_w - before_w) * share


def _rise_share(since_s: float) -> float:
    i = bisect_right(_RISE_S, since_s)
    if i in (0, len(_RISE_S)):
        return float(i > 0)
    along = (since_s - _RISE_S[i - 1]) / (_RISE_S[i] - _RISE_S[i - 1])
    return _RISE_SHARE[i - 1] + along * (_RISE_SHARE[i] - _RISE_SHARE[i - 1])
