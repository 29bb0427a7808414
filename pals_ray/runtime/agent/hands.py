"""An agent's obedience: grants under their lease, parking orders, and what it brings about on its replica's GPUs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from pals_ray.control.ledger.charge import ChargeTerms
from pals_ray.control.ledger.lease import LeaseState, Outcome, accept, ceiling_w, fence, tick
from pals_ray.control.messages import AgentReport, ParkOrder
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import TelemetryWindow
from pals_ray.engine.control_block import ControlBlock
from pals_ray.runtime.agent.devices import Devices
from pals_ray.runtime.messages import Answer, NodeGpu
from pals_ray.types import Grant, OperatingPoint

log = logging.getLogger("pals.agent")


class Hands:
    """Holds one replica's GPUs at the point that its pilot chooses inside its grant; does one thing at a time.

    `gpus` and `max_batch` are the replica's own once it has claimed them, `block` is its control block.
    """

    def __init__(self, replica_id: str, devices: Devices, pilot: ReplicaController, window: TelemetryWindow) -> None:
        self._replica_id = replica_id
        self._devices = devices
        self._pilot = pilot
        self._window = window
        self._busy = asyncio.Lock()
        self._lease = LeaseState()
        self._fail_safe_w: float | None = None
        self._park: ParkOrder | None = None
        self._number = 0
        self._letting_go = False
        self.managed: dict[str, NodeGpu] = {}
        self.gpus: tuple[str, ...] = ()
        self.max_batch = 0
        self.block: ControlBlock | None = None
        self.terms: ChargeTerms | None = None
        self.session = 0
        self.limits_w: dict[str, float] = {}
        self.parked_w: dict[str, float] = {}
        self.batch_limit: int | None = None
        self.reason = "starting"

    @property
    def fence_epoch(self) -> int:
        """The epoch below which no manager is obeyed."""
        return self._lease.fence_epoch

    async def take_hold(self, gpus: Sequence[str], max_batch: int, block: ControlBlock) -> None:
        """These GPUs are the replica's from now on."""
        async with self._busy:
            self.gpus, self.max_batch, self.block = tuple(gpus), max_batch, block
            self.limits_w = await self._devices.limits_w(gpus)

    async def ceiling_now_w(self) -> float:
        """The cap that the present grant lets its GPUs go up to, W, with the limits read anew; 0 without a grant."""
        async with self._busy:
            if self.gpus:
                self.limits_w = await self._devices.limits_w(self.gpus)
            ceiling = ceiling_w(self._lease, self.terms)[0] if self.terms else None
            return ceiling or 0.0

    # -- obeying ---------------------------------------------------------------------------------------------------

    def begin_session(self) -> None:
        """A hello goes out: reports are counted from one again."""
        self._number = 0

    async def obey(self, answer: Answer) -> None:
        """Do what the manager's answer says, unless it comes from an older manager."""
        reply = answer.reply
        if reply.epoch < self._lease.fence_epoch:
            return
        self._lease = fence(self._lease, reply.epoch)
        self.session = reply.session
        if not reply.session:
            return
        self._fail_safe_w = answer.fail_safe_w
        self._pilot.target, self._pilot.serving = answer.target, answer.serving
        self._window.recent_s = self._pilot.recent_s
        self.terms = reply.terms
        if reply.park is None:
            self._park, self.parked_w = None, {}
        else:
            await self.take_park(reply.park)
        if reply.grant is not None:
            await self.take_grant(reply.grant)

    async def take_grant(self, grant: Grant) -> None:
        """Obey a grant if it is newer than any before: a cut acts at once."""
        self._lease, outcome, reason = accept(self._lease, grant, time.monotonic())
        if outcome is Outcome.OBEY:
            await self.hold_point()
        elif outcome is Outcome.IGNORE:
            log.info("%s: grant ignored: %s", self._replica_id, reason)

    async def take_park(self, order: ParkOrder) -> None:
        """Bring free GPUs of the node down to the limits ordered."""
        async with self._busy:
            if self._park is not None and (order.epoch, order.seq) < (self._park.epoch, self._park.seq):
                return
            self._park = order
            now_w = await self._devices.limits_w(order.limits_w)
            lower = {u: order.limits_w[u] for u, w in now_w.items() if w > order.limits_w[u] and self._may_set(u)}
            self.parked_w = now_w | await self._devices.set_each(lower)

    # -- the point -------------------------------------------------------------------------------------------------

    async def hold_point(self) -> None:
        """Bring caps and batch limit to the best point that grant and lease allow now."""
        async with self._busy:
            if self._letting_go or self.terms is None or not self.gpus:
                return
            self.limits_w = await self._devices.limits_w(self.gpus)
            fail_safe_w = self._fail_safe_w or self.terms.min_limit_w
            in_force_w = min(self.limits_w.values(), default=self.terms.min_limit_w)
            self._lease, word = tick(self._lease, time.monotonic(), in_force_w=in_force_w, fail_safe_w=fail_safe_w)
            most_w, self.reason = ceiling_w(self._lease, self.terms)
            if most_w is None or self._lease.grant is None:
                return
            unread = set(self.gpus) - self.limits_w.keys()
            if unread:  # they may be anywhere: none of the others rises
                most_w = min(most_w, in_force_w)
            may_cap = all(map(self._may_set, self.gpus))
            point, self.reason = self._choose(most_w, in_force_w, self.terms, self._lease.grant, may_cap)
            if self._lease.expired:
                self.reason = f"{word}; {self.reason}"
            if unread:
                self.reason += f"; held at {most_w:g} W: {', '.join(sorted(unread))} cannot be read"
            if may_cap:
                await self._set_caps(min(point.cap_w, most_w))
            self.batch_limit = point.batch_limit
            if self.block is not None:
                self.block.order_batch_limit(point.batch_limit)
                self.block.park(self._lease.grant.parked)

    def _choose(
        self, most_w: float, in_force_w: float, terms: ChargeTerms, grant: Grant, may_cap: bool
    ) -> tuple[OperatingPoint, str]:
        now_s, seen = time.monotonic(), self._window.summary()
        try:
            return self._pilot.choose(now_s, most_w, in_force_w, terms, self.max_batch, grant, seen, may_cap=may_cap)
        except Exception as error:  # the budget holds whatever a model answers: down with the ceiling, never up
            log.exception("%s: its point could not be chosen", self._replica_id)
            return OperatingPoint(min(in_force_w, most_w), self.max_batch), f"no point could be chosen: {error}"

    async def _set_caps(self, cap_w: float) -> None:
        self.limits_w = await self._devices.set_group(self.limits_w, cap_w)
        if (uuid := self._devices.held_by) is not None:
            self.reason += f"; held at {self.limits_w[uuid]:g} W by {uuid}, which does not rise to {cap_w:g} W"

    def _may_set(self, uuid: str) -> bool:
        """Whether we may set a limit. A GPU that we took for unmanaged may be managed all the same: the manager goes
        by what the node's first agent found."""
        return uuid not in self.managed or self.managed[uuid].may_set

    async def let_go(self) -> None:
        """The replica has gone: its GPUs go down at once, and no grant raises them again."""
        self._letting_go = True
        async with self._busy:
            self._lease = replace(self._lease, grant=None)
            down = {uuid: gpu.info.min_limit_w for uuid, gpu in self.managed.items() if uuid in self.gpus}
            self.limits_w = await self._devices.set_each({u: w for u, w in down.items() if self.managed[u].may_set})

    # -- telling ---------------------------------------------------------------------------------------------------

    async def report(self) -> AgentReport:
        """What is in force now; no call of an earlier order is under way while it is taken."""
        async with self._busy:
            self._number += 1
            grant = self._lease.grant
            return AgentReport(
                replica_id=self._replica_id,
                session=self.session,
                number=self._number,
                fence_epoch=self._lease.fence_epoch,
                obeyed=(grant.epoch, grant.seq) if grant else (0, 0),
                limits_w=dict(self.limits_w),
                parking=(self._park.epoch, self._park.seq) if self._park else (0, 0),
                parked_w=dict(self.parked_w),
                expired=self._lease.expired,
            )
