"""Agents that choose: replicas that a prior predicts, and a load that is written where engine and GPUs would."""

import threading
import time
from contextlib import contextmanager

import pytest

from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.types import Slo
from tests.support.dummies import MAX_BATCH, DummyFleet
from tests.support.fleets import sampled_limits, wait_for

PREDICTED = [{"llm_config": {"model_loading_config": {"model_id": "dummy"}}, "stands_for": "Qwen3-32B"}]
NATURAL_W = 280.0
OUTPUT_TOKENS = 50


@pytest.fixture(scope="module")
def serving(cluster, tmp_path_factory):
    """Two replicas of one GPU under 900 W: idle GPUs and block say nothing of a load yet."""
    fleet = DummyFleet(tmp_path_factory.mktemp("state"))
    fleet.configure(900)
    one, two = fleet.serve(1, 1)
    driver = VirtualDriver.attach(fleet.key)  # as the ranks of an engine hold their GPUs
    fleet.held = {gpu.uuid: gpu for gpu in (driver.claim_lowest_free(), driver.claim_lowest_free())}
    fleet.configure(900, models=PREDICTED, policy="policies.pals:allocate")
    wait_for(lambda: all(row.predicted_by for row in fleet.status().replicas), 10, "nobody is predicted", 0.05)
    yield fleet, one, two
    fleet.close()


@contextmanager
def loaded(fleet, replica, running=24, tokens_per_s=300.0):
    """A load as its engine's stat logger and its paced worker would write it: slower under a cap that binds."""
    gpu = fleet.held[replica.gpus[0]]
    stop = threading.Event()

    def run():
        made = 0.0
        last_s = time.monotonic()
        while not stop.wait(0.05):
            now_s = time.monotonic()
            limit_w = gpu.limit_w()
            made += (now_s - last_s) * tokens_per_s * min(limit_w / NATURAL_W, 1.0)
            gpu.record_step(last_s, now_s + 0.05, min(limit_w, NATURAL_W), binding=limit_w < NATURAL_W)
            replica.block.field("running")[0] = running
            replica.block.field("generation_tokens")[0] += int(made)
            ended = int(replica.block.field("generation_tokens")[0]) // OUTPUT_TOKENS
            replica.block.field("requests_finished")[0] = ended
            replica.block.field("arrived")[0] = ended + running
            made, last_s = made % 1, now_s
        replica.block.field("running")[0] = 0

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_replica_rests_until_it_is_asked_and_is_granted_what_it_then_needs(serving):
    fleet, one, two = serving
    wait_for(lambda: fleet.limits_w() == [100] * 4, 20, "idle replicas do not rest at the lowest cap", 0.1)
    for replica in (one, two):
        row = fleet.of(replica)
        assert row.predicted_by.startswith("roofline prior of Qwen3-32B on 1 A100-SXM (power law")
        assert "no demand" in row.reason
        assert (row.batch_limit, row.expected.demand_tokens_per_s) == (MAX_BATCH, 0)
    with loaded(fleet, one):
        wait_for(lambda: fleet.of(one).cap_w > 200, 20, "its cap does not rise under load", 0.1)
        wait_for(lambda: (fleet.of(one).demand_tokens_per_s or 0) > 50, 20, "its demand is not seen", 0.1)
        row = fleet.of(one)
        assert "demand is not known yet" in row.reason
        assert row.grant_w > 200
        assert fleet.of(two).cap_w == 100


def test_a_cut_acts_at_once_and_the_cap_comes_back_with_the_budget(serving):
    fleet, one, _ = serving
    with loaded(fleet, one):
        wait_for(lambda: fleet.of(one).cap_w > 220, 30, "its cap does not rise under load", 0.1)
        with sampled_limits(fleet.gpus) as samples:
            called_s = time.monotonic()
            fleet.fleet.set_budget(450)
            assert samples.last_over(450, called_s) < 0.5
            wait_for(lambda: fleet.limits_w(one.gpus)[0] > 140, 30, "the idle one's watts are not handed over", 0.05)
            fleet.fleet.set_budget(900)
            wait_for(lambda: fleet.of(one).cap_w > 220, 20, "the cap does not come back", 0.1)
    assert fleet.of(one).batch_limit == MAX_BATCH


def test_time_under_a_target_and_a_tpot_that_cannot_be_kept_are_told_of_each_model(serving):
    fleet, one, _ = serving
    target = {"throughput_tokens_per_s": 100_000, "priority": 2, "slo": {"ttft_s": 2.0, "tpot_s": 0.001}}
    fleet.configure(900, models=[PREDICTED[0] | {"target": target}], policy="policies.pals:allocate")
    one.block.field("waiting")[0] = 5
    with loaded(fleet, one):
        wait_for(lambda: fleet.status().slos[0].under_target_share, 20, "no interval is under the target", 0.2)
    one.block.field("waiting")[0] = 0
    status = fleet.status()
    (row,) = status.slos
    assert (row.model, row.priority, row.slo) == ("dummy", 2, Slo(ttft_s=2.0, tpot_s=0.001))
    assert row.fastest_tpot_s > 0.01
    assert any("dummy: a TPOT of 1 ms is asked" in note for note in status.notes)
    assert [(row.model, row.priority) for row in status.slos_by_priority] == [(None, 2)]
    assert fleet.of(one).target.throughput_tokens_per_s == 100_000
