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
    """Every constant of the controller. Shares are fractions; ranges are the device's (highest - lowest limit).

    `margin`: capacity is to exceed what is wanted by this share, and by `hysteresis` more where the cap is to fall.
    `guard`: a p99 above this share of its limit is near it. A move must better the served share by `least_gain` or
    save `least_saving` of the replica's GPU watts. A cap rises `raise_dwell_s` after the last change at the earliest
    and falls `cut_dwell_s` after it; it moves by at most `raise_slew_per_s` or `cut_slew_per_s` ranges for each second
    since. A batch limit falls after `raise_dwell_s`, rises after `cut_dwell_s`. Demand is smoothed with `demand_s`:
    the batch takes up what varies faster, so long as it has room; from `pressed` of the batch limit on, or with a
    queue, what arrived within `rush_s` counts, and a change by the factor `leap` is no noise: from `crowd` sequences on
    it asks for all that the highest cap makes of them. Under
    `silent_tokens_per_s` there is no demand. A cap that binds in fewer samples than `binding` while the draw is under
    `natural` of it does not bind. A curve falls from `fall` on. Under `spare` of the batch limit there is capacity to
    spare. KV use above `kv_high` lowers the batch limit by `kv_step`, at most every `kv_hold_s`; below `kv_low` it
    rises again. After a cut of the ceiling the cap comes back once the batch has drained, or after `drain_s`.
    Plans keep to `inside` of a latency limit (a bucket of the measured histograms is 10 % wide), for the highest tail
    of the last one to two `tail_hold_s`, smoothed with `tail_lag_s`. No time step counts for more than `most_step_s`.
    """

    gains: Gains = field(default_factory=Gains)
    margin: float = 0.05
    hysteresis: float = 0.03
    guard: float = 0.9
    inside: float = 0.97
    least_gain: float = 0.005
    least_saving: float = 0.01
    raise_dwell_s: float = 1.0
    cut_dwell_s: float = 3.0
    raise_slew_per_s: float = 0.5
    cut_slew_per_s: float = 0.1
    demand_s: float = 20.0
    rush_s: float = 2.0
    pressed: float = 0.9
    leap: float = 1.5
    crowd: int = 8
    silent_tokens_per_s: float = 1.0
    binding: float = 0.05
    natural: float = 0.95
    fall: float = 0.03
    spare: float = 0.7
    kv_high: float = 0.97
    kv_low: float = 0.8
    kv_step: float = 0.1
    kv_hold_s: float = 20.0
    drain_s: float = 20.0
    tail_hold_s: float = 60.0
    tail_lag_s: float = 3.0
    most_step_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision is made on. `ceiling_w` is the highest cap allowed, per GPU; `in_force_w` the lowest limit
    that the GPUs report, None where unknown.

    `target.throughput_tokens_per_s` is this replica's part. `model` is already corrected; None: not known yet.
    `largest_prompt` is the TTFT of the largest prompt expected relative to that of the model's workload. The latencies'
    `recent_p99_s` are over `recent_s`.
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
class Outcome:
    """What happened since the last decision: what it expected (None without a model), and what telemetry says now."""

    expected: Expected | None
    throughput_tokens_per_s: float
    node_w: float
    throughput_error: float | None


@dataclass(frozen=True, slots=True)
class ControllerState:
    """What the controller remembers: of fixed size. Times are s of the agent's monotonic clock.

    `need` is the feedback's factor on the capacity required. `demand_tokens_per_s` is smoothed over `demand_s`,
    `rush_tokens_per_s` over `rush_s`; so is `promised_tokens_per_s`, what the points in force were predicted to make.
    `made_tokens_per_s` is what the model, its margins included, takes the sequences that run for, over `demand_s`;
    for that long after a leap (`rose_s`) both follow within `rush_s`.
    """

    point: OperatingPoint | None = None
    last_s: float = 0.0
    cap_changed_s: float = 0.0
    batch_changed_s: float = 0.0
    demand_tokens_per_s: float | None = None
    rush_tokens_per_s: float | None = None
    promised_tokens_per_s: float | None = None
    made_tokens_per_s: float | None = None
    rose_s: float | None = None
    queue_since_s: float | None = None
    pid: PidState = field(default_factory=PidState)
    need: float = 1.0
    ttft: TailState = field(default_factory=TailState)
    itl: TailState = field(default_factory=TailState)
    kv_limit: int | None = None
    kv_changed_s: float = 0.0
    shed_s: float | None = None
    expected: Expected | None = None

    @property
    def made_share(self) -> float:
        """What the model takes the running sequences for, as a share of the demand that they are: 1 at most."""
        if not self.made_tokens_per_s or not self.demand_tokens_per_s:
            return 1.0
        return min(self.made_tokens_per_s / self.demand_tokens_per_s, 1.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """The operating point to order now, why, the prediction it was made on (None without a model), what came of the
    last one, and the state to keep."""

    point: OperatingPoint
    reason: str
    expected: Expected | None
    outcome: Outcome
    state: ControllerState
