"""What a power agent does about everything that reaches it: grants under their lease, parking orders, beats.

Sans I/O: the core is told events with their time (s of the agent's monotonic clock) and answers with commands. It knows
no clock, device or network; `runtime.agent` and `simulation` drive the same class.

The agent does one thing at a time. While a call to the devices is under way, whatever else has to be done waits, so
that no report is taken while a limit may still be changing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from math import inf

from pals_ray.control.agent.commands import (
    Command,
    ConfirmGrant,
    OrderEngine,
    ReadLimits,
    SayHello,
    SendBeat,
    SetGroupCap,
    SetLimits,
)
from pals_ray.control.charge import ChargeTerms
from pals_ray.control.ledger.lease import LeaseState, Outcome, accept, ceiling_w, fence, tick
from pals_ray.control.messages import AgentReport, Answer, Beat, Hello, NodeGpu, ParkOrder
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.slo import tally_of
from pals_ray.control.telemetry import Reading, TelemetryWindow
from pals_ray.types import EngineTelemetry, Grant, OperatingPoint

BEAT_S = 0.5
#: Beats of the agent for one that the manager hears: it divides once a second.
BEATS_PER_REPORT = 2

log = logging.getLogger("pals.agent")


class _Task(IntEnum):
    """What waits to be done, the most urgent first."""

    LET_GO = 0
    READ = 1
    PARK = 2
    HOLD_POINT = 3
    HELLO = 4
    CONFIRM = 5
    BEAT = 6


class AgentCore:
    """One replica's agent. `gpus` and `max_batch` are the replica's own once its engine's ranks have claimed them.

    `managed` are the node's GPUs that are ours, by UUID.
    `limits_w` and `parked_w` hold the limits last read of the replica's and of the parked GPUs. `reason` says why the
    point in force was chosen.
    """

    def __init__(self, replica_id: str, node_id: str, num_gpus: int, controller: ReplicaController) -> None:
        self.controller = controller
        self.window = TelemetryWindow()
        self.managed: Mapping[str, NodeGpu] = {}
        self.gpus: tuple[str, ...] = ()
        self.max_batch = 0
        self.terms: ChargeTerms | None = None
        self.session = 0
        self.limits_w: dict[str, float] = {}
        self.parked_w: dict[str, float] = {}
        self.batch_limit: int | None = None
        self.natural_draw_w: float | None = None
        self.reason = "starting"
        self._replica_id = replica_id
        self._node_id = node_id
        self._num_gpus = num_gpus
        self._lease = LeaseState()
        self._fail_safe_w: float | None = None
        self._park: ParkOrder | None = None
        self._ordered_cap_w = 0.0
        self._number = 0
        self._beats = 0
        self._greeted = False
        self._gone = False
        self._todo: set[_Task] = set()
        self._under_way: _Task | None = None

    # -- what the driver asks ----------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and nothing waits."""
        return self._under_way is None and not self._todo

    @property
    def allowed_cap_w(self) -> float:
        """The cap that grant and lease let the GPUs go up to, W; 0 without a grant."""
        return (ceiling_w(self._lease, self.terms)[0] or 0.0) if self.terms else 0.0

    def report(self) -> AgentReport:
        """What is in force. Only while nothing is under way: a limit that may still change is not in force."""
        self._number += 1
        grant, park = self._lease.grant, self._park
        return AgentReport(
            replica_id=self._replica_id,
            session=self.session,
            number=self._number,
            fence_epoch=self._lease.fence_epoch,
            obeyed=(grant.epoch, grant.seq) if grant else (0, 0),
            limits_w=dict(self.limits_w),
            parking=(park.epoch, park.seq) if park else (0, 0),
            parked_w=dict(self.parked_w),
            expired=self._lease.expired,
        )

    def beat(
        self,
        power_w: Mapping[str, float] | None = None,
        unmanaged_w: float = 0.0,
        errors: Mapping[str, str] | None = None,
        engine: EngineTelemetry | None = None,
    ) -> Beat:
        """The report with all that this agent sees and does, for policy and status; arguments as in `Beat`."""
        controller = self.controller
        return Beat(
            report=self.report(),
            telemetry=self.window.summary(),
            power_w=power_w or {},
            unmanaged_w=unmanaged_w,
            cap_w=min(self.limits_w.values(), default=None),
            batch_limit=self.batch_limit,
            reason=self.reason,
            natural_draw_w=self.natural_draw_w,
            errors=errors or {},
            arrivals=controller.arrivals,
            expected=controller.expected,
            correction=controller.correction,
            tally=tally_of(engine, controller.target.slo) if engine else None,
        )

    # -- events ------------------------------------------------------------------------------------------------------

    def greet(self, now_s: float) -> tuple[Command, ...]:
        """Say hello, with the limits read anew."""
        return self._do(now_s, _Task.HELLO)

    def claimed(self, gpus: Sequence[str], max_batch: int, now_s: float) -> tuple[Command, ...]:
        """These GPUs are the replica's from now on: read their limits."""
        self.gpus, self.max_batch = tuple(gpus), max_batch
        return self._do(now_s, _Task.READ)

    def beat_due(self, reading: Reading | None, now_s: float) -> tuple[Command, ...]:
        """Learn from a reading (None: not all GPUs answered), hold the point, and report every second time."""
        if reading is not None:
            self.window.add(reading)
            seen = self.window.summary()
            self.controller.look(now_s, seen)
            if self.terms is not None:
                self.natural_draw_w = self.controller.natural_draw_w(self.window, seen, self.terms.max_limit_w)
        self._greeted = False
        self._beats += 1
        tells = self._beats % BEATS_PER_REPORT == 0
        return self._do(now_s, _Task.HOLD_POINT, *([_Task.BEAT] if tells else []))

    def answered(self, answer: Answer, now_s: float) -> tuple[Command, ...]:
        """Do what the manager's answer says, unless it comes from an older manager or is late."""
        reply = answer.reply
        if reply.epoch < self._lease.fence_epoch:
            return ()
        if reply.epoch > self._lease.fence_epoch or reply.session == 0:
            self.session = 0
        self._lease = fence(self._lease, reply.epoch)
        if reply.session == 0:
            # Once a beat is enough: late answers to what was said before a hello would each bring about another one.
            return () if self._greeted else self._do(now_s, _Task.HELLO)
        if reply.session < self.session:
            return ()
        if reply.session > self.session:
            self.session, self._number = reply.session, 0
        self._fail_safe_w = answer.fail_safe_w
        self.controller.target = answer.target
        self.controller.take_alike(answer.arrivals, now_s)
        self.terms = reply.terms or self.terms
        tasks = []
        if reply.park is None:
            self._park, self.parked_w = None, {}
        elif self._takes(reply.park):
            tasks.append(_Task.PARK)
        if reply.grant is not None:
            tasks += self._accept(reply.grant, now_s)
        return self._do(now_s, *tasks)

    def granted(self, grant: Grant, now_s: float) -> tuple[Command, ...]:
        """Obey a grant that was pushed if it is newer than any before: a cut acts at once."""
        return self._do(now_s, *self._accept(grant, now_s))

    def park_ordered(self, order: ParkOrder, now_s: float) -> tuple[Command, ...]:
        """Bring free GPUs of the node down to the limits ordered."""
        return self._do(now_s, _Task.PARK) if self._takes(order) else ()

    def replica_gone(self, now_s: float) -> tuple[Command, ...]:
        """The replica has gone: its GPUs go down at once, and no grant raises them again."""
        self._gone = True
        return self._do(now_s, _Task.LET_GO)

    def limits_read(self, limits_w: Mapping[str, float], now_s: float) -> tuple[Command, ...]:
        """The limits in force of those GPUs asked for that could be read."""
        task, self._under_way = self._under_way, None
        if task is _Task.PARK:
            return self._read_parked(dict(limits_w), now_s)
        self.limits_w = dict(limits_w)
        if task is _Task.HOLD_POINT:
            return (*self._hold_point(now_s), *self._do(now_s))
        if task is _Task.HELLO:
            return (self._hello(), *self._do(now_s))
        return self._do(now_s)

    def limits_set(
        self, limits_w: Mapping[str, float], now_s: float, held_by: str | None = None
    ) -> tuple[Command, ...]:
        """The limits now in force of all GPUs that were to be set; `held_by` is the one that does not rise, if any."""
        task, self._under_way = self._under_way, None
        if task is _Task.PARK:
            self.parked_w = self.parked_w | dict(limits_w)
        else:
            self.limits_w = dict(limits_w)
            if held_by is not None:
                wanted = f"which does not rise to {self._ordered_cap_w:g} W"
                self.reason += f"; held at {self.limits_w[held_by]:g} W by {held_by}, {wanted}"
        return self._do(now_s)

    def call_failed(self, now_s: float) -> tuple[Command, ...]:
        """The call under way failed in a way that its driver did not foresee; the next beat tries again."""
        self._under_way = None
        return self._do(now_s)

    # -- how ---------------------------------------------------------------------------------------------------------

    def _accept(self, grant: Grant, now_s: float) -> list[_Task]:
        self._lease, outcome, reason = accept(self._lease, grant, now_s)
        if outcome is Outcome.OBEY:
            return [_Task.HOLD_POINT, _Task.CONFIRM]
        if outcome is Outcome.IGNORE:
            log.info("%s: grant ignored: %s", self._replica_id, reason)
        return []

    def _takes(self, order: ParkOrder) -> bool:
        """Whether a parking order is the newest; one that is repeated is carried out again."""
        if self._park is not None and (order.epoch, order.seq) < (self._park.epoch, self._park.seq):
            return False
        self._park = order
        return True

    def _do(self, now_s: float, *tasks: _Task) -> tuple[Command, ...]:
        self._todo.update(tasks)
        return tuple(self._next(now_s))

    def _next(self, now_s: float) -> Iterator[Command]:
        """Begin what waits, the most urgent first, until something is under way."""
        while self._todo and self._under_way is None:
            task = min(self._todo)
            self._todo.remove(task)
            holds = task is _Task.HOLD_POINT and self.terms is not None and not self._gone
            if task is _Task.LET_GO:
                self._lease = replace(self._lease, grant=None)
                self._under_way = task
                mine = {uuid: self.managed[uuid] for uuid in self.gpus if uuid in self.managed}
                yield SetLimits({uuid: gpu.info.min_limit_w for uuid, gpu in mine.items() if gpu.may_set})
            elif task is _Task.PARK and self._park is not None:
                self._under_way = task
                yield ReadLimits(tuple(self._park.limits_w))
            elif self.gpus and (holds or task in (_Task.READ, _Task.HELLO)):
                self._under_way = task
                yield ReadLimits(self.gpus)
            elif task is _Task.HELLO:
                yield self._hello()
            elif task is _Task.CONFIRM:
                yield ConfirmGrant()
            elif task is _Task.BEAT:
                yield SendBeat()

    def _hello(self) -> SayHello:
        self._greeted = True
        hello = Hello(
            replica_id=self._replica_id,
            node_id=self._node_id,
            num_gpus=self._num_gpus,
            fence_epoch=self._lease.fence_epoch,
            limits_w=dict(self.limits_w),
            ceiling_w=self.allowed_cap_w,
        )
        return SayHello(hello)

    def _read_parked(self, now_w: dict[str, float], now_s: float) -> tuple[Command, ...]:
        self.parked_w = now_w if self._park is not None else {}
        ordered_w = self._park.limits_w if self._park is not None else {}
        lower = {u: ordered_w[u] for u, w in now_w.items() if u in ordered_w and w > ordered_w[u] and self._may_set(u)}
        if not lower:
            return self._do(now_s)
        self._under_way = _Task.PARK
        return (SetLimits(lower),)

    def _hold_point(self, now_s: float) -> tuple[Command, ...]:
        """Bring caps and batch limit to the best point that grant and lease allow now."""
        assert self.terms is not None
        in_force_w = min(self.limits_w.values(), default=self.terms.min_limit_w)
        fail_safe_w = self._fail_safe_w or self.terms.min_limit_w
        self._lease, word = tick(self._lease, now_s, in_force_w=in_force_w, fail_safe_w=fail_safe_w)
        most_w, self.reason = ceiling_w(self._lease, self.terms)
        grant = self._lease.grant
        if most_w is None or grant is None:
            return ()
        unread = set(self.gpus) - self.limits_w.keys()
        if unread:  # they may be anywhere: none of the others rises
            most_w = min(most_w, in_force_w)
        may_cap = all(map(self._may_set, self.gpus))
        point, self.reason = self._choose(most_w, in_force_w, self.terms, grant, may_cap, now_s)
        if self._lease.expired:
            self.reason = f"{word}; {self.reason}"
        if unread:
            self.reason += f"; held at {most_w:g} W: {', '.join(sorted(unread))} cannot be read"
        self.batch_limit = point.batch_limit
        slo = self.controller.target.slo
        order = OrderEngine(point.batch_limit, grant.parked, slo.ttft_s or inf, slo.tpot_s or inf)
        if not may_cap:
            return (order,)
        self._under_way, self._ordered_cap_w = _Task.HOLD_POINT, min(point.cap_w, most_w)
        # The batch limit costs no time to set, and takes seconds to act.
        return order, SetGroupCap(dict(self.limits_w), self._ordered_cap_w)

    def _choose(
        self, most_w: float, in_force_w: float, terms: ChargeTerms, grant: Grant, may_cap: bool, now_s: float
    ) -> tuple[OperatingPoint, str]:
        seen = self.window.summary()
        try:
            return self.controller.choose(
                now_s, most_w, in_force_w, terms, self.max_batch, grant, seen, may_cap=may_cap
            )
        except Exception as error:  # the budget holds whatever a model answers: down with the ceiling, never up
            log.exception("%s: its point could not be chosen", self._replica_id)
            return OperatingPoint(min(in_force_w, most_w), self.max_batch), f"no point could be chosen: {error}"

    def _may_set(self, uuid: str) -> bool:
        """Whether we may set a limit. A GPU that we took for unmanaged may be managed all the same: the manager goes
        by what the node's first agent found."""
        return uuid not in self.managed or self.managed[uuid].may_set
