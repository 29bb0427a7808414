"""The interface of every power-performance model, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A model's answer at each asked (cap, batch): arrays of the broadcast shape of the question.

    `throughput_tokens_per_s` is capacity (saturated) in output tokens/s of the whole replica, `power_w` the draw of
    all its GPUs together, latencies in seconds. `throughput_rel_std` and `power_rel_std` are one standard deviation
    relative to the value. `honours_cap` is False where the clock floor holds the draw above the cap.
    """

    throughput_tokens_per_s: FloatArray
    power_w: FloatArray
    itl_p50_s: FloatArray
    itl_p99_s: FloatArray
    ttft_p50_s: FloatArray
    ttft_p99_s: FloatArray
    throughput_rel_std: FloatArray
    power_rel_std: FloatArray
    honours_cap: NDArray[np.bool_] = field(kw_only=True)

    def floats(self) -> list[FloatArray]:
        """All its arrays but `honours_cap`, in their order: what `Prediction(*floats, honours_cap=...)` takes."""
        return [getattr(self, name) for name in self.__slots__[:-1]]


class PowerModel(Protocol):
    """Predicts a replica at any (power cap per GPU, W; batch limit), vectorised."""

    def predict(self, cap_w: ArrayLike, batch: ArrayLike) -> Prediction:
        """Broadcast `cap_w` (per GPU) against `batch`; every array of the answer has the broadcast shape."""
