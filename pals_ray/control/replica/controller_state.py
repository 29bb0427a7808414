"""What the replica's controller is told, decides and remembers, and its constants."""

from __future__ import annotations

from dataclasses import dataclass, field

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.replica.latency_feedback import TailState
from pals_ray.control.replica.throughput_feedback import Gains, PidState
from pals_ray.control.telemetry import RATE_S
from pals_ray.models.power_model import PowerModel
from pals_ray.types import Expected, OperatingPoint, ReplicaTelemetry, Target


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Every constant of the controller. A "range" is the device's highest limit less its lowest."""

    gains: Gains = field(default_factory=Gains)

    #: Capacity has to exceed what is wanted by this share, and by `hysteresis` more before the cap falls.
    margin: float = 0.05
    hysteresis: float = 0.03
    #: A p99 above this share of its limit is near it.
    near_limit_share: float = 0.9
    #: Plans keep to this share of a latency limit: a bucket of the measured histograms is 10 % wide.
    planned_limit_share: float = 0.97

    #: A new cap has to raise the served share by this, or to save `least_saving` of the replica's GPU watts.
    least_gain: float = 0.005
    least_saving: float = 0.01
    #: The cap rises no sooner than this after its last change. A batch limit falls no sooner after its own.
    raise_dwell_s: float = 1.0
    #: The cap falls no sooner than this after its last change. A batch limit rises no sooner after its own.
    cut_dwell_s: float = 3.0
    #: The cap moves by at most so many ranges for each second since its last change.
    raise_slew_per_s: float = 0.5
    cut_slew_per_s: float = 0.1

    #: Time constant of the smoothed demand. The batch takes up what varies faster, as long as it has room.
    demand_s: float = 20.0
    #: Time constant of the fast demand, which counts when requests wait or the batch is nearly full.
    fast_demand_s: float = 2.0
    #: A batch is nearly full when this share of its limit runs.
    nearly_full_share: float = 0.9
    #: A change of demand by this factor is no noise.
    jump_factor: float = 1.5
    #: From so many running sequences on, a jump asks for all that the highest cap makes of them.
    jump_min_running: int = 8
    #: Less than this is no demand.
    silent_tokens_per_s: float = 1.0

    #: A cap does not bind if it does so in a smaller share of samples than this ...
    least_binding_share: float = 0.05
    #: ... while the draw stays below this share of the cap.
    natural_share: float = 0.95
    #: The largest share of capacity that a larger batch may lose against a smaller one.
    most_capacity_loss: float = 0.03
    #: While a smaller share of the batch limit runs, there is capacity to spare.
    spare_share: float = 0.7

    #: KV use above this lowers the batch limit by `kv_step` of what runs; below `kv_low` the limit rises again.
    kv_high: float = 0.97
    kv_low: float = 0.8
    kv_step: float = 0.1
    #: The KV cache changes the batch limit at most so often.
    kv_hold_s: float = 20.0
    #: After a cut of the ceiling the cap comes back when the batch has drained, or after this time.
    drain_s: float = 20.0

    #: Plans use the highest excess of measured over predicted latency in the last one to two such periods.
    tail_hold_s: float = 60.0
    #: Time constant with which the factor on a latency follows that excess.
    tail_lag_s: float = 3.0
    #: No time step counts for more than this.
    most_step_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision is made on.

    `ceiling_w` is the highest cap allowed on each GPU, `in_force_w` the lowest limit that the GPUs report (None:
    unknown). `target.throughput_tokens_per_s` is this replica's part of its model's target. `model` is already
    corrected; None while there is no model. `largest_prompt` is the TTFT of the largest prompt expected, relative to
    the TTFT of the model's workload. The `recent_p99_s` of the latencies are over `recent_s`.
    """

    now_s: float
    ceiling_w: float
    in_force_w: float | None
    terms: ChargeTerms
    max_batch: int
    target: Target
    telemetry: ReplicaTelemetry
    model: PowerModel | None
    pin_cap_w: float | None = None
    pin_batch_limit: int | None = None
    largest_prompt: float = 1.0
    recent_s: float = RATE_S


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What the controller remembers, of fixed size. Times are s of the agent's monotonic clock.

    `need` is the throughput feedback's factor on the capacity required. `demand_tokens_per_s` is smoothed over
    `demand_s`, `fast_demand_tokens_per_s` over `fast_demand_s`. `predicted_tokens_per_s` is the capacity predicted for
    the points in force, smoothed over `fast_demand_s`. `modelled_tokens_per_s` is the demand that the sequences running
    stand for by the model with its margins, smoothed over `demand_s`. After a jump of demand (`jumped_s`) both slow
    ones follow within `fast_demand_s`, for as long as `demand_s`.
    """

    point: OperatingPoint | None = None
    last_s: float = 0.0
    cap_changed_s: float = 0.0
    batch_changed_s: float = 0.0
    demand_tokens_per_s: float | None = None
    fast_demand_tokens_per_s: float | None = None
    predicted_tokens_per_s: float | None = None
    modelled_tokens_per_s: float | None = None
    jumped_s: float | None = None
    queue_since_s: float | None = None
    pid: PidState = field(default_factory=PidState)
    need: float = 1.0
    ttft: TailState = field(default_factory=TailState)
    itl: TailState = field(default_factory=TailState)
    kv_limit: int | None = None
    kv_changed_s: float = 0.0
    ceiling_cut_s: float | None = None
    expected: Expected | None = None

    @property
    def modelled_share(self) -> float:
        """The demand that the running sequences stand for by the model, as a share of the demand seen: 1 at most."""
        if not self.modelled_tokens_per_s or not self.demand_tokens_per_s:
            return 1.0
        return min(self.modelled_tokens_per_s / self.demand_tokens_per_s, 1.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """The operating point to order now, why, and the state to keep; its `expected` is the prediction behind the point.

    What became of the point before is known from `state.expected` and the telemetry of the next decision.
    """

    point: OperatingPoint
    reason: str
    state: ControllerState
