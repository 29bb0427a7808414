"""The budget on a real cluster: real agents, manager and guardian, and replicas that only sleep."""

import math
import threading
import time

import pytest

from pals_ray.errors import InfeasibleBudget, PalsError
from tests.support.dummies import MAX_BATCH, DummyFleet
from tests.support.fleets import sampled_limits, wait_for

LOWEST_W, HIGHEST_W = 100, 400


def test_all_gpus_are_parked_before_an_engine_may_start_and_rise_only_once_claimed(fleet):
    fleet.configure(900)
    replica = fleet.replica(num_gpus=2)
    fleet.register(replica)
    assert fleet.limits_w() == [LOWEST_W] * 4
    (row,) = fleet.status().replicas
    assert (row.state, row.gpus, row.charge_w) == ("starting", (), 0)
    assert fleet.status().parked_w == 4 * LOWEST_W
    with sampled_limits(fleet.gpus) as samples:
        replica.claim([fleet.gpus[1].uuid, fleet.gpus[2].uuid])
        wait_for(lambda: fleet.limits_w() == [LOWEST_W, 350, 350, LOWEST_W], 10, "it is not raised", 0.02)
    assert samples.worst_after(0) <= 900
    wait_for(lambda: fleet.of(replica).cap_w == 350, 2, "its beat does not say so", 0.05)
    row = fleet.of(replica)
    assert (row.state, row.gpus, row.cap_w, row.charge_w) == ("serving", replica.gpus, 350, 700)
    assert row.batch_limit == replica.block.field("batch_limit")[0] == MAX_BATCH


def test_the_sum_of_limits_keeps_within_every_budget_through_cuts_and_raises(fleet):
    fleet.configure(1200)
    one, two, three = fleet.serve(1, 2, 1)
    assert sum(fleet.limits_w()) == pytest.approx(1200, abs=1)
    with sampled_limits(fleet.gpus) as samples:
        calls = []
        for budget_w in (450, 1600, 800, 401, 1200, 400, 1000):
            began_s = time.monotonic()
            change = fleet.fleet.set_budget(budget_w)
            returned_s = time.monotonic()
            calls.append((budget_w, began_s, returned_s))
            assert (change.budget_w, fleet.status().budget_w) == (budget_w, budget_w)
            assert sum(fleet.limits_w()) <= budget_w + 0.01
    ends_s = [began_s for _, began_s, _ in calls[1:]] + [math.inf]
    for (budget_w, began_s, returned_s), end_s in zip(calls, ends_s, strict=True):
        late_s = samples.last_over(budget_w, began_s, end_s)
        print(f"\n{budget_w} W: kept {late_s:.3f} s after the call, which returned after {returned_s - began_s:.3f} s")
        assert late_s <= returned_s - began_s
        assert late_s < 0.5
    wait_for(lambda: sum(fleet.limits_w()) > 999, 5, "what is free is not handed out")
    assert len(set(fleet.limits_w())) == 1, "an even split is not even"
    assert {row.replica_id for row in fleet.status().replicas} == {one.id, two.id, three.id}


class TestRefusals:
    """On one fleet, which none of these may change."""

    @pytest.fixture(scope="class")
    @staticmethod
    def fleet(cluster, tmp_path_factory):
        made = DummyFleet(tmp_path_factory.mktemp("state"))
        made.configure(700)
        made.serve(2)
        yield made
        made.close()

    @pytest.mark.parametrize(
        ("budget_w", "error", "says"),
        [
            (399, InfeasibleBudget, "400 W needed"),
            (0.001, InfeasibleBudget, "400 W needed"),
            (-5, PalsError, "-5"),
            (0, PalsError, "positive"),
            (math.nan, PalsError, "nan"),
            (math.inf, PalsError, "inf"),
            ("plenty", PalsError, "plenty"),
            ("1200", PalsError, "1200"),
            (True, PalsError, "True"),
            (None, PalsError, "None"),
        ],
    )
    def test_a_budget_that_cannot_be_is_refused_and_changes_nothing(self, fleet, budget_w, error, says):
        before = fleet.status()
        with pytest.raises(error, match=says):
            fleet.fleet.set_budget(budget_w)
        after = fleet.status()
        assert (after.budget_w, after.charge_w) == (before.budget_w, before.charge_w)
        assert fleet.limits_w() == [250, 250, 100, 100]


def test_calls_at_once_leave_one_of_the_budgets_in_force(fleet):
    fleet.configure(1200)
    fleet.serve(2, 2)
    done = []
    asked_w = [450, 1500, 600, 500, 1100]
    threads = [threading.Thread(target=lambda w=w: done.append(fleet.fleet.set_budget(w).budget_w)) for w in asked_w]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == sorted(asked_w)
    last_w = fleet.status().budget_w
    assert last_w in asked_w
    wait_for(lambda: last_w - 1 < sum(fleet.limits_w()) <= last_w + 0.01, 5, "the last budget is not what is used")
