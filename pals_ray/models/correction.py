"""Online correction of a model's bias from live telemetry: one factor on throughput and one on power.

Each is an exponentially weighted mean of measured / predicted, clamped (as NVIDIA Dynamo's planner does). Throughput is
compared at the batch that ran, even if it is below the limit, but not for a few sequences, between which the engine may
have idled. Power is compared only while no cap binds, because a binding cap hides the natural draw. The model's own
uncertainty of throughput shrinks as evidence accumulates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from pals_ray.models.power_model import PowerModel, Prediction

_LOW, _HIGH = 0.5, 2.0
# A batch above this share of its limit counts as full, because requests come and go between two readings.
_SATURATED_SHARE = 0.95
# If the cap binds in more than this share of samples, the draw is the cap's, not the model's.
_BINDING_SHARE = 0.5
# An engine that runs at least so many sequences is never idle for long.
_BUSY = 4.0
# Weight of evidence from a batch below its limit: it swings between two readings, while rates are means.
_FREE_WEIGHT = 0.5
# Least share of the uncertainty that is kept: evidence at one point says less about points far from it.
_LEAST_DOUBT = 0.2


@dataclass(frozen=True, slots=True)
class Observation:
    """One beat of a replica: what it did over `interval_s` at an operating point that it held throughout.

    `running` is the mean over the same time as rates and watts. `idled` says that nothing ran at some instant of it;
    the rates then say little about the replica at work.
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
    """Factors on a model's throughput and power. `halving_s` s of new evidence halve the weight of the old.

    `seen_s` is how much evidence of throughput there has been, s.
    """

    throughput: float = 1.0
    power: float = 1.0
    halving_s: float = 10.0
    seen_s: float = 0.0

    @property
    def doubt(self) -> float:
        """The share of the model's relative standard deviation of throughput that is left."""
        return max(_LEAST_DOUBT, self.halving_s / (self.halving_s + self.seen_s))

    def updated(self, model: PowerModel, seen: Observation) -> tuple[Correction, str]:
        """The correction after one more observation, and why it moved or not.

        Both are compared at the batch that ran: throughput with less weight below the batch limit, power only while no
        cap binds.
        """
        if seen.interval_s <= 0.0 or seen.idled or seen.running < 1.0 or seen.power_w <= 0.0:
            return self, "nothing ran, or not all the time"
        said = model.predict(seen.cap_w, seen.running)
        weight = 1.0 - 0.5 ** (seen.interval_s / self.halving_s)
        saturated = seen.waiting > 0.0 or seen.running >= _SATURATED_SHARE * seen.batch_limit
        throughput, power, seen_s, notes = self.throughput, self.power, self.seen_s, []
        if seen.throughput_tokens_per_s > 0.0 and (saturated or seen.running >= _BUSY):
            part = 1.0 if saturated else _FREE_WEIGHT
            ratio = seen.throughput_tokens_per_s / float(said.throughput_tokens_per_s)
            throughput = _blend(throughput, ratio, 1.0 - (1.0 - weight) ** part)
            seen_s += part * seen.interval_s
            notes.append(f"throughput x{throughput:.2f}")
        else:
            notes.append("throughput kept: too little runs")
        if seen.binding_share > _BINDING_SHARE:
            notes.append("power kept: the cap binds, so the draw is the cap's")
        else:
            power = _blend(power, seen.power_w / float(said.power_w), weight)
            notes.append(f"power x{power:.2f}")
        return replace(self, throughput=throughput, power=power, seen_s=seen_s), ", ".join(notes)


def _blend(old: float, ratio: float, weight: float) -> float:
    """The mean of logs weighted exponentially; ratio and result are clamped, so one absurd reading moves little."""
    ratio = min(max(ratio, _LOW), _HIGH)
    return float(min(max(old ** (1.0 - weight) * ratio**weight, _LOW), _HIGH))


class CorrectedModel:
    """A `PowerModel` with a correction: throughput and power are multiplied, latencies divided by throughput's factor.

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
        throughput, power_w, *latencies, throughput_std, power_std = said.floats()
        corrected = (
            throughput * c.throughput,
            np.minimum(power_w * c.power, np.maximum(np.asarray(cap_w, dtype=np.float64) * self.num_gpus, power_w)),
            *(latency / c.throughput for latency in latencies),
            throughput_std * c.doubt,
            power_std,
        )
        return Prediction(*corrected, honours_cap=said.honours_cap)
