"""Agents that died or hang, and nodes that are cut off or gone: each replica of a living node gets another agent, and
its GPUs keep cap and charge meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from pals_ray.runtime.actors import ensure_agent
from pals_ray.runtime.manager.node_liveness import Standing, standing
from pals_ray.runtime.manager.roster import Roster
from pals_ray.runtime.messages import AgentSpec

PING_TIMEOUT_S = 2.0
#: From here on an agent is asked whether it lives.
SILENT_S = 3.0
#: From here on one that lives is ended: it beats twice a second, and a driver call that hangs may never return. Where
#: its node was cut off it has as long again as that lasted: TCP waits up to twice as long before it tries again.
HANGS_S = 20.0

log = logging.getLogger("pals.manager")


class AgentReplacer:
    """Replaces the agents of a roster; `node_lost` hears of each node that is cut off, `node_gone` of each that is gone
    for good."""

    def __init__(self, roster: Roster, node_lost: Callable[[str], None], node_gone: Callable[[str], None]) -> None:
        self._roster = roster
        self._node_lost = node_lost
        self._node_gone = node_gone
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[str, asyncio.Task[Standing]] = {}
        self._cut_off_s: dict[str, float] = {}

    def look_after(self, now_s: float, nodes: Iterable[str]) -> None:
        """See to every member that has been silent for too long, and to every one of the ledger's nodes that has no
        member to speak for it; waits for nothing."""
        members = dict(self._roster.members)
        for replica_id, member in members.items():
            silence_s = self._roster.silence_s(replica_id, now_s)
            if silence_s >= SILENT_S:
                self._begin(replica_id, self._replace, replica_id, member.spec, now_s - silence_s)
        for node_id in set(nodes) - {member.spec.node_id for member in members.values()}:
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

    async def _replace(self, replica_id: str, spec: AgentSpec, heard_s: float) -> None:
        handle = self._roster.handles.get(replica_id)
        if not await self._node_lives(spec.node_id):
            return
        if handle is not None and not await _is_dead(handle):
            now_s = time.monotonic()
            if not hangs(now_s, heard_s, self._cut_off_s.get(spec.node_id)):
                return
            log.warning("%s: its agent lives, but has been silent for %.0f s: ending it", replica_id, now_s - heard_s)
            await asyncio.to_thread(ray.kill, handle)
        log.warning("%s: its agent is gone, making another", replica_id)
        await ensure_agent(spec)

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


def hangs(now_s: float, heard_s: float, cut_off_s: float | None) -> bool:
    """Whether a living agent, last heard at `heard_s`, has been silent for too long; `cut_off_s` is when its node was
    last found cut off (None: never)."""
    reached_s = max(heard_s, cut_off_s) if cut_off_s is not None else heard_s
    return now_s - reached_s >= HANGS_S + (reached_s - heard_s)


async def _is_dead(handle: Any) -> bool:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await handle.ping.remote()
    except ActorDiedError:
        return True
    except (TimeoutError, RayActorError):
        return False
    return False
