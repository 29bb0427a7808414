"""A replica's agent on the virtual clock: the same control code as the runtime's; driver calls take time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pals_ray.control.ledger.charge import ChargeTerms
from pals_ray.control.ledger.lease import LeaseState, Outcome, accept, ceiling_w, fence, tick
from pals_ray.control.ledger.reservations import SAME_LIMIT_W
from pals_ray.control.messages import AgentReport, Hello, ParkOrder, Reply
from pals_ray.control.replica.latency_feedback import TailFactors
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.telemetry import Reading, TelemetryWindow
from pals_ray.models.correction import Correction
from pals_ray.models.power_model import PowerModel
from pals_ray.simulation.clock import Events
from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.setting import SimModel, SimSetting
from pals_ray.types import Grant, ReplicaTelemetry, Target

BEAT_S = 0.5
#: It reports at every so many beats, and at once when it was told something.
TELL_BEATS = 2


@dataclass(frozen=True, slots=True)
class Beat:
    """An agent's word every beat: what is in force, what it sees, and what its controller takes for the demand."""

    report: AgentReport
    telemetry: ReplicaTelemetry
    energy_j: float
    time_s: float
    natural_draw_w: float | None
    demand_tokens_per_s: float | None
    correction: Correction
    tails: TailFactors


class Agent:
    """One replica's agent. `send_beat` and `send_hello` carry its words to whichever manager there is."""

    def __init__(
        self,
        replica_id: str,
        node_id: str,
        uuids: tuple[str, ...],
        engine: Engine,
        model: SimModel,
        belief: PowerModel,
        setting: SimSetting,
        events: Events,
    ) -> None:
        self.replica_id = replica_id
        self.node_id = node_id
        self.uuids = uuids
        self.engine = engine
        self.model = model.name
        self.silent = False
        self.decisions = 0
        self.cap_changes = 0
        self.batch_changes = 0
        self.terms: ChargeTerms | None = None
        self.send_beat: Callable[[Beat, float], None]
        self.send_hello: Callable[[Hello, float], None]
        self.cap_moved: Callable[[float], None]
        self._setting = setting
        self._events = events
        self._window = TelemetryWindow()
        self._telemetry = ReplicaTelemetry()
        self._natural_draw_w: float | None = None
        self._lease = LeaseState()
        self._session = 0
        self._number = 0
        self._park: ParkOrder | None = None
        self._pilot = ReplicaController(len(uuids), model.largest_prompt, setting.controller)
        self._pilot.target = model.target
        self._pilot.take_model(belief, model.name)
        # While a call to the driver is under way nothing else is decided, and no report taken.
        self._ordering = False
        self._decide_after = False
        self._report_after = False
        self._dead = False
        self._beats = 0

    # -- what others call ------------------------------------------------------------------------------------------

    def beat(self, now_s: float) -> None:
        """Look, decide, report every second time; and so again in `BEAT_S`."""
        if self._dead:
            return
        self._look(now_s)
        self.enforce(now_s)
        self._beats += 1
        if self._beats % TELL_BEATS == 0:
            self._report(now_s)
        self._events.at(now_s + BEAT_S, self.beat)

    def die(self) -> None:
        """Its node is gone."""
        self._dead = self.silent = True

    def fence(self, epoch: int) -> None:
        """Obey no manager older than this one."""
        self._lease = fence(self._lease, epoch)

    def hear(self, reply: Reply, target: Target, serving: int, now_s: float) -> None:
        """The manager's answer to a hello, a claim or a beat. `target` has this replica's part of the tokens/s;
        `serving` is how many replicas the model has."""
        if self.silent or reply.epoch < self._lease.fence_epoch:
            return
        self.fence(reply.epoch)
        self._session = reply.session
        self._pilot.target, self._pilot.serving = target, serving
        self._window.recent_s = self._pilot.recent_s
        if not reply.session:
            self.send_hello(self.hello(), now_s)
            return
        if reply.terms is not None:
            self.terms = reply.terms
        # Parked GPUs are at their lowest limits from the first: an order to park them is carried out as it comes.
        self._park = reply.park
        if reply.grant is not None:
            self.obey(reply.grant, now_s)

    def obey(self, grant: Grant, now_s: float) -> None:
        """Take a grant, pushed or in an answer; what is in force then is reported."""
        if self.silent:
            return
        self._lease, outcome, _ = accept(self._lease, grant, now_s)
        if outcome is Outcome.OBEY:
            self.enforce(now_s)
            self._report(now_s)

    def hello(self) -> Hello:
        """Who it is, and what is in force."""
        self._number = 0
        ceiling = ceiling_w(self._lease, self.terms)[0] if self.terms else None
        return Hello(
            replica_id=self.replica_id,
            node_id=self.node_id,
            num_gpus=len(self.uuids),
            fence_epoch=self._lease.fence_epoch,
            limits_w=self.limits_w if self.terms else {},
            ceiling_w=ceiling or 0.0,
        )

    @property
    def limits_w(self) -> dict[str, float]:
        """The limit in force on each of its GPUs, W."""
        return dict.fromkeys(self.uuids, self.engine.cap.ordered_w)

    def charge_w(self) -> float:
        """What the limits in force occupy, W at node level."""
        return self.terms.charge_w(self.engine.cap.ordered_w) if self.terms else 0.0

    # -- the beat --------------------------------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """Take a reading, and learn from it."""
        engine = self.engine
        engine.read(now_s)
        self._window.add(Reading(now_s, engine.telemetry(now_s), engine.energy_j, engine.power_w, engine.binding))
        self._telemetry = self._window.summary()
        self._pilot.look(now_s, self._telemetry)
        if self.terms is not None:
            self._natural_draw_w = self._pilot.natural_draw_w(self._window, self._telemetry, self.terms.max_limit_w)

    def enforce(self, now_s: float) -> None:
        """Bring cap and batch limit to what controller, grant and lease say now."""
        if self._ordering:
            self._decide_after = True
            return
        if self.terms is None:
            return
        engine, setting = self.engine, self._setting
        fail_safe_w = setting.fail_safe_cap_w or self.terms.min_limit_w
        self._lease, _ = tick(self._lease, now_s, in_force_w=engine.cap.ordered_w, fail_safe_w=fail_safe_w)
        ceiling, _ = ceiling_w(self._lease, self.terms)
        if ceiling is None or self._lease.grant is None:
            return
        point, _ = self._pilot.choose(
            now_s, ceiling, engine.cap.ordered_w, self.terms, engine.max_batch, self._lease.grant, self._telemetry
        )
        moved = abs(point.cap_w - engine.cap.ordered_w) > SAME_LIMIT_W
        if point.batch_limit != engine.batch_limit:
            engine.order_batch_limit(point.batch_limit, now_s)
            self.batch_changes += 1
            self.decisions += not moved
        if moved:
            self.decisions += 1
            self._ordering = True
            self._events.at(now_s + setting.messages.driver_s, partial(self._ordered, point.cap_w))

    def _ordered(self, cap_w: float, now_s: float) -> None:
        """The driver has done it."""
        self._ordering = False
        if self._dead:
            return
        self.engine.order_cap(cap_w, now_s)
        self.cap_changes += 1
        self.cap_moved(now_s)
        if self._decide_after:
            self._decide_after = False
            self.enforce(now_s)
        if self._report_after and not self._ordering:
            self._report_after = False
            self._report(now_s)

    def _report(self, now_s: float) -> None:
        if self.silent or self.terms is None:
            return
        if self._ordering:
            self._report_after = True
            return
        self.send_beat(self._word(now_s), now_s)

    def _word(self, now_s: float) -> Beat:
        self._number += 1
        grant, park = self._lease.grant, self._park
        report = AgentReport(
            replica_id=self.replica_id,
            session=self._session,
            number=self._number,
            fence_epoch=self._lease.fence_epoch,
            obeyed=(grant.epoch, grant.seq) if grant else (0, 0),
            limits_w=self.limits_w,
            parking=(park.epoch, park.seq) if park else (0, 0),
            parked_w=dict(park.limits_w) if park else {},
            expired=self._lease.expired,
        )
        return Beat(
            report,
            self._telemetry,
            self.engine.energy_j,
            now_s,
            self._natural_draw_w,
            self._pilot.demand_tokens_per_s,
            self._pilot.correction,
            self._pilot.tails,
        )
