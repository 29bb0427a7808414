"""What a policy sees of the fleet, and what it answers. All watts are at node level unless the name says GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pals_ray.models.power_model import PowerModel
from pals_ray.types import ReplicaTelemetry, Target


@dataclass(frozen=True, slots=True)
class Overhead:
    """Node watts that caps do not control: `a_w + b * GPU watts` per node (declared, or fitted from measurements)."""

    a_w: float = 0.0
    b: float = 0.0

    def charge_w(self, gpu_w: float, num_gpus: int, node_gpus: int) -> float:
        """Charge of `num_gpus` of a node's `node_gpus` managed GPUs that occupy `gpu_w` watts together, W."""
        return (1.0 + self.b) * gpu_w + self.a_w * num_gpus / node_gpus

    def gpu_w(self, charge_w: float, num_gpus: int, node_gpus: int) -> float:
        """The inverse: GPU watts that a charge pays for, W."""
        return (charge_w - self.a_w * num_gpus / node_gpus) / (1.0 + self.b)


@dataclass(frozen=True, slots=True)
class Domain:
    """A part of the fleet (rack, circuit) with a budget of its own, W. `parent` is None right below the fleet.

    Nodes whose `label` has this `value` are in it, unless a domain inside it has them; without a label none is.
    """

    name: str
    budget_w: float
    parent: str | None = None
    label: str | None = None
    value: str | None = None


@dataclass(frozen=True, slots=True)
class LatencyFactors:
    """What to multiply predicted latencies with: percentiles of TTFT, and the p99 of TPOT."""

    ttft_p50: float = 1.0
    ttft_p99: float = 1.0
    tpot_p99: float = 1.0


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What comes to a replica: requests/s, output tokens of the mean one, and the peakedness: variance over mean of the
    number that would run if none had to wait for another (1: Poisson).

    `strain` is what SLO feedback makes of it: a replica plans for so many times as much. `latency` says how much longer
    than predicted latencies are.
    """

    per_s: float
    output_tokens: float
    peakedness: float = 1.0
    strain: float = 1.0
    latency: LatencyFactors = field(default_factory=LatencyFactors)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens/s that they ask for."""
        return self.per_s * self.output_tokens

    def times(self, factor: float) -> Arrivals:
        """So many times as many requests."""
        return replace(self, per_s=factor * self.per_s)


@dataclass(frozen=True, slots=True)
class ReplicaCharges:
    """What the ledger says of one replica, W at node level, limits per GPU.

    `least_charge_w` and `most_charge_w` are its charge with every GPU at the device's lowest and highest limit, the
    clock floor's draw included, or what is reserved for it where it cannot be moved.
    """

    replica_id: str
    node_id: str
    domain: str | None
    num_gpus: int
    node_gpus: int
    min_limit_w: float
    max_limit_w: float
    least_charge_w: float
    most_charge_w: float
    grant_w: float
    charge_w: float


@dataclass(frozen=True, slots=True)
class ReplicaSnapshot(ReplicaCharges):
    """One replica as the manager knows it when it decides.

    `least_charge_w` and `most_charge_w` are its charge with every GPU at the device's lowest and highest limit (the
    clock floor's draw included). `natural_draw_w` is GPU watts of the whole group at its present batch if nothing
    capped it, measured or predicted; `arrivals` is what comes to it; both None before anything is known.
    """

    model: str
    max_batch: int
    overhead: Overhead = field(default_factory=Overhead)
    target: Target = field(default_factory=Target)
    telemetry: ReplicaTelemetry = field(default_factory=ReplicaTelemetry)
    natural_draw_w: float | None = None
    arrivals: Arrivals | None = None
    parked: bool = False

    @property
    def demand_tokens_per_s(self) -> float | None:
        """Output tokens/s that arrivals ask for; None before they are known."""
        return self.arrivals.tokens_per_s if self.arrivals is not None else None


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """The whole fleet at one instant.

    `budget_w` is the fleet's budget less its reserve; `parked_charge_w` what parked GPUs occupy, by domain name (None
    for those outside any domain). Domains' budgets are less their reserves too. `budget_moved_w`: how much the fleet's
    budget has risen since it was last divided, below 0 where it fell.
    """

    now_s: float
    budget_w: float
    replicas: tuple[ReplicaSnapshot, ...]
    domains: tuple[Domain, ...] = ()
    parked_charge_w: Mapping[str | None, float] = field(default_factory=dict)
    budget_moved_w: float = 0.0

    def available_w(self) -> float:
        """What the replicas may divide, W: the budget less all parked charge."""
        return self.budget_w - sum(self.parked_charge_w.values())


@dataclass(frozen=True, slots=True)
class Share:
    """A policy's answer for one replica: charge allowed, W, why, and what it pins (None: the agent chooses).

    `parked`: it gets no new requests while another replica of its model is awake.
    """

    charge_w: float
    reason: str
    pin_cap_w: float | None = None
    pin_batch_limit: int | None = None
    parked: bool = False

    @property
    def pins(self) -> tuple[float | None, int | None, bool]:
        """All that it says beside the watts."""
        return self.pin_cap_w, self.pin_batch_limit, self.parked


#: A policy is one pure function. It may answer for all replicas; one left out keeps its least charge.
Policy = Callable[[FleetSnapshot, Mapping[str, PowerModel]], Mapping[str, Share]]
