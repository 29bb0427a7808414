"""Agents that died or hang: each replica gets another; its GPUs keep cap and charge meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from pals_ray.runtime.actors import ensure_agent
from pals_ray.runtime.messages import AgentSpec
from pals_ray.runtime.roster import Roster

PING_TIMEOUT_S = 2.0
#: From here on an agent is asked whether it lives.
SILENT_S = 3.0
#: From here on one that lives is ended: it beats twice a second, and a driver call that hangs may never return.
HANGS_S = 20.0

log = logging.getLogger("pals.manager")


class AgentKeeper:
    """Replaces the agents of a roster; `node_lost` hears of a node that is dead or cut off."""

    def __init__(self, roster: Roster, node_lost: Callable[[str], None]) -> None:
        self._roster = roster
        self._node_lost = node_lost
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def look_after(self, now_s: float) -> None:
        """See to every member that has been silent for too long; waits for nothing."""
        for replica_id, member in list(self._roster.members.items()):
            silence_s = self._roster.silence_s(replica_id, now_s)
            if silence_s < SILENT_S or replica_id in self._under_way:
                continue
            self._under_way[replica_id] = asyncio.create_task(self._replace(replica_id, member.spec, silence_s))

    async def _replace(self, replica_id: str, spec: AgentSpec, silence_s: float) -> None:
        try:
            handle = self._roster.handles.get(replica_id)
            if not await asyncio.to_thread(_node_lives, spec.node_id):
                # Dead or cut off: its GPUs stay charged as last known until a new node shows them.
                self._node_lost(spec.node_id)
                return
            if handle is not None and not await _is_dead(handle):
                if silence_s < HANGS_S:
                    return
                log.warning("%s: its agent lives, but has been silent for %.0f s: ending it", replica_id, silence_s)
                await asyncio.to_thread(ray.kill, handle)
            log.warning("%s: its agent is gone, making another", replica_id)
            await ensure_agent(spec)
        except Exception:
            log.exception("%s: its agent could not be replaced yet", replica_id)
        finally:
            del self._under_way[replica_id]


def _node_lives(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


async def _is_dead(handle: Any) -> bool:
    try:
        async with asyncio.timeout(PING_TIMEOUT_S):
            await handle.ping.remote()
    except ActorDiedError:
        return True
    except (TimeoutError, RayActorError):
        return False
    return False
