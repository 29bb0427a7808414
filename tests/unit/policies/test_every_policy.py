"""What every policy must hold, whatever it optimises."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.control.allocation.budget_tree import BudgetTree
from pals_ray.control.snapshot import Arrivals, Domain, FleetSnapshot, Overhead, ReplicaSnapshot
from pals_ray.types import ReplicaTelemetry, Slo, Target
from tests.support.builders import StubModel

POLICIES = ["uniform", "proportional", "batch_only", "power_only", "slack_steal", "pals", "exact"]


@st.composite
def snapshots(draw):
    """A fleet in up to three nested domains whose least charges fit every budget."""
    overhead = Overhead(draw(st.floats(0, 400)), draw(st.floats(0, 0.3)))
    parents = {"hall": None, "rack1": "hall", "rack2": "hall"}
    names = draw(st.sampled_from([(), ("hall",), ("hall", "rack1", "rack2")]))
    replicas = []
    for i in range(draw(st.integers(1, 8))):
        gpus = draw(st.sampled_from([1, 2, 4, 8]))
        low, high = draw(st.sampled_from([(100, 300), (100, 400), (200, 700), (200, 1000)]))
        least, most = (overhead.charge_w(gpus * w, gpus, 8) for w in (low, high))
        replicas.append(
            ReplicaSnapshot(
                replica_id=f"r{i}",
                model=draw(st.sampled_from(["dense", "moe"])),
                node_id=f"n{i}",
                domain=draw(st.sampled_from([None, *names])),
                num_gpus=gpus,
                node_gpus=8,
                min_limit_w=low,
                max_limit_w=high,
                least_charge_w=least,
                most_charge_w=most,
                grant_w=draw(st.floats(least, most)),
                charge_w=draw(st.floats(least, most)),
                max_batch=draw(st.sampled_from([8, 64, 256])),
                overhead=overhead,
                target=Target(
                    Slo(*(draw(st.none() | st.floats(0.01, 1)) for _ in range(2))),
                    throughput_tokens_per_s=draw(st.none() | st.floats(0, 2000)),
                    priority=draw(st.integers(0, 2)),
                    min_share=draw(st.floats(0, 1)),
                    burst_floor_w=draw(st.floats(0, 3000)),
                    weight=draw(st.floats(0.1, 5)),
                ),
                telemetry=ReplicaTelemetry(
                    running=draw(st.integers(0, 64)),
                    waiting=draw(st.integers(0, 64)),
                    binding_share=draw(st.sampled_from([0.0, 1.0])),
                ),
                natural_draw_w=draw(st.none() | st.floats(50 * gpus, high * gpus)),
                arrivals=draw(st.none() | st.builds(Arrivals, st.floats(0, 50), st.floats(1, 500))),
                parked=draw(st.booleans()),
            )
        )
    parked_w = {name: draw(st.floats(0, 500)) for name in draw(st.sets(st.sampled_from([None, *names])))}

    def below(name):
        inside = {name} | {n for n, p in parents.items() if p == name}
        inside |= {n for n, p in parents.items() if p in inside} | (set(names) | {None} if name is None else set())
        mine = [r for r in replicas if r.domain in inside]
        least = sum(r.least_charge_w for r in mine)
        most = sum(r.most_charge_w for r in mine)
        return sum(w for n, w in parked_w.items() if n in inside) + least + draw(st.floats(0, 1.1)) * (most - least)

    domains = tuple(Domain(n, below(n), parents[n]) for n in names)
    return FleetSnapshot(0.0, below(None), tuple(replicas), domains, parked_w)


@pytest.mark.parametrize("name", POLICIES)
@given(snapshot=snapshots())
@settings(max_examples=40)
def test_gives_each_replica_its_least_and_keeps_every_budget(name, snapshot):
    models = {"moe": StubModel(), "r0": StubModel(speed=30.0)}  # some replicas have none
    shares = importlib.import_module(f"policies.{name}").allocate(snapshot, models)
    spent_w = {None: 0.0} | {d.name: 0.0 for d in snapshot.domains}
    parent = {d.name: d.parent for d in snapshot.domains}
    for r in snapshot.replicas:
        share = shares[r.replica_id]
        assert share.charge_w >= r.least_charge_w - 1e-6
        assert share.charge_w <= (r.least_charge_w if r.parked else r.most_charge_w) + 1e-6
        assert share.reason
        domain = r.domain
        while domain is not None:
            spent_w[domain] += share.charge_w
            domain = parent[domain]
        spent_w[None] += share.charge_w
    assert spent_w[None] <= snapshot.available_w() + 1e-6
    tree = BudgetTree.of(snapshot)
    for name_, budget_w in zip(tree.names[1:], tree.budget_w[1:], strict=True):
        assert spent_w[name_] <= budget_w + 1e-6
