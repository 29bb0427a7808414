"""Carries the ledger's orders to the agents, all at once, and their confirmations back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.exceptions import RayActorError

from pals_ray.control.messages import AgentReport, Commands, ParkOrder
from pals_ray.types import Grant

PUSH_TIMEOUT_S = 5.0

log = logging.getLogger("pals.manager")


class Courier:
    """Pushes orders to the actors in `handles`; `confirmed` hears what each then has in force.

    A push that is lost is repaired by the answer to the agent's next beat.
    """

    def __init__(self, handles: Mapping[str, Any], confirmed: Callable[[AgentReport], None]) -> None:
        self._handles = handles
        self._confirmed = confirmed
        self._under_way: set[asyncio.Task[None]] = set()

    def send(self, commands: Commands) -> None:
        """Cuts first, then raises, then parking: all under way when this returns, whatever the caller does next."""
        for grant in (*commands.cuts, *commands.raises):
            self._push(grant.replica_id, "apply", grant)
        for order in commands.parks:
            self._push(order.executor, "park", order)

    def _push(self, replica_id: str, method: str, order: Grant | ParkOrder) -> None:
        handle = self._handles.get(replica_id)
        if handle is None:
            return
        answer = getattr(handle, method).remote(order)
        task = asyncio.create_task(self._hear(replica_id, method, answer))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _hear(self, replica_id: str, method: str, answer: Awaitable[AgentReport]) -> None:
        try:
            async with asyncio.timeout(PUSH_TIMEOUT_S):
                report = await answer
        except (RayActorError, TimeoutError) as error:
            log.warning("%s did not confirm %s: %s", replica_id, method, error)
            return
        self._confirmed(report)
