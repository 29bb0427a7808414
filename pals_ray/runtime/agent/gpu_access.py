"""Reads and caps an agent's GPUs in threads, since a driver call may take tens of ms."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from pals_ray.control.messages import NodeGpu
from pals_ray.gpus.base import Gpu, GpuDriver, GpuError, GpuLostError, GpuUnsupportedError
from pals_ray.types import GpuState

T = TypeVar("T")
_Kind = Literal["read", "set"]

#: Limits nearer than this are the same: drivers may round, W.
SAME_LIMIT_W = 0.5

log = logging.getLogger("pals.agent")


@dataclass(frozen=True, slots=True)
class Sample:
    """One GPU's reading, and whether its cap held the clocks down at that instant."""

    state: GpuState
    binding: bool


class DrawMeter:
    """Mean draw of each GPU from one look to the next, W, by its energy counter: an instant says little of a draw that
    differs from step to step."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def look(self, states: Mapping[str, GpuState], now_s: float) -> dict[str, float]:
        """The draw since the last look at time `now_s`, s, of any clock that only goes forward; at the first the
        instantaneous one, and after a counter began anew."""
        drawn_w = {}
        for uuid, state in states.items():
            last_s, last_j = self._last.get(uuid, (now_s, state.energy_j))
            known = now_s > last_s and state.energy_j >= last_j
            drawn_w[uuid] = (state.energy_j - last_j) / (now_s - last_s) if known else state.power_w
            self._last[uuid] = (now_s, state.energy_j)
        return drawn_w


class GpuAccess:
    """The GPUs of a node, called concurrently. A GPU that fails is left out of an answer, and its error kept."""

    def __init__(self, driver: GpuDriver) -> None:
        self._driver = driver
        self._pool = ThreadPoolExecutor(max_workers=16, thread_name_prefix="gpu")
        self._failed: dict[tuple[str, _Kind], str] = {}
        self._short: str | None = None

    @property
    def errors(self) -> dict[str, str]:
        """What went wrong with each GPU when it was last read or set."""
        return {uuid: error for (uuid, _), error in self._failed.items()}

    @property
    def held_by(self) -> str | None:
        """The GPU that keeps its group below the cap ordered last, if any."""
        return self._short

    def close(self) -> None:
        """Wait for calls under way and let go of the driver."""
        self._pool.shutdown()
        self._driver.close()

    async def inventory(self) -> list[NodeGpu]:
        """Every GPU of the node that answers and has a power limit of its own (a slice of one has none)."""
        gpus = await self._in_thread(self._driver.gpus)
        found = await asyncio.gather(*(self._in_thread(_describe, gpu) for gpu in gpus))
        return [gpu for gpu in found if gpu is not None]

    def look(self, uuid: str) -> tuple[float, bool]:
        """The limit last ordered, W, and whether we may set it: tried by ordering it anew, so not while others do."""
        gpu = self._driver.gpu(uuid)
        return gpu.ordered_limit_w(), gpu.may_set_limit()

    async def sample(self, uuids: Iterable[str]) -> dict[str, Sample]:
        """Limit in force, draw, energy and whether the cap binds, of each GPU that answers."""
        return await self._each(uuids, lambda gpu: Sample(gpu.state(), gpu.cap_binding()), "read")

    async def limits_w(self, uuids: Iterable[str]) -> dict[str, float]:
        """Limit in force of each GPU that answers, W."""
        return await self._each(uuids, lambda gpu: gpu.limit_w(), "read")

    async def set_each(self, limits_w: Mapping[str, float]) -> dict[str, float]:
        """Order each GPU its own limit, W, twice where the first call fails. Returns the limits then in force."""

        def order(gpu: Gpu) -> float:
            limit_w = limits_w[gpu.uuid]
            try:
                return gpu.set_limit_w(limit_w)
            except GpuError:
                return gpu.set_limit_w(limit_w)

        done = await self._each(limits_w, order, "set")
        return done | await self.limits_w(limits_w.keys() - done.keys())

    async def set_group(self, limits_w: Mapping[str, float], cap_w: float) -> dict[str, float]:
        """Bring a group from the limits in force to one cap, W. Returns the limits then in force.

        What must come down comes down first, all at once. Going up, one GPU goes first (the lowest; among equals the
        one that fell short the last time) and the others follow as far as it got: one that cannot rise (a failed
        call, an out-of-band limit) holds the group, instead of leaving the others above it.
        """
        now_w = dict(limits_w)
        now_w |= await self.set_each({u: cap_w for u, w in now_w.items() if w > cap_w + SAME_LIMIT_W})
        if not now_w or min(now_w.values()) >= cap_w - SAME_LIMIT_W:
            self._short = None
            for uuid in (uuid for uuid, w in now_w.items() if w <= cap_w + SAME_LIMIT_W):
                self._failed.pop((uuid, "set"), None)
            return now_w
        first = min(now_w, key=lambda uuid: (now_w[uuid], uuid != self._short))
        now_w |= await self.set_each({first: cap_w})
        reached_w = min(cap_w, now_w[first])
        now_w |= await self.set_each({u: reached_w for u, w in now_w.items() if abs(w - reached_w) > SAME_LIMIT_W})
        least = min(now_w, key=lambda uuid: (now_w[uuid], uuid != first))
        self._short = least if now_w[least] < cap_w - SAME_LIMIT_W else None
        least_w = now_w[least]
        return now_w | await self.set_each({u: least_w for u, w in now_w.items() if w > least_w + SAME_LIMIT_W})

    async def _each(self, uuids: Iterable[str], call: Callable[[Gpu], T], kind: _Kind) -> dict[str, T]:
        async def one(uuid: str) -> tuple[str, T] | None:
            try:
                value = await self._in_thread(lambda: call(self._driver.gpu(uuid)))
            except GpuError as error:
                self._failed[uuid, kind] = str(error)
                return None
            self._failed.pop((uuid, kind), None)
            return uuid, value

        found = await _to_the_end(asyncio.gather(*map(one, uuids)))
        return dict(pair for pair in found if pair is not None)

    def _in_thread(self, call: Callable[..., T], *args: object) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, call, *args)


async def _to_the_end(calls: asyncio.Future[T]) -> T:
    """Wait for driver calls even where the caller is cancelled: a thread cannot be, and nobody may read a limit, or set
    another, while an order is still under way."""
    try:
        return await asyncio.shield(calls)
    except asyncio.CancelledError:
        await asyncio.wait([calls])
        raise


def _describe(gpu: Gpu) -> NodeGpu | None:
    try:
        info, state = gpu.info, gpu.state()
        return NodeGpu(info, state.limit_w, state.floor_w, False, tuple(gpu.process_ids()))
    except (GpuUnsupportedError, GpuLostError) as error:
        log.warning("%s is left out: %s", gpu.uuid, error)
        return None
