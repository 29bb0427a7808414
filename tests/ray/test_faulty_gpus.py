"""GPUs that fail: an order that does not take, a limit set past the driver, a lost device."""

import pytest

from tests.support.dummies import DummyFleet
from tests.support.fleets import sampled_limits, wait_for


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    made = DummyFleet(tmp_path_factory.mktemp("state"))
    yield made
    made.close()


@pytest.fixture
def pair(shared):
    """A replica on two GPUs, under a budget that lets it have 200 W each."""
    shared.configure(600)
    shared.fleet.set_budget(600)  # the same configuration again keeps what a test has set since
    (replica,) = shared.serve(2)
    assert shared.limits_w(replica.gpus) == [200, 200]
    yield shared, replica
    for gpu in shared.gpus:
        gpu.failing_sets, gpu.lost, gpu.out_of_band_limit_w = 0, False, float("inf")


def _gpus(fleet, replica):
    return [gpu for gpu in fleet.gpus if gpu.uuid in replica.gpus]


def _told(fleet, replica):
    """All that status says for an operator to read."""
    return " ".join((fleet.of(replica).reason, *fleet.status().notes))


@pytest.mark.parametrize("index", [0, 1])
def test_a_failing_order_holds_the_group_together_and_status_names_the_gpu(pair, index):
    fleet, replica = pair
    bad = _gpus(fleet, replica)[index]
    bad.failing_sets = 1_000_000
    fleet.fleet.set_budget(1000)
    wait_for(lambda: bad.uuid in _told(fleet, replica), 5, "status does not name it", 0.05)
    assert "could not set its power limit" in _told(fleet, replica)
    with sampled_limits(_gpus(fleet, replica)) as samples:
        wait_for(lambda: len(samples.rows) > 150, 10, "no samples")
    assert samples.worst_after(0) == 400, "the others rise over and over"
    bad.failing_sets = 0
    wait_for(lambda: fleet.limits_w(replica.gpus) == [400, 400], 5, "it does not rise once orders take", 0.05)
    wait_for(lambda: bad.uuid not in _told(fleet, replica), 5, "status names it still", 0.05)


def test_a_cut_that_fails_keeps_its_watts_charged_until_it_takes(pair):
    fleet, replica = pair
    bad = _gpus(fleet, replica)[0]
    bad.failing_sets = 1_000_000
    with pytest.raises(Exception, match=r"awaited|waiting for") as refused:
        fleet.fleet.set_budget(500)
    assert replica.id in str(refused.value)
    assert fleet.limits_w(replica.gpus) == [200, 150]
    assert fleet.status().charge_w == 550
    bad.failing_sets = 0
    wait_for(lambda: fleet.limits_w(replica.gpus) == [150, 150], 5, "it does not come down once orders take", 0.05)
    wait_for(lambda: fleet.status().charge_w == 500, 5, "it is charged for what it has released", 0.05)


@pytest.mark.parametrize("index", [0, 1])
def test_an_out_of_band_limit_holds_the_whole_group_and_status_names_the_gpu(pair, index):
    fleet, replica = pair
    bad = _gpus(fleet, replica)[index]
    bad.out_of_band_limit_w = 150.0
    wait_for(lambda: fleet.limits_w(replica.gpus) == [150, 150], 5, "the group is not held together", 0.02)
    wait_for(lambda: bad.uuid in _told(fleet, replica), 5, "status does not name it", 0.05)
    with sampled_limits(_gpus(fleet, replica)) as samples:
        wait_for(lambda: len(samples.rows) > 150, 10, "no samples")
    assert samples.worst_after(0) == 300, "the other rises over and over"
    bad.out_of_band_limit_w = float("inf")
    wait_for(lambda: fleet.limits_w(replica.gpus) == [200, 200], 5, "it does not rise again", 0.05)


def test_while_a_gpu_is_lost_the_others_of_its_group_do_not_rise(pair):
    fleet, replica = pair
    bad, good = _gpus(fleet, replica)
    bad.lost = True
    wait_for(lambda: bad.uuid in _told(fleet, replica), 5, "status does not name it", 0.05)
    fleet.manager.set_budget.remote(1000)
    wait_for(lambda: fleet.status().budget_w == 1000, 5, "the budget is not set", 0.05)
    with sampled_limits([good]) as samples:
        wait_for(lambda: len(samples.rows) > 200, 10, "no samples")
    assert samples.worst_after(0) == 200
    fleet.manager.set_budget.remote(400)
    wait_for(lambda: good.limit_w() == 100, 5, "the other does not come down", 0.02)
    bad.lost = False
    wait_for(lambda: fleet.limits_w(replica.gpus) == [100, 100], 20, "they are not brought together again", 0.05)


def test_a_parked_gpu_that_somebody_raises_is_brought_down_again(pair):
    fleet, replica = pair
    free = next(gpu for gpu in fleet.gpus if gpu.uuid not in replica.gpus)
    free.set_limit_w(300)
    wait_for(lambda: free.limit_w() == 100, 3, "it stays up", 0.02)
