"""Snapshots, grants, charge terms and models for unit tests: plain functions whose defaults suit most of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.snapshot import Arrivals, Domain, FleetSnapshot, Overhead, ReplicaSnapshot
from pals_ray.models.power_model import Prediction
from pals_ray.types import Grant

#: Output tokens of a snapshot's mean request.
OUTPUT_TOKENS = 20.0


@dataclass(frozen=True)
class StubModel:
    """The shape of decode: capacity `speed x batch / (1 + batch / 32)`, exact, and flat in the cap above its draw.

    Below the draw `80 W + 4 W x batch` a GPU it is slowed in proportion.
    """

    speed: float = 10.0
    num_gpus: int = 1

    def predict(self, cap_w, batch):
        cap_w, batch = np.broadcast_arrays(np.asarray(cap_w, float), np.asarray(batch, float))
        draw_w = 80 + 4 * batch
        slowed = np.minimum(cap_w / draw_w, 1.0)
        capacity = self.speed * batch / (1 + batch / 32) * slowed
        itl_s, ttft_s = batch / capacity, 20 / cap_w
        return exact_prediction(capacity, self.num_gpus * np.minimum(cap_w, draw_w), itl_s, ttft_s)


def exact_prediction(capacity_tokens_per_s, power_w, itl_s, ttft_s) -> Prediction:
    """A prediction without any uncertainty, whose p50 and p99 are the same and whose caps are honoured."""
    none = np.zeros_like(ttft_s)
    honoured = np.ones(ttft_s.shape, dtype=bool)
    return Prediction(capacity_tokens_per_s, power_w, itl_s, itl_s, ttft_s, ttft_s, none, none, honours_cap=honoured)


def replica_snapshot(name: str = "r", *, gpus: int = 1, demand: float | None = None, **changes) -> ReplicaSnapshot:
    """A replica on 100-400 W GPUs without overhead, at its least grant."""
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
        arrivals=None if demand is None else Arrivals(demand / OUTPUT_TOKENS, OUTPUT_TOKENS),
    )
    return replace(plain, **changes)


def fleet_snapshot(
    budget_w: float, *replicas: ReplicaSnapshot, domains: tuple[Domain, ...] = (), now_s: float = 0.0, **more
) -> FleetSnapshot:
    """A fleet of these replicas under a budget, W."""
    return FleetSnapshot(now_s, budget_w, replicas, domains, **more)


def charge_terms(gpus: int = 1, node_gpus: int = 8, overhead: Overhead | None = None, **more) -> ChargeTerms:
    """Terms of a group of 100-400 W GPUs, without overhead or clock floors unless given."""
    usual = {"min_limit_w": 100.0, "max_limit_w": 400.0, "floors_w": (0.0,) * gpus}
    return ChargeTerms(overhead or Overhead(), node_gpus, **(usual | more))


def grant(
    epoch: int = 1, seq: int = 1, charge_w: float = 500.0, lease_s: float = 5.0, replica_id: str = "r", **more
) -> Grant:
    """A grant to a replica `r`."""
    return Grant(replica_id, epoch, seq, charge_w, lease_s, "a share", **more)
