"""Two raylets as two nodes: one budget over both, and domains by node label."""

import psutil
import pytest

from tests.support.fleets import sampled_limits, wait_for

RACKS = [
    {"name": "row", "budget_w": 1500},
    {"name": "rack-a", "budget_w": 700, "parent": "row", "label": "rack", "value": "a"},
    {"name": "rack-b", "budget_w": 1000, "parent": "row", "label": "rack", "value": "b"},
]


@pytest.fixture
def second(cluster):
    node = cluster.add_node(num_cpus=2, num_gpus=0)
    yield node
    cluster.remove_node(node)


def test_domains_by_node_label_hold_each_rack_and_the_row(fleet, second):
    fleet.configure(3000, domains=RACKS)
    key_b = f"{fleet.key}-b"
    here = fleet.replica(2, labels={"rack": "a"})
    there = fleet.replica(2, node_id=second.node_id, key=key_b, labels={"rack": "b"})
    fleet.register(here, there)
    a, b = fleet.gpus, fleet.gpus_of(key_b)

    def watts(gpus):
        return sum(gpu.limit_w() for gpu in gpus)

    with sampled_limits(a) as in_a, sampled_limits(b) as in_b, sampled_limits([*a, *b]) as in_row:
        here.claim([gpu.uuid for gpu in a[:2]])
        there.claim([gpu.uuid for gpu in b[:2]])
        wait_for(lambda: watts(a) > 699 and watts(b) > 799, 10, "what the domains allow is not handed out", 0.05)
        fleet.configure(3000, domains=[{**RACKS[0], "budget_w": 1100}, *RACKS[1:]])
        wait_for(lambda: watts([*a, *b]) <= 1100.01, 5, "the row's new budget is not kept", 0.02)
        wait_for(lambda: watts([*a, *b]) > 1095, 10, "what the row's new budget leaves is not handed out", 0.05)
    assert in_a.worst_after(0) <= 700.01
    assert in_b.worst_after(0) <= 1000.01
    assert in_row.worst_after(0) <= 1500.01
    assert {row.node_id for row in fleet.status().replicas} == {fleet.node_id, second.node_id}


def test_a_node_that_does_not_fit_the_budget_is_refused_with_the_watts_and_the_first_goes_on(fleet, second):
    fleet.configure(700)
    (here,) = fleet.serve(1)
    before = fleet.limits_w()
    key_b = f"{fleet.key}-b"
    there = fleet.replica(1, node_id=second.node_id, key=key_b)
    with pytest.raises(Exception, match="800 W needed"):
        fleet.register(there)
    assert [row.replica_id for row in fleet.status().replicas] == [here.id]
    wait_for(lambda: fleet.limits_w() == before, 3, "the first node lost its watts", 0.05)
    assert [gpu.limit_w() for gpu in fleet.gpus_of(key_b)] == [400] * 4, "a refused node was touched"


def test_a_node_whose_raylet_is_gone_is_forgotten_and_its_watts_are_handed_on(fleet, second):
    fleet.configure(1200)
    key_b = f"{fleet.key}-b"
    here, there = fleet.replica(2), fleet.replica(2, node_id=second.node_id, key=key_b)
    fleet.register(here, there)
    for replica, gpus in ((here, fleet.gpus), (there, fleet.gpus_of(key_b))):
        replica.claim([gpu.uuid for gpu in gpus[:2]])
    wait_for(lambda: fleet.limits_w() == [200, 200, 100, 100], 10, "the watts are not handed out", 0.05)
    psutil.Process(second.all_processes["raylet"][0].process.pid).kill()
    there.kill()
    took_s = wait_for(lambda: fleet.limits_w() == [400, 400, 100, 100], 20, "its watts are not handed on", 0.05)
    print(f"\nhanded on {took_s:.1f} s after the raylet was killed")
    status = fleet.status()
    assert [row.replica_id for row in status.replicas] == [here.id]
    assert {gpu.node_id for gpu in status.gpus} == {fleet.node_id}
