"""Each model's requests, from what its replicas' agents send, and a TPOT limit that no point can keep."""

from dataclasses import replace

import pytest

from pals_ray.control.manager.agent_registry import AgentRegistry
from pals_ray.control.manager.fleet_status import Member
from pals_ray.control.manager.slo_accounts import SloAccounts, fastest_tpots_s, unreachable
from pals_ray.control.messages import AgentReport, Beat, NodeGpu, ReplicaSpec
from pals_ray.control.slo import Tally, by_priority
from pals_ray.models.lookup import LoadedModel
from pals_ray.types import GpuInfo, Provenance, ReplicaTelemetry, Slo, Target, Verdicts
from tests.support.builders import StubModel

TARGETS = {"chat": Target(Slo(ttft_s=1.0, tpot_s=0.2), throughput_tokens_per_s=100.0), "batch": Target(priority=1)}
GPU = NodeGpu(GpuInfo("GPU-0", "A100", 100, 400, Provenance.MODELLED), 400, 0, True, ())


def with_tally(member, verdicts, tokens=0, waiting=0):
    tally = Tally(verdicts, tokens, waiting, 0, 0.0, None)
    report = AgentReport(member.spec.replica_id, 1, 1, 1, (1, 1), {})
    return replace(member, beat=Beat(report, ReplicaTelemetry(), {}, 0.0, None, None, "", None, {}, tally=tally))


@pytest.fixture
def registry():
    """Two replicas of `chat` on nodes of their own, one predicted to be half as fast; and one of `batch`, unknown."""
    registry = AgentRegistry()
    for name, model, speed in (("a", "chat", 10.0), ("b", "chat", 5.0), ("c", "batch", None)):
        predicted = None if speed is None else LoadedModel("a stub", StubModel(speed))
        gpu = replace(GPU, info=replace(GPU.info, uuid=f"GPU-{name}"))
        registry.take_in(ReplicaSpec(name, model, 1, f"node-{name}"), [gpu], predicted, 0.0)
    return registry


def after(registry, tokens=1000, waiting=0):
    """Ten seconds in which each replica of `chat` has a good request a second, and `b` a late one at the end."""
    accounts = SloAccounts()
    for second in range(11):
        for name in ("a", "b"):
            seen = Verdicts(good=second, late_ttft=int(name == "b" and second == 10))
            registry.members[name] = with_tally(registry.members[name], seen, tokens * second // 20, waiting)
        accounts.observe(registry, TARGETS, float(second))
    return {row.model: row for row in accounts.statuses(registry, TARGETS)}


def test_a_models_replicas_are_judged_together(registry):
    row = after(registry)["chat"]
    assert row.recent == row.total == Verdicts(good=20, late_ttft=1)
    assert (row.allowed, row.error_budget_left, row.slo) == (1.0, 0.0, TARGETS["chat"].slo)


def test_tokens_of_all_replicas_count_for_the_models_target_while_work_waits(registry):
    row = after(registry, tokens=900, waiting=3)["chat"]
    assert (row.intervals, row.under_target_share) == (2, 1.0)
    assert after(registry, tokens=1000, waiting=3)["chat"].under_target_share == 0.0
    assert after(registry, tokens=900, waiting=0)["chat"].under_target_share == 0.0, "nobody waited"


def test_a_model_that_nobody_asks_has_a_row_with_nothing_judged(registry):
    row = after(registry)["batch"]
    assert (row.priority, row.intervals, row.recent.attainment, row.error_budget_left) == (1, 0, None, None)


def test_counts_go_on_where_a_redeploy_leaves_a_model_out_for_a_while(registry):
    accounts = SloAccounts()
    for second, targets in enumerate((TARGETS, TARGETS, {"batch": TARGETS["batch"]}, TARGETS, TARGETS)):
        registry.members["a"] = with_tally(registry.members["a"], Verdicts(good=second))
        accounts.observe(registry, targets, float(second))
    assert accounts.statuses(registry, TARGETS)[0].total.good >= 2


def test_the_fastest_tpot_is_that_of_the_slowest_replica_alone_at_its_highest_cap(registry):
    slowest = 1.0 / float(StubModel(5.0).predict(400, 1).throughput_tokens_per_s)
    assert fastest_tpots_s(registry) == {"chat": pytest.approx(slowest)}
    registry.members["d"] = Member(ReplicaSpec("d", "new", 1, "not heard of yet"), None, LoadedModel("", StubModel()))
    assert set(fastest_tpots_s(registry)) == {"chat"}


def test_a_tpot_limit_under_the_fastest_is_told_once_in_the_log_and_always_in_the_status(registry, caplog):
    accounts = SloAccounts()
    asked = TARGETS | {"chat": Target(Slo(tpot_s=0.1))}
    for second in range(3):
        accounts.observe(registry, asked, float(second))
    (row, other) = accounts.statuses(registry, asked)
    said = unreachable(row)
    assert said.startswith("chat: a TPOT of 100 ms is asked, but 206 ms is predicted for one sequence")
    assert "raise slo.tpot_s" in said
    assert [record.message for record in caplog.records] == [said]
    assert unreachable(other) is None
    accounts.observe(registry, TARGETS | {"chat": Target(Slo(tpot_s=0.05))}, 3.0)
    assert len(caplog.records) == 2, "another limit is another warning"


@pytest.mark.parametrize("slo", [Slo(), Slo(ttft_s=0.01), Slo(tpot_s=0.21)])
def test_other_limits_are_taken_without_a_word(registry, slo, caplog):
    accounts, asked = SloAccounts(), {"chat": Target(slo)}
    accounts.observe(registry, asked, 0.0)
    assert [unreachable(row) for row in accounts.statuses(registry, asked)] == [None]
    assert not caplog.records


def test_a_model_without_limits_adds_nothing_to_what_may_be_late_in_its_class(registry):
    row = after(registry)["chat"]
    free = replace(row, model="free", recent=Verdicts(good=10_000), allowed=100.0, error_budget_left=None)
    (together,) = by_priority([row, free])
    assert (together.allowed, together.error_budget_left, together.recent.judged) == (1.0, 0.0, 10_021)
