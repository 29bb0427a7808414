"""Online correction: what live telemetry says of a model's bias, as a factor on throughput and one on power.

An exponentially weighted mean of measured / predicted, clamped (as NVIDIA Dynamo's planner does). What a replica makes
of the batch that runs tells its capacity at that batch, whether there are free places or not; of one or two sequences
it does not, for then the engine may have idled between them. Where a cap binds the draw says nothing of the natural
one. The more has been seen, the less the model's own uncertainty of throughput counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from pals_ray.models.power_model import PowerModel, Prediction

_LOW, _HIGH = 0.5, 2.0
# Full within this share of the batch limit: requests come and go between two readings.
_SATURATED_SHARE = 0.95
# A cap that binds in more than this share of samples holds the draw, whatever the model says of it.
_BINDING_SHARE = 0.5
# With so many sequences an engine is never idle for long.
_BUSY = 4.0
# With free places the batch swings between two readings while rates are means: such evidence counts for so much.
_FREE_WEIGHT = 0.5
# What uncertainty is left at least: the point that is held says less of those far from it.
_LEAST_DOUBT = 0.2


@dataclass(frozen=True, slots=True)
class Observation:
    """One beat of a replica: what it did over `interval_s` at an operating point that it held throughout.

    `running` is the mean over the time that rates and watts are means of, `idled` whether nothing ran at some instant
    of it: then they say little of what the replica does at work.
    """

    cap_w: float
    batch_limit: int
    running: float
    waiting: float
    idled: bool
    throughput_tokens_per_s: float
    power_w: float
    binding_share: float
    interval_s: float


@dataclass(frozen=True, slots=True)
class Correction:
    """Factors on a model's throughput and power. `halving_s`: old evidence weighs half after so long of new.

    `seen_s` is how much evidence of throughput there has been, s.
    """

    throughput: float = 1.0
    power: float = 1.0
    halving_s: float = 10.0
    seen_s: float = 0.0

    @property
    def doubt(self) -> float:
        """What is left of the model's relative standard deviation of throughput, as a share."""
        return max(_LEAST_DOUBT, self.halving_s / (self.halving_s + self.seen_s))

    def updated(self, model: PowerModel, seen: Observation) -> tuple[Correction, str]:
        """The correction after one more observation, and why it moved or not.

        Both are compared at the batch that ran: throughput with less weight where there are free places, power only
        while no cap binds, for under a binding cap the draw is the cap's, not the model's.
        """
        if seen.interval_s <= 0.0 or seen.idled or seen.running < 1.0 or seen.power_w <= 0.0:
            return self, "nothing ran, or not all the time"
        said = model.predict(seen.cap_w, seen.running)
        weight = 1.0 - 0.5 ** (seen.interval_s / self.halving_s)
        saturated = seen.waiting > 0.0 or seen.running >= _SATURATED_SHARE * seen.batch_limit
        binding = seen.binding_share > _BINDING_SHARE
        throughput, power, notes = self.throughput, self.power, []
        seen_s = self.seen_s
        if seen.throughput_tokens_per_s > 0.0 and (saturated or seen.running >= _BUSY):
            part = 1.0 if saturated else _FREE_WEIGHT
            ratio = seen.throughput_tokens_per_s / float(said.throughput_tokens_per_s)
            throughput = _blend(throughput, ratio, 1.0 - (1.0 - weight) ** part)
            seen_s += part * seen.interval_s
            notes.append(f"throughput x{throughput:.2f}")
        else:
            notes.append("throughput kept: too little runs")
        if binding:
            notes.append("power kept: the cap binds, so the draw is the cap's")
        else:
            power = _blend(power, seen.power_w / float(said.power_w), weight)
            notes.append(f"power x{power:.2f}")
        return replace(self, throughput=throughput, power=power, seen_s=seen_s), ", ".join(notes)


def _blend(old: float, ratio: float, weight: float) -> float:
    """Exponentially weighted in logs, each ratio and the result clamped: one absurd reading moves little."""
    ratio = min(max(ratio, _LOW), _HIGH)
    return float(min(max(old ** (1.0 - weight) * ratio**weight, _LOW), _HIGH))


class CorrectedModel:
    """A `PowerModel` with a correction: throughput and power scaled, latencies by the time that throughput implies.

    A corrected draw never exceeds the cap where the uncorrected one honoured it.
    """

    def __init__(self, model: PowerModel, correction: Correction, num_gpus: int) -> None:
        self.model = model
        self.correction = correction
        self.num_gpus = num_gpus

    def predict(self, cap_w: ArrayLike, batch: ArrayLike) -> Prediction:
        """As the model predicts, corrected."""
        return self.corrected(cap_w, self.model.predict(cap_w, batch))

    def corrected(self, cap_w: ArrayLike, said: Prediction) -> Prediction:
        """What the model `said` at these caps, corrected."""
        c = self.correction
        ceiling_w = np.maximum(np.asarray(cap_w, dtype=np.float64) * self.num_gpus, said.power_w)
        return Prediction(
            throughput_tokens_per_s=said.throughput_tokens_per_s * c.throughput,
            power_w=np.minimum(said.power_w * c.power, ceiling_w),
            itl_p50_s=said.itl_p50_s / c.throughput,
            itl_p99_s=said.itl_p99_s / c.throughput,
            ttft_p50_s=said.ttft_p50_s / c.throughput,
            ttft_p99_s=said.ttft_p99_s / c.throughput,
            throughput_rel_std=said.throughput_rel_std * c.doubt,
            power_rel_std=said.power_rel_std,
            honours_cap=said.honours_cap,
        )
