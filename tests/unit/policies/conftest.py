"""A small fleet and a model with the shape of decode: flat in the cap above its draw, then a cliff."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from pals_ray.control.snapshot import ReplicaSnapshot
from pals_ray.models.power_model import Prediction


@dataclass(frozen=True)
class StubModel:
    """Capacity `speed x batch / (1 + batch / 32)`, slowed below the draw `80 W + 4 W x batch` a GPU; exact."""

    speed: float = 10.0
    num_gpus: int = 1

    def predict(self, cap_w, batch):
        cap_w, batch = np.broadcast_arrays(np.asarray(cap_w, float), np.asarray(batch, float))
        draw_w = 80 + 4 * batch
        slowed = np.minimum(cap_w / draw_w, 1.0)
        capacity = self.speed * batch / (1 + batch / 32) * slowed
        itl_s, ttft_s = batch / capacity, 20 / cap_w
        zero = np.zeros_like(cap_w)
        return Prediction(
            throughput_tokens_per_s=capacity,
            power_w=self.num_gpus * np.minimum(cap_w, draw_w),
            itl_p50_s=itl_s,
            itl_p99_s=itl_s,
            ttft_p50_s=ttft_s,
            ttft_p99_s=ttft_s,
            throughput_rel_std=zero,
            power_rel_std=zero,
            honours_cap=np.ones(cap_w.shape, dtype=bool),
        )


@pytest.fixture(scope="session")
def stub_model():
    return StubModel


@pytest.fixture(scope="session")
def make_replica():
    """A replica on 100-400 W GPUs without overhead, at its least grant."""

    def make(name="r", *, gpus=1, demand=None, **changes):
        plain = ReplicaSnapshot(
            replica_id=name,
            model="m",
            node_id="n",
            domain=None,
            num_gpus=gpus,
            node_gpus=8,
            min_limit_w=100,
            max_limit_w=400,
            least_charge_w=100 * gpus,
            most_charge_w=400 * gpus,
            grant_w=100 * gpus,
            charge_w=100 * gpus,
            max_batch=64,
            demand_tokens_per_s=demand,
        )
        return replace(plain, **changes)

    return make
