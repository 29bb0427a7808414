"""The virtual clock: what is due when, and messages that take time."""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

from pals_ray.simulation.setting import Messages


class Events:
    """Calls due at times. Calls due at the same time are made in the order in which they were added."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0

    @property
    def next_s(self) -> float:
        """When the next call is due; inf where none is."""
        return self._due[0][0] if self._due else inf

    def at(self, time_s: float, call: Callable[[float], None]) -> None:
        """Have `call(time_s)` made at a time."""
        self._number += 1
        heappush(self._due, (time_s, self._number, call))

    def run_next(self) -> None:
        """Make the next call."""
        time_s, _, call = heappop(self._due)
        call(time_s)


class Network:
    """Delivers messages between manager and agents, late or never, as the setting says."""

    def __init__(self, events: Events, messages: Messages, rng: random.Random) -> None:
        self.events = events
        self._messages = messages
        self._rng = rng

    def send(self, now_s: float, receive: Callable[[float], None]) -> None:
        """Have `receive` called when the message arrives, if it does."""
        m = self._messages
        if m.lost and self._rng.random() < m.lost:
            return
        self.events.at(now_s + m.delay_s + m.jitter_s * self._rng.random(), receive)
