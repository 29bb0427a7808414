"""Asking the policy: when an answer is sent on, and what the policy is told of the budget."""

from dataclasses import replace

import pytest

from pals_ray.control.allocation.policy_runner import PolicyRunner
from pals_ray.control.snapshot import Share
from policies import static
from tests.support.builders import fleet_snapshot, replica_snapshot

REPLICA = replica_snapshot(node_gpus=1, charge_w=300, max_batch=32)


class Scripted:
    """A policy that answers what the test says, and keeps what it was asked."""

    def __init__(self, charge_w=300.0):
        self.charge_w = charge_w
        self.seen = []

    def __call__(self, snapshot, models):
        self.seen.append(snapshot)
        return {"r": Share(self.charge_w, "so says the test")}


@pytest.fixture
def policy():
    return Scripted()


@pytest.fixture
def runner(policy):
    return PolicyRunner("test:allocate", policy)


def at(budget_w, grant_w=300.0):
    return fleet_snapshot(budget_w, replace(REPLICA, grant_w=grant_w))


def test_shares_near_the_present_grants_are_not_worth_a_driver_call(runner, policy):
    assert runner.shares(at(900), {}) is not None
    policy.charge_w = 303.0
    assert runner.shares(at(900), {}) is None
    policy.charge_w = 310.0
    assert runner.shares(at(900), {})["r"].charge_w == 310


def test_a_budget_that_moved_is_shared_out_however_little_it_moved(runner, policy):
    runner.shares(at(900), {})
    policy.charge_w = 301.0
    assert runner.shares(at(901), {})["r"].charge_w == 301
    assert runner.shares(at(901), {}) is None


def test_a_policy_is_told_how_far_the_budget_has_moved_since_it_was_last_divided(runner, policy):
    for budget_w in (900, 900, 901, 901, 700):
        runner.shares(at(budget_w), {})
    assert [snapshot.budget_moved_w for snapshot in policy.seen] == [0, 0, 1, 0, -201]


def test_a_policy_that_fails_leaves_everything_as_it_is_and_says_so_until_it_does_no_more():
    def fails(snapshot, models):
        if snapshot.budget_w > 500:
            raise ZeroDivisionError("by nothing")
        return {"r": Share(200.0, "fine again")}

    runner = PolicyRunner("mine:allocate", fails)
    assert runner.shares(at(900), {}) is None
    assert runner.notes == (
        "policy mine:allocate divides nothing, all keep what they have: ZeroDivisionError: by nothing",
    )
    assert runner.shares(at(400), {})["r"].charge_w == 200
    assert runner.notes == ()


def test_another_pin_is_passed_on_however_near_the_watts_are():
    pins = [{}, {"pin_batch_limit": 8}, {"pin_batch_limit": 8}, {"parked": True}, {}]
    runner = PolicyRunner("p:q", lambda snapshot, models: {"r": Share(300.0, "so", **pins.pop(0))})
    answers = [runner.shares(at(900), {}) for _ in range(5)]
    assert [answer is not None for answer in answers] == [True, True, False, True, True]


def test_a_policy_that_cannot_keep_the_budget_says_in_a_note_how_many_watts_it_needs():
    runner = PolicyRunner("policies.static:allocate", static.allocate)
    assert runner.shares(at(350), {}) is None
    assert "350 W asked, but 400 W needed" in runner.notes[0]
    assert runner.shares(at(450), {}) is not None
    assert runner.notes == ()
