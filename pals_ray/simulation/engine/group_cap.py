"""The cap that a group's clocks obey at an instant: settling after an order, and free for a moment at a load step."""

from __future__ import annotations

from math import inf

from pals_ray.models.physics.cap_settling import settled_cap_w

#: How finely a settling cap is followed, s: down it is there after 0.04, up after 0.6 (`settled_cap_w`).
_FALL_EVERY_S, _FALL_S = 0.01, 0.04
_RISE_EVERY_S, _RISE_S = 0.03, 0.6
#: A load step overshoots a cap for 20 to 84 ms (FACTS): the driver has yet to bring the clock down.
LOAD_STEP_S = 0.05


class GroupCap:
    """The cap of all GPUs of one replica, W each. Between two changes of `effective_w` lies `next_s`."""

    def __init__(self, ordered_w: float, max_limit_w: float) -> None:
        self.ordered_w = ordered_w
        self.effective_w = ordered_w
        self.next_s = inf
        self._max_limit_w = max_limit_w
        self._before_w = ordered_w
        self._changed_s = -inf
        self._free_until_s = -inf

    def order(self, cap_w: float, now_s: float) -> None:
        """A new limit is in force; what the clocks obey settles there."""
        self._before_w = settled_cap_w(self._before_w, self.ordered_w, now_s - self._changed_s)
        self.ordered_w, self._changed_s = cap_w, now_s
        self.look(now_s)

    def load_step(self, now_s: float) -> None:
        """Work begins on idle GPUs."""
        self._free_until_s = now_s + LOAD_STEP_S
        self.look(now_s)

    def arrive(self) -> None:
        """Take the order as settled: it rises and does not bind, so that nobody could tell."""
        self._before_w = self.effective_w = self.ordered_w
        self.next_s = inf

    def look(self, now_s: float) -> None:
        """Bring `effective_w` and `next_s` up to date: the cap half-way to the next look stands for all until then."""
        if now_s < self._free_until_s:
            self.effective_w, self.next_s = self._max_limit_w, self._free_until_s
            return
        since_s = now_s - self._changed_s
        every_s, whole_s = (_FALL_EVERY_S, _FALL_S) if self.ordered_w <= self._before_w else (_RISE_EVERY_S, _RISE_S)
        if since_s >= whole_s - 1e-9:
            self.effective_w, self.next_s = self.ordered_w, inf
            return
        self.effective_w = settled_cap_w(self._before_w, self.ordered_w, since_s + every_s / 2)
        self.next_s = now_s + min(every_s, whole_s - since_s)
