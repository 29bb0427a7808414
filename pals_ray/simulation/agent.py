"""A replica's agent on the virtual clock: it drives the agent's core, whose calls to the devices take time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pals_ray.control.agent import commands
from pals_ray.control.agent.agent_core import BEAT_S, AgentCore
from pals_ray.control.ledger.reservations import SAME_LIMIT_W
from pals_ray.control.messages import Answer, Beat, Hello
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import Reading
from pals_ray.models.lookup import LoadedModel
from pals_ray.simulation.clock import Events
from pals_ray.simulation.fleet import Placed
from pals_ray.simulation.setting import SimSetting
from pals_ray.types import Grant


class Agent:
    """One replica's agent. While `silent` it neither sends nor receives; once `dead` its node is gone."""

    def __init__(
        self,
        placed: Placed,
        model: LoadedModel,
        setting: SimSetting,
        events: Events,
        say: Callable[[Hello | Beat, float], None],
        cap_moved: Callable[[float], None],
    ) -> None:
        self.spec = placed.spec
        self.model = model
        self.silent = self.dead = False
        self.decisions = self.cap_changes = 0
        self._placed = placed
        self._engine = placed.engine
        self._driver_s = setting.messages.driver_s
        self._events = events
        self._say = say
        self._cap_moved = cap_moved
        controller = ReplicaController(placed.spec.num_gpus, setting.controller)
        controller.take_model(model.surface, model.source)
        self._core = AgentCore(placed.spec.replica_id, placed.node.name, placed.spec.num_gpus, controller)
        self._do(self._core.claimed(self.spec.gpus, self._engine.max_batch, 0.0), 0.0)

    @property
    def limits_w(self) -> dict[str, float]:
        """The limit in force on each of its GPUs, W."""
        return dict.fromkeys(self.spec.gpus, self._engine.cap.ordered_w)

    def beat(self, now_s: float) -> None:
        """Take a reading, now and every `BEAT_S`."""
        if not self.dead:
            engine = self._engine
            engine.read(now_s)
            reading = Reading(now_s, engine.telemetry(now_s), engine.energy_j, engine.power_w, engine.binding)
            self._do(self._core.beat_due(reading, now_s), now_s)
            self._events.at(now_s + BEAT_S, self.beat)

    def hear(self, said: Answer | Grant, now_s: float) -> None:
        """Obey an answer of the manager, or a grant that it pushed."""
        if not self.silent:
            obey = self._core.granted if isinstance(said, Grant) else self._core.answered
            self._do(obey(said, now_s), now_s)  # type: ignore[arg-type]

    def _do(self, asked: tuple[commands.Command, ...], now_s: float) -> None:
        """Carry out the core's commands. Parked GPUs start at their lowest limits."""
        engine, core, changed = self._engine, self._core, False
        for command in asked:
            match command:
                case commands.ReadLimits(uuids):
                    lowest_w = self._placed.terms.min_limit_w
                    self._do(core.limits_read({u: self.limits_w.get(u, lowest_w) for u in uuids}, now_s), now_s)
                case commands.OrderEngine(limit, _, ttft_limit_s, tpot_limit_s):
                    engine.judge.ttft_limit_s, engine.judge.tpot_limit_s = ttft_limit_s, tpot_limit_s
                    if limit != engine.batch_limit:
                        changed = True
                        engine.order_batch_limit(limit, now_s)
                case commands.SetGroupCap(_, cap_w):
                    moves = abs(cap_w - engine.cap.ordered_w) > SAME_LIMIT_W
                    self.decisions += changed or moves
                    if moves:
                        self._events.at(now_s + self._driver_s, partial(self._capped, cap_w))
                    else:
                        self._do(core.limits_set(self.limits_w, now_s), now_s)
                case commands.SayHello(hello):
                    self._say(hello, now_s)
        # A beat confirms a grant as well: one is enough.
        if not self.silent and any(isinstance(c, commands.ConfirmGrant | commands.SendBeat) for c in asked):
            self._say(core.beat(), now_s)

    def _capped(self, cap_w: float, now_s: float) -> None:
        """Put a new cap in force: the driver's call has returned."""
        if not self.dead:
            self._engine.order_cap(cap_w, now_s)
            self.cap_changes += 1
            self._cap_moved(now_s)
            self._do(self._core.limits_set(self.limits_w, now_s), now_s)
