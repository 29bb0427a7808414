"""Parking replicas: the lowest priorities first, never a model's last one, and nobody comes and goes."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from pals_ray.control.allocation.replica_parking import ReplicaParking, to_park
from pals_ray.control.snapshot import Arrivals, Domain, Share
from pals_ray.types import Slo, Target
from policies import pals
from tests.support.builders import exact_prediction, fleet_snapshot, replica_snapshot


@dataclass(frozen=True)
class Slow:
    """A TTFT of 20 s x W over the cap; capacity grows with batch and cap."""

    def predict(self, cap_w, batch):
        cap_w, batch = np.broadcast_arrays(np.asarray(cap_w, float), np.asarray(batch, float))
        itl_s = 10 / cap_w
        return exact_prediction(batch / itl_s, cap_w, itl_s, 20 / cap_w)


def replica(name, model="chat", priority=0, demand=50.0, domain=None):
    """Its TTFT limit of 0.1 s takes 200 W: that is its least grant while it has demand."""
    target = Target(Slo(ttft_s=0.1), priority=priority)
    return replica_snapshot(name, demand=demand, model=model, domain=domain, max_batch=32, target=target)


def park(budget_w, *rows, now=frozenset(), domains=()):
    models = {row.model: Slow() for row in rows}
    return set(to_park(fleet_snapshot(budget_w, *rows, domains=domains), models, frozenset(now)))


ROWS = (
    replica("a1"),
    replica("a2"),
    replica("b1", "batch", priority=1),
    replica("b2", "batch", priority=1, demand=9.0),
)


def test_while_all_least_grants_fit_nobody_rests():
    assert park(830.0, *ROWS) == set()


@pytest.mark.parametrize(
    ("budget_w", "resting"), [(790.0, {"b2"}), (690.0, {"b2", "a1"}), (600.0, {"b2", "a1"}), (450.0, {"b2", "a1"})]
)
def test_the_lowest_priority_and_the_least_asked_rest_first_and_never_a_models_last(budget_w, resting):
    assert park(budget_w, *ROWS) == resting


def test_who_needs_no_more_than_the_lowest_cap_is_not_parked_in_vain():
    idle = tuple(replace(row, arrivals=Arrivals(0.0, 20.0)) for row in ROWS)
    assert park(400.0, *idle) == set()


def test_a_parked_replica_comes_back_only_with_some_watts_to_spare():
    assert park(820.0, *ROWS, now={"b2"}) == {"b2"}
    assert park(860.0, *ROWS, now={"b2"}) == set()


def test_a_domain_that_is_short_parks_its_own_replicas_only():
    rows = (replica("a1"), replica("a2"), replica("r1", domain="rack"), replica("r2", domain="rack"))
    assert park(2000.0, *rows, domains=(Domain("rack", 350.0),)) == {"r1"}


def test_a_parked_replica_gets_its_least_charge_one_sequence_and_the_lowest_cap():
    snapshot = fleet_snapshot(790.0, *ROWS)
    shares = ReplicaParking(pals.allocate)(snapshot, {"chat": Slow(), "batch": Slow()})
    assert shares["b2"] == Share(100.0, shares["b2"].reason, 100.0, 1, True)
    assert "parked" in shares["b2"].reason
    assert not any(share.parked for name, share in shares.items() if name != "b2")
    assert sum(share.charge_w for share in shares.values()) <= 790.0
