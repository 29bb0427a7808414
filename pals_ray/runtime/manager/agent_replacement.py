"""Finds out about silent agents and nodes: each replica of a living node gets another agent where its own is gone.

Its GPUs keep cap and charge meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from pals_ray.control.manager.silent_agents import hangs
from pals_ray.runtime.manager.node_liveness import Standing, standing
from pals_ray.runtime.messages import AgentSpec

PING_TIMEOUT_S = 2.0

log = logging.getLogger("pals.manager")


class AgentReplacer:
    """Replaces agents, whose actors are in `handles`, by what `ensure_agent` makes.

    `node_lost` hears of each node that is cut off, `node_gone` of each that is gone for good.
    """

    def __init__(
        self,
        handles: Mapping[str, Any],
        ensure_agent: Callable[[AgentSpec], Awaitable[Any]],
        node_lost: Callable[[str], None],
        node_gone: Callable[[str], None],
    ) -> None:
        self._handles = handles
        self._ensure_agent = ensure_agent
        self._node_lost = node_lost
        self._node_gone = node_gone
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[str, asyncio.Task[Standing]] = {}
        self._cut_off_s: dict[str, float] = {}

    def find_agent(self, spec: AgentSpec, heard_s: float) -> None:
        """See to an agent that was last heard at `heard_s`; waits for nothing."""
        self._begin(spec.replica_id, self._replace, spec, heard_s)

    def find_node(self, node_id: str) -> None:
        """See to a node that no agent speaks for; waits for nothing."""
        self._begin(node_id, self._node_lives, node_id)

    def _begin(self, name: str, act: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        if name not in self._under_way:
            self._under_way[name] = asyncio.create_task(self._to_the_end(name, act(*args)))

    async def _to_the_end(self, name: str, act: Coroutine[Any, Any, Any]) -> None:
        try:
            await act
        except Exception:
            log.exception("%s: could not be seen to yet", name)
        finally:
            del self._under_way[name]

    async def _replace(self, spec: AgentSpec, heard_s: float) -> None:
        replica_id, handle = spec.replica_id, self._handles.get(spec.replica_id)
        if not await self._node_lives(spec.node_id):
            return
        if handle is not None and not await _is_dead(handle):
            now_s = time.monotonic()
            if not hangs(now_s, heard_s, self._cut_off_s.get(spec.node_id)):
                return
            log.warning("%s: its agent lives, but has been silent for %.0f s: ending it", replica_id, now_s - heard_s)
            await asyncio.to_thread(ray.kill, handle)
        log.warning("%s: its agent is gone, making another", replica_id)
        await self._ensure_agent(spec)

    async def _node_lives(self, node_id: str) -> bool:
        """Whether a node can be reached; where not, the ledger hears of it. All who ask at once share one answer."""
        if node_id not in self._asked:
            self._asked[node_id] = task = asyncio.create_task(asyncio.to_thread(standing, node_id))
            task.add_done_callback(lambda _: self._asked.pop(node_id))
        found = await self._asked[node_id]
        if found is Standing.CUT_OFF:
            self._cut_off_s[node_id] = time.monotonic()
            self._node_lost(node_id)
        elif found is Standing.GONE:
            self._cut_off_s.pop(node_id, None)
            self._node_gone(node_id)
        return found is Standing.LIVES


async def _is_dead(handle: Any) -> bool:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await handle.ping.remote()
    except ActorDiedError:
        return True
    except (TimeoutError, RayActorError):
        return False
    return False
