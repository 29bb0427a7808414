"""Which replica of a model a request goes to."""

from __future__ import annotations

import random

from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.setting import SimulationError


class Router:
    """Of two replicas drawn at random the one with fewer requests outstanding, as Ray Serve's default router does."""

    def __init__(self, model: str, engines: list[Engine], rng: random.Random) -> None:
        self._model = model
        self._engines = engines
        self._rng = rng

    def route(self, request: int, now_s: float) -> None:
        """Hand a request to an engine. Raises `SimulationError` where all are gone."""
        self._choose(now_s).submit(request, now_s)

    def lose(self, engine: Engine, now_s: float) -> None:
        """An engine's node is gone: its requests go to the others."""
        self._engines.remove(engine)
        for request in engine.die(now_s):
            self.route(request, now_s)

    def _choose(self, now_s: float) -> Engine:
        engines = self._engines
        n = len(engines)
        if n == 1:
            return engines[0]
        if n == 0:
            raise SimulationError(f"no replica of {self._model} is left to serve a request at {now_s:.1f} s")
        i = int(self._rng.random() * n)
        j = int(self._rng.random() * (n - 1))
        first, second = engines[i], engines[j + 1 if j >= i else j]
        if first.quiet_until_s <= now_s:
            first.advance(now_s)
        if second.quiet_until_s <= now_s:
            second.advance(now_s)
        return first if first.outstanding <= second.outstanding else second
