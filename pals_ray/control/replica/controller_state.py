"""What the replica's controller is told, decides and remembers, and its constants."""

from __future__ import annotations

from dataclasses import dataclass, field

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.replica.demand import DemandState
from pals_ray.control.replica.latency_feedback import LatencyFeedback
from pals_ray.control.replica.slo_feedback import SloFeedback
from pals_ray.control.snapshot import Arrivals
from pals_ray.models.power_model import PowerModel
from pals_ray.types import Expected, OperatingPoint, ReplicaTelemetry, Target


@dataclass(frozen=True, slots=True)
class Gains:
    """PID on the relative error e = 1 - served / wanted; the output is a factor exp(u), u from -0.03 to log 2.

    `proportional` is u per unit of e, `integral_per_s` u per unit and second, `derivative_s` u per unit/s. Errors
    within `dead_band` count as none; a larger one must have lasted `persist_s` before it counts. While there is no
    error to see but capacity to spare, the integral decays with `unwind_s`. The throughput behind e is a mean over
    5 s, so the integral must stay well below 1 / 2.5 s, the inverse of its delay.
    """

    proportional: float = 0.3
    integral_per_s: float = 0.1
    derivative_s: float = 0.3
    dead_band: float = 0.003
    persist_s: float = 1.5
    unwind_s: float = 20.0


@dataclass(frozen=True, slots=True)
class PidState:
    """The integral (of log factor), the error last seen, and since when it has been beyond the dead band, s."""

    integral: float = 0.0
    error: float | None = None
    beyond_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Every constant of the controller. A "range" is the device's highest limit less its lowest."""

    gains: Gains = field(default_factory=Gains)

    #: Capacity has to exceed demand by this share. A lower cap has to do for `hysteresis` more demand.
    margin: float = 0.03
    hysteresis: float = 0.03

    #: A new cap has to raise the score by this share, or to save `least_saving` of the replica's GPU watts.
    least_gain: float = 0.005
    least_saving: float = 0.002
    #: The cap rises no sooner than this after its last change. A batch limit falls no sooner after its own.
    raise_dwell_s: float = 1.0
    #: The cap falls no sooner than this after its last change. A batch limit rises no sooner after its own.
    cut_dwell_s: float = 3.0
    #: The cap moves by at most so many ranges for each second since its last change.
    raise_slew_per_s: float = 0.5
    cut_slew_per_s: float = 0.1

    #: Time constant of the throughput that is compared with the prediction.
    predicted_s: float = 2.0
    #: A cap does not bind if it does so in a smaller share of samples than this ...
    least_binding_share: float = 0.05
    #: ... while the draw stays below this share of the cap.
    natural_share: float = 0.95
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
    #: No time step counts for more than this.
    most_step_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision is made on.

    `ceiling_w` is the highest cap allowed on each GPU, `in_force_w` the lowest limit that the GPUs report (None:
    unknown). `target.throughput_tokens_per_s` is this replica's part of its model's target. `model` is already
    corrected; None while there is no model. `alike` is what comes to the model's replicas that are alike, in the mean.
    """

    now_s: float
    ceiling_w: float
    in_force_w: float | None
    terms: ChargeTerms
    max_batch: int
    target: Target
    telemetry: ReplicaTelemetry
    model: PowerModel | None
    alike: Arrivals | None = None
    pin_cap_w: float | None = None
    pin_batch_limit: int | None = None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What the controller remembers, of fixed size. Times are s of the agent's monotonic clock.

    `step_s` is the time since the decision before, `need` the throughput feedback's factor on the capacity required.
    `predicted_tokens_per_s` is the capacity predicted for the points in force, smoothed over `predicted_s`. `servable`
    says whether some point within the ceiling was predicted to keep the targets.
    """

    point: OperatingPoint | None = None
    last_s: float = 0.0
    step_s: float = 0.0
    cap_changed_s: float = 0.0
    batch_changed_s: float = 0.0
    demand: DemandState = field(default_factory=DemandState)
    slo: SloFeedback = field(default_factory=SloFeedback)
    latency: LatencyFeedback = field(default_factory=LatencyFeedback)
    servable: bool = True
    predicted_tokens_per_s: float | None = None
    queue_since_s: float | None = None
    pid: PidState = field(default_factory=PidState)
    need: float = 1.0
    kv_limit: int | None = None
    kv_changed_s: float = 0.0
    ceiling_cut_s: float | None = None
    expected: Expected | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The operating point to order now, why, and the state to keep; its `expected` is the prediction behind the point.

    What became of the point before is known from `state.expected` and the telemetry of the next decision.
    """

    point: OperatingPoint
    reason: str
    state: ControllerState
