"""What a replica's model predicts over caps and batch sizes, asked for in one call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pals_ray.models.correction import CorrectedModel
from pals_ray.models.power_model import FloatArray, PowerModel, Prediction

#: Caps, and batch sizes for each doubling, at which a model is asked over a replica's whole range.
MENU_CAPS = 101
BATCHES_PER_OCTAVE = 4
#: Busy moments are taken to have so many standard deviations more sequences running than the mean; 2 % have more.
BUSY_SIGMAS = 2.0


@dataclass(frozen=True, slots=True)
class Surface:
    """A model's answers at C caps x B batch sizes; all replicas alike share one.

    `cap_w` (C,) per GPU and `batch` (B,) ascend; the others are (C, B). `capacity_tokens_per_s` is one standard
    deviation below the mean, so that a point said to serve its target mostly does; `power_w` is the whole group's.
    """

    cap_w: FloatArray
    batch: FloatArray
    capacity_tokens_per_s: FloatArray
    power_w: FloatArray
    itl_p99_s: FloatArray
    ttft_p50_s: FloatArray
    ttft_p99_s: FloatArray
    honours_cap: np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def predict_range(model: PowerModel, min_limit_w: float, max_limit_w: float, max_batch: int) -> Surface:
    """Ask a model for a replica's whole range of caps and batch sizes, in one call.

    Replicas of one model differ only in their corrections, so what the model itself answers is remembered.
    """
    if isinstance(model, CorrectedModel):
        cap_w, batch, answer = _whole_range(_ByIdentity(model.model), min_limit_w, max_limit_w, max_batch)
        return _surface(cap_w, batch, model.corrected(cap_w[:, None], answer))
    return _surface(*_whole_range(_ByIdentity(model), min_limit_w, max_limit_w, max_batch))


def predict_at(model: PowerModel, cap_w: FloatArray, batch: FloatArray) -> Surface:
    """A model's answers at these caps (C,) x batch sizes (B,), both ascending, in one call."""
    return _surface(cap_w, batch, model.predict(cap_w[:, None], batch[None, :]))


class _ByIdentity:
    """A key for a cache: models never change their answers, but need not be hashable."""

    def __init__(self, model: PowerModel) -> None:
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.model is self.model


@lru_cache(maxsize=32)
def _whole_range(
    key: _ByIdentity, min_limit_w: float, max_limit_w: float, max_batch: int
) -> tuple[FloatArray, FloatArray, Prediction]:
    cap_w = np.linspace(min_limit_w, max_limit_w, MENU_CAPS)
    octaves = np.arange(0, np.log2(max_batch), 1 / BATCHES_PER_OCTAVE)
    batch = np.unique(np.append(np.round(2**octaves), max_batch)).astype(float)
    return cap_w, batch, key.model.predict(cap_w[:, None], batch[None, :])


def _surface(cap_w: FloatArray, batch: FloatArray, p: Prediction) -> Surface:
    safe = np.maximum(p.throughput_tokens_per_s * (1 - p.throughput_rel_std), 0.0)
    return Surface(cap_w, batch, safe, p.power_w, p.itl_p99_s, p.ttft_p50_s, p.ttft_p99_s, p.honours_cap)
