"""What agents and manager tell one another: frozen values, picklable, safe to lose, repeat, delay and reorder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.slo import Tally
from pals_ray.control.snapshot import Arrivals, Overhead, ReplicaCharges
from pals_ray.errors import PalsError
from pals_ray.models.correction import Correction
from pals_ray.models.lookup import LoadedModel
from pals_ray.types import Expected, GpuInfo, Grant, ReplicaTelemetry, Target


class LedgerError(PalsError):
    """The ledger refuses a request; nothing was changed."""


class GpuHeldError(LedgerError):
    """A GPU that is asked for belongs to another replica, `holder`; stop its agent and let it `leave` first."""

    def __init__(self, uuid: str, holder: str) -> None:
        super().__init__(f"{uuid} is held by replica {holder}: make sure that its agent is gone, then let it leave")
        self.uuid = uuid
        self.holder = holder

    def __reduce__(self) -> tuple[type[GpuHeldError], tuple[str, str]]:
        return GpuHeldError, (self.uuid, self.holder)


class StaleEpochError(LedgerError):
    """Agents already obey a newer manager; `seen` is its epoch. This ledger must not be used any more."""

    def __init__(self, own: int, seen: int) -> None:
        super().__init__(f"this manager has epoch {own}, but agents obey epoch {seen}: restart with a larger one")
        self.own = own
        self.seen = seen

    def __reduce__(self) -> tuple[type[StaleEpochError], tuple[int, int]]:
        return StaleEpochError, (self.own, self.seen)


@dataclass(frozen=True, slots=True)
class ManagedGpu:
    """One GPU that is ours to cap, as its node's first agent found it. W.

    `limit_w` is the limit in force, `floor_w` the draw at the clock floor where that is above the lowest limits
    (else 0), `may_set` whether we may set its limit.
    """

    uuid: str
    min_limit_w: float
    max_limit_w: float
    limit_w: float
    floor_w: float = 0.0
    may_set: bool = True


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A node as its first agent describes it. `unmanaged` GPUs (UUIDs) are listed and never touched."""

    node_id: str
    gpus: tuple[ManagedGpu, ...]
    domain: str | None = None
    overhead: Overhead = field(default_factory=Overhead)
    unmanaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What the manager knows a replica by. `gpus` and `max_batch` are what it has claimed so far: nothing at first."""

    replica_id: str
    model: str
    num_gpus: int
    node_id: str
    node_labels: tuple[tuple[str, str], ...] = ()
    gpus: tuple[str, ...] = ()
    max_batch: int = 0


@dataclass(frozen=True, slots=True)
class NodeGpu:
    """One GPU of a node as an agent found it. W.

    `limit_w` is in force, `may_set`: we may set it (known once the node is enrolled), `holders`: pids with a context.
    """

    info: GpuInfo
    limit_w: float
    floor_w: float
    may_set: bool
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hello:
    """An agent's first message to a manager: at its start, after it replaced another agent, after a new manager came.

    `fence_epoch` is the highest epoch the agent obeys: it must have been raised to the manager's own *before* the
    limits were read, so that no older manager can raise them afterwards. `limits_w` are the limits in force of the
    replica's own GPUs (empty while it has claimed none), `ceiling_w` the cap that its present grant lets it go up to
    (0 without a grant). `num_gpus` is how many GPUs the replica takes.
    """

    replica_id: str
    node_id: str
    num_gpus: int
    fence_epoch: int
    limits_w: Mapping[str, float] = field(default_factory=dict)
    ceiling_w: float = 0.0


@dataclass(frozen=True, slots=True)
class ParkOrder:
    """Bring these free GPUs of a node to their lowest limits: {uuid: limit, W}. Replaces any earlier order.

    `executor` is the replica whose agent carries it out. Parking only lowers: an order that comes late costs speed,
    never watts.
    """

    node_id: str
    executor: str
    epoch: int
    seq: int
    limits_w: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AgentReport:
    """What an agent finds in force, every beat and after every change.

    `session` came with the answer to its hello; `number` counts its reports. `obeyed` is (epoch, seq) of the last
    grant that it obeyed *in full*: every set call that this or any earlier grant caused had returned before the limits
    were read. `limits_w`: limits in force of its own GPUs, those it could read, W. `parking` and `parked_w`: the same
    for the last `ParkOrder` that it carried out. `expired`: the lease has ended, the agent is at its fail-safe cap and
    needs a newer grant.
    """

    replica_id: str
    session: int
    number: int
    fence_epoch: int
    obeyed: tuple[int, int]
    limits_w: Mapping[str, float]
    parking: tuple[int, int] = (0, 0)
    parked_w: Mapping[str, float] = field(default_factory=dict)
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The ledger's answer to a hello, a claim or a report.

    Agents fence themselves to `epoch` on every reply. `session` is 0 where the sender must fence, read its limits and
    say hello (again) before it is heard. `grant` is the present one: it renews the lease and repairs a lost push.
    `uuids` are the GPUs that the replica has claimed and `terms` turn its charge into a cap (None before). `park`
    replaces whatever the agent was to keep parked (None: nothing).
    """

    epoch: int
    session: int
    grant: Grant | None
    uuids: tuple[str, ...]
    terms: ChargeTerms | None
    park: ParkOrder | None
    reason: str


@dataclass(frozen=True, slots=True)
class Commands:
    """What to send now: `cuts` first (push them at once), then `raises`, then parking.

    Where the ledger is `unsaved`, write its `memo()` to disk and call `saved()` before sending.
    """

    cuts: tuple[Grant, ...] = ()
    raises: tuple[Grant, ...] = ()
    parks: tuple[ParkOrder, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class InForce:
    """Whether all that is charged is within every budget, and if not by how much and on whom we wait."""

    value: bool
    over_w: float
    awaited: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaView(ReplicaCharges):
    """One replica in the ledger, for snapshots and status. W at node level, limits per GPU.

    `charge_w` is what the limits last read occupy, `reserved_w` that or more: whatever its agent may still act on.
    `fixed` means that it cannot be brought to a grant at present (silent, stuck, no permission): `least_charge_w` and
    `most_charge_w` are both `reserved_w` then. `confirmed` means that its present grant is in force on all its GPUs.
    """

    uuids: tuple[str, ...]
    reserved_w: float
    overhead: Overhead
    confirmed: bool
    silent: bool
    fixed: bool
    may_set: bool
    reason: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node in the ledger, for status. `parked` are the free GPUs confirmed at their lowest limit.

    The node is inside the budget once it has `joined`. `parked_charge_w` is what its free GPUs are charged, W.
    """

    node_id: str
    domain: str | None
    overhead: Overhead
    num_gpus: int
    free: tuple[str, ...]
    parked: tuple[str, ...]
    unmanaged: tuple[str, ...]
    parked_charge_w: float
    joined: bool
    lost: bool
    replicas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplicaMemo:
    """What a manager writes down of a replica: enough to charge it in full until its agent is heard."""

    replica_id: str
    num_gpus: int
    uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeMemo:
    """What a manager writes down of a node.

    The `limit_w` of its GPUs is the highest that anything sent so far may have put, or may yet put, in force, W.
    """

    node: NodeInfo
    joined: bool
    replicas: tuple[ReplicaMemo, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """A hello with what the manager cannot know: who the replica is, and its node's GPUs (the unmanaged by UUID)."""

    spec: ReplicaSpec
    hello: Hello
    managed: tuple[NodeGpu, ...]
    unmanaged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """An agent's word once a second: what is in force (for the ledger), what it sees and does (for policy and status).

    `power_w` holds the mean draw since the beat before of every managed GPU that this agent reads: its own, and the
    parked ones it keeps. `natural_draw_w` is the group's, measured or predicted. `expected` is what the point in force
    was chosen on, `correction` what telemetry says of the model, `arrivals` what comes (None: not known yet), `tally`
    what SLOs are judged by (None before its engine runs).
    """

    report: AgentReport
    telemetry: ReplicaTelemetry
    power_w: Mapping[str, float]
    unmanaged_w: float
    cap_w: float | None
    batch_limit: int | None
    reason: str
    natural_draw_w: float | None
    errors: Mapping[str, str]
    arrivals: Arrivals | None = None
    expected: Expected | None = None
    correction: Correction = field(default_factory=Correction)
    tally: Tally | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The manager's answer to whatever an agent says.

    `fail_safe_w` is the cap to go to when a lease ends, W; None for the device's lowest. `target` is the model's, with
    this replica's part of its tokens/s. `arrivals` is what it is to plan for beside those that are alike (None: not
    known). `model` comes with the answer to a hello alone (None there: nothing predicts
    the replica).
    """

    reply: Reply
    fail_safe_w: float | None
    target: Target = field(default_factory=Target)
    model: LoadedModel | None = None
    arrivals: Arrivals | None = None
