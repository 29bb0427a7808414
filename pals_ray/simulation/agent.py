"""A replica's agent on the virtual clock: it drives the agent's core, whose calls to the devices take time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pals_ray.control.agent import commands
from pals_ray.control.agent.agent_core import BEAT_S, AgentCore
from pals_ray.control.ledger.reservations import SAME_LIMIT_W
from pals_ray.control.messages import Answer, Beat, Hello, ReplicaSpec
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import Reading
from pals_ray.models.lookup import LoadedModel
from pals_ray.simulation.clock import Events
from pals_ray.simulation.fleet import Placed
from pals_ray.simulation.setting import SimSetting
from pals_ray.types import Grant


class Agent:
    """One replica's agent. `send_beat` and `send_hello` carry its words to whichever manager there is."""

    def __init__(self, placed: Placed, model: LoadedModel, setting: SimSetting, events: Events) -> None:
        self.spec: ReplicaSpec = placed.spec
        self.silent = False
        self.decisions = self.cap_changes = self.batch_changes = 0
        self.send_beat: Callable[[Beat, float], None]
        self.send_hello: Callable[[Hello, float], None]
        self.cap_moved: Callable[[float], None]
        self._placed = placed
        self._engine = placed.engine
        self._driver_s = setting.messages.driver_s
        self._events = events
        controller = ReplicaController(len(placed.uuids), placed.model.largest_prompt, setting.controller)
        controller.take_model(model.surface, model.source)
        self._core = AgentCore(placed.replica_id, placed.node.name, len(placed.uuids), controller)
        self._dead = False
        self._do(self._core.claimed(placed.uuids, self._engine.max_batch, 0.0), 0.0)

    @property
    def limits_w(self) -> dict[str, float]:
        """The limit in force on each of its GPUs, W."""
        return dict.fromkeys(self._placed.uuids, self._engine.cap.ordered_w)

    def beat(self, now_s: float) -> None:
        """Take a reading, and so again in `BEAT_S`."""
        if self._dead:
            return
        engine = self._engine
        engine.read(now_s)
        reading = Reading(now_s, engine.telemetry(now_s), engine.energy_j, engine.power_w, engine.binding)
        self._do(self._core.beat_due(reading, now_s), now_s)
        self._events.at(now_s + BEAT_S, self.beat)

    def answered(self, answer: Answer, now_s: float) -> None:
        """The manager's answer arrives."""
        if not self.silent:
            self._do(self._core.answered(answer, now_s), now_s)

    def granted(self, grant: Grant, now_s: float) -> None:
        """A grant that the manager pushed arrives."""
        if not self.silent:
            self._do(self._core.granted(grant, now_s), now_s)

    def die(self) -> None:
        """Its node is gone."""
        self._dead = self.silent = True

    def _do(self, asked: tuple[commands.Command, ...], now_s: float) -> None:
        """Carry the core's commands out. Parked GPUs are at their lowest limits from the first."""
        engine, changed = self._engine, False
        for command in asked:
            match command:
                case commands.ReadLimits(uuids):
                    lowest_w = self._placed.terms.min_limit_w
                    limits_w = {uuid: self.limits_w.get(uuid, lowest_w) for uuid in uuids}
                    self._do(self._core.limits_read(limits_w, now_s), now_s)
                case commands.SetBatchLimit(limit):
                    changed = limit != engine.batch_limit
                    self.batch_changes += changed
                    if changed:
                        engine.order_batch_limit(limit, now_s)
                case commands.SetGroupCap(_, cap_w):
                    moves = abs(cap_w - engine.cap.ordered_w) > SAME_LIMIT_W
                    self.decisions += changed or moves
                    if moves:
                        self._events.at(now_s + self._driver_s, partial(self._capped, cap_w))
                    else:
                        self._do(self._core.limits_set(self.limits_w, now_s), now_s)
                case commands.SayHello(hello):
                    self.send_hello(hello, now_s)
        # A beat confirms a grant as well: one is enough.
        tells = any(isinstance(command, commands.ConfirmGrant | commands.SendBeat) for command in asked)
        if tells and not self.silent:
            self.send_beat(self._core.beat(), now_s)

    def _capped(self, cap_w: float, now_s: float) -> None:
        """The driver has done it."""
        if self._dead:
            return
        self._engine.order_cap(cap_w, now_s)
        self.cap_changes += 1
        self.cap_moved(now_s)
        self._do(self._core.limits_set(self.limits_w, now_s), now_s)
