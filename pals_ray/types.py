"""Values that cross a process or folder boundary: frozen, with the unit in every name."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from enum import StrEnum
from operator import add


class Provenance(StrEnum):
    """Where a number comes from; whatever a virtual GPU says is *modelled*."""

    MEASURED = "measured"
    CALIBRATED = "calibrated"
    MODELLED = "modelled"


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """What one GPU is: identity and the range its power limit may take, W."""

    uuid: str
    product: str
    min_limit_w: float
    max_limit_w: float
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class GpuState:
    """What one GPU reports now.

    `limit_w` is the limit *in force* (the lower of in-band and out-of-band), `power_w` instantaneous draw,
    `energy_j` a counter since some start, `floor_w` the draw at the device's clock floor where that is known and
    above the lowest limits (else 0).
    """

    uuid: str
    limit_w: float
    power_w: float
    energy_j: float
    floor_w: float = 0.0


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """(power cap per GPU, batch limit)."""

    cap_w: float
    batch_limit: int


@dataclass(frozen=True, slots=True)
class Target:
    """What the operator wants from a model.

    `throughput_tokens_per_s` is output tokens/s over all its replicas; None means all demand. Latency limits are
    p99, s; None means no limit. A lower `priority` number is served first. `min_share` is the share of its target
    that a model keeps while higher classes are short; `burst_floor_w` a least grant per replica, W.
    """

    throughput_tokens_per_s: float | None = None
    ttft_p99_s: float | None = None
    itl_p99_s: float | None = None
    priority: int = 0
    min_share: float = 0.0
    burst_floor_w: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineTelemetry:
    """One reading of a replica's engine: counters since engine start and gauges now.

    Histograms are cumulative counts over `LATENCY_EDGES_S` (one more count than edges: the last is overflow).
    `steps` and `late_steps` come from the paced worker of a virtual GPU (0 on real ones); `modelled_s` and `wall_s`
    are the summed modelled and real durations of those steps.
    """

    time_s: float
    running: int
    waiting: int
    kv_use: float
    prompt_tokens: int
    generation_tokens: int
    requests_finished: int
    preemptions: int
    batch_limit: int
    max_batch: int
    ttft_counts: tuple[int, ...]
    itl_counts: tuple[int, ...]
    steps: int = 0
    late_steps: int = 0
    modelled_s: float = 0.0
    wall_s: float = 0.0


#: Upper edges of the TTFT and ITL histograms, s: 5 % steps from 1 ms to about 141 s.
LATENCY_EDGES_S: tuple[float, ...] = tuple(round(1e-3 * 1.05**i, 9) for i in range(244))


@dataclass(frozen=True, slots=True)
class Grant:
    """The charge that the manager allows a replica, W at node level, under a lease.

    `epoch` fences managers, `seq` orders grants within an epoch: an agent obeys a grant only if (epoch, seq) is newer
    than its last. `lease_s` is how long it holds by the agent's own monotonic clock. A policy may pin cap or batch, or
    park the replica.
    """

    replica_id: str
    epoch: int
    seq: int
    charge_w: float
    lease_s: float
    reason: str
    pin_cap_w: float | None = None
    pin_batch_limit: int | None = None
    parked: bool = False


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles of a latency over a window, s; None where nothing completed. `recent_p99_s` is over a shorter one."""

    p50_s: float | None = None
    p99_s: float | None = None
    recent_p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaTelemetry:
    """What an agent saw of its replica over its last window: rates, latencies, power. W are GPU watts of the group.

    `running` and `waiting` are now; `running_mean` and `running_least` are over the window that rates are taken over.
    `arriving_tokens_per_s` is what requests that came in over the longer window ask for, at the mean output of those
    finished so far; 0 before any has.
    """

    running: int = 0
    waiting: int = 0
    running_mean: float = 0.0
    running_least: int = 0
    kv_use: float = 0.0
    throughput_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    arriving_tokens_per_s: float = 0.0
    power_w: float = 0.0
    energy_j: float = 0.0
    tokens: int = 0
    ttft: Latency = field(default_factory=Latency)
    itl: Latency = field(default_factory=Latency)
    late_share: float = 0.0
    modelled_over_wall: float = 1.0
    binding_share: float = 0.0


@dataclass(frozen=True, slots=True)
class GpuStatus:
    """One managed GPU: `limit_w` in force, `power_w` drawn, and which replica holds it (None: parked)."""

    uuid: str
    product: str
    node_id: str
    limit_w: float
    power_w: float
    replica_id: str | None
    enforceable: bool
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Expected:
    """The prediction behind a decision, corrected by feedback. `node_w` is at node level, `running` sequences."""

    demand_tokens_per_s: float
    wanted_tokens_per_s: float
    capacity_tokens_per_s: float
    served_share: float
    running: float
    node_w: float
    itl_p99_s: float
    ttft_p99_s: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica as an operator wants to see it. `cap_w` is per GPU; charges and stranded watts are at node level.

    `state` is "starting" (registered, no GPUs yet), "serving" or "silent" (its agent does not report; still charged).
    `predicted_by` names its model, `correction` what telemetry makes of that: factors on throughput and power.
    `expected` is what its agent decided on; the telemetry beside it is what came of that.
    """

    replica_id: str
    model: str
    node_id: str
    gpus: tuple[str, ...]
    num_gpus: int
    state: str
    cap_w: float | None
    batch_limit: int | None
    max_batch: int
    charge_w: float
    grant_w: float
    stranded_w: float
    target: Target
    telemetry: ReplicaTelemetry
    tokens_per_joule: float | None
    reason: str
    grant_reason: str
    provenance: Provenance
    demand_tokens_per_s: float | None = None
    predicted_by: str | None = None
    correction: tuple[float, float] = (1.0, 1.0)
    expected: Expected | None = None


@dataclass(frozen=True, slots=True)
class Stranded:
    """Charge that nobody uses, W at node level, by cause."""

    total_w: float
    minimum_cap_w: float
    headroom_w: float
    not_binding_w: float


@dataclass(frozen=True, slots=True)
class BudgetSource:
    """What moves the budget. W at node level; `set_w` is the budget that was set, by the fleet file or an operator.

    `kind` is "set" (nothing moves it), "schedule" or "signal", `asked_w` what that asks for now. `warning` says where
    it is held at another value, with the watts needed. `next_change_s` is when a schedule changes next, Unix s.
    """

    kind: str
    set_w: float
    asked_w: float
    reason: str
    warning: str | None = None
    next_change_s: float | None = None


@dataclass(frozen=True, slots=True)
class QosTotals:
    """Intervals judged (only active ones are), violations by cause (one interval may have several), misses."""

    intervals: int = 0
    violations: int = 0
    throughput: int = 0
    ttft: int = 0
    itl: int = 0
    requests: int = 0
    requests_late: float = 0.0
    tokens: int = 0
    tokens_late: float = 0.0

    def __add__(self, other: QosTotals) -> QosTotals:
        return QosTotals(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class QosStatus:
    """What status and metrics show of a model, or of a priority class (`model` None). Shares are of judged intervals;
    `ttft_miss_share` of requests, `itl_miss_share` of tokens; None where there was none.
    """

    model: str | None
    priority: int
    intervals: int
    violations: int
    violation_share: float | None
    throughput_violations: int
    ttft_violations: int
    itl_violations: int
    ttft_miss_share: float | None
    itl_miss_share: float | None
    latest: str
    totals: QosTotals


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The whole fleet. `measured_w` is the draw of all managed GPUs plus overhead, as their devices report it.

    `over_budget_w` and `over_budget_s` count measured draw above the budget: the worst excess and the time, since the
    manager started. `last_settle_s` is how long the last budget cut took until every cap was in force. `time_scale`
    is that of the virtual GPUs; None with real ones. `qos` holds the violations and misses of each model,
    `qos_by_priority` of each class, since the manager started.
    """

    budget_w: float
    source: BudgetSource
    reserve_w: float
    charge_w: float
    reserved_w: float
    parked_w: float
    measured_w: float
    unmanaged_w: float
    stranded: Stranded
    over_budget_w: float
    over_budget_s: float
    last_settle_s: float | None
    policy: str
    version: str
    epoch: int
    enforced: bool
    time_scale: float | None
    provenance: Provenance
    replicas: tuple[ReplicaStatus, ...]
    gpus: tuple[GpuStatus, ...]
    notes: tuple[str, ...]
    qos: tuple[QosStatus, ...] = ()
    qos_by_priority: tuple[QosStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """What `set_budget` did: the budget in force, the one before, and how long until every cap was in force, s.

    `ended` names the schedule or signal that moved the budget before and does so no more.
    """

    budget_w: float
    before_w: float
    settled_s: float
    ended: str | None = None
