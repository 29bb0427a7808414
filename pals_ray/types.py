"""Values that cross a process or folder boundary: frozen, with the unit in every name.

The module is longer than others because all of them are found in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


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
class Slo:
    """What is promised of a model's requests. Limits are s, None where there is none.

    A request is good within `ttft_s` (time to first token) and `tpot_s` (time per output token: (last token - first
    token) / (output tokens - 1)). Of those judged in `window_s` the share `attainment` is to be good. `itl_p99_s`
    limits the gaps between tokens, of which at most 1 % in the window may be longer; it makes no request late.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = 0.99
    window_s: float = 300.0
    itl_p99_s: float | None = None

    @property
    def judges(self) -> bool:
        """Whether a request can be late at all."""
        return self.ttft_s is not None or self.tpot_s is not None


@dataclass(frozen=True, slots=True)
class Target:
    """What the operator wants from a model.

    `throughput_tokens_per_s` is output tokens/s over all its replicas; None means all demand. A lower `priority` number
    is served first. `min_share` is the share of its target that a model keeps while higher classes are short;
    `burst_floor_w` a least grant per replica, W.
    """

    slo: Slo = field(default_factory=Slo)
    throughput_tokens_per_s: float | None = None
    priority: int = 0
    min_share: float = 0.0
    burst_floor_w: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Requests judged so far, counted: the good ones with their output tokens, and the late ones by what made them so.

    `late_failed` are those that failed by us. A request late by its TTFT is not judged by its TPOT any more.
    """

    good: int = 0
    late_ttft: int = 0
    late_tpot: int = 0
    late_failed: int = 0
    good_tokens: int = 0

    @property
    def late(self) -> int:
        """All late requests."""
        return self.late_ttft + self.late_tpot + self.late_failed

    @property
    def judged(self) -> int:
        """All requests judged."""
        return self.good + self.late

    @property
    def attainment(self) -> float | None:
        """The share of good requests; None before any was judged."""
        return self.good / self.judged if self.judged else None

    def __add__(self, other: Verdicts) -> Verdicts:
        return Verdicts(
            self.good + other.good,
            self.late_ttft + other.late_ttft,
            self.late_tpot + other.late_tpot,
            self.late_failed + other.late_failed,
            self.good_tokens + other.good_tokens,
        )

    def __sub__(self, other: Verdicts) -> Verdicts:
        return Verdicts(
            self.good - other.good,
            self.late_ttft - other.late_ttft,
            self.late_tpot - other.late_tpot,
            self.late_failed - other.late_failed,
            self.good_tokens - other.good_tokens,
        )


@dataclass(frozen=True, slots=True)
class EngineTelemetry:
    """One reading of a replica's engine: counters since engine start and gauges now.

    `arrived` requests have come in, `verdicts` are those judged (`pals_ray.control.slo`), `unjudged` have neither
    ended nor been judged. Histograms are cumulative
    counts over `LATENCY_EDGES_S` (one more count than edges: the last is overflow).
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
    arrived: int
    verdicts: Verdicts
    ttft_counts: tuple[int, ...]
    tpot_counts: tuple[int, ...]
    itl_counts: tuple[int, ...]
    steps: int = 0
    late_steps: int = 0
    modelled_s: float = 0.0
    wall_s: float = 0.0
    unjudged: int = 0


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
    """Percentiles of a latency over a window, s; None where nothing completed."""

    p50_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReplicaTelemetry:
    """What an agent saw of its replica over its last window: rates, latencies, power. W are GPU watts of the group.

    `running` and `waiting` are now; `running_mean` and `running_least` are over the window that rates are taken over.
    `arriving_per_s` are requests that came in over that window, and `arriving_long_per_s` over the longer one.
    `prompt_tokens` and `output_tokens` are those of the mean request; 0 before any has ended. `verdicts` are
    since engine start.
    """

    running: int = 0
    waiting: int = 0
    running_mean: float = 0.0
    running_least: int = 0
    kv_use: float = 0.0
    throughput_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    arriving_per_s: float = 0.0
    arriving_long_per_s: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    power_w: float = 0.0
    energy_j: float = 0.0
    tokens: int = 0
    verdicts: Verdicts = field(default_factory=Verdicts)
    ttft: Latency = field(default_factory=Latency)
    tpot: Latency = field(default_factory=Latency)
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
    attainment: float
    running: float
    node_w: float


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
class SloStatus:
    """What status and metrics show of a model, or of a priority class (`model` None, and no `slo`).

    `recent` are the requests judged in the SLO's window, `total` those since the start. `allowed` is how many of the
    recent ones may be late, and `error_budget_left` the share of those that are not: below 0 once there are more (None
    where no request can be late). `itl_over_share` is the share of token gaps in the window above `slo.itl_p99_s`.
    `under_target_share` is the share of intervals with work waiting at every look in which tokens/s were under the
    target, since the start. Shares are None where there was nothing to judge. `fastest_tpot_s` is what a model is
    predicted at with one sequence at the highest cap, None where nothing predicts it.
    """

    model: str | None
    priority: int
    slo: Slo | None
    recent: Verdicts
    total: Verdicts
    allowed: float
    error_budget_left: float | None
    itl_over_share: float | None
    under_target_share: float | None
    intervals: int
    fastest_tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The whole fleet. `measured_w` is the draw of all managed GPUs plus overhead, as their devices report it.

    `over_budget_w` and `over_budget_s` count measured draw above the budget: the worst excess and the time, since the
    manager started. `last_settle_s` is how long the last budget cut took until every cap was in force. `time_scale`
    is that of the virtual GPUs; None with real ones. `slos` says how each model keeps its SLO, `slos_by_priority` each
    class.
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
    slos: tuple[SloStatus, ...] = ()
    slos_by_priority: tuple[SloStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class BudgetChange:
    """What `set_budget` did: the budget in force, the one before, and how long until every cap was in force, s.

    `ended` names the schedule or signal that moved the budget before and does so no more.
    """

    budget_w: float
    before_w: float
    settled_s: float
    ended: str | None = None
