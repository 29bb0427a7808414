"""Each model's violations, from what its replicas' agents send."""

from pals_ray.control.manager.fleet_status import Member
from pals_ray.control.manager.slo_accounts import SloAccounts
from pals_ray.control.messages import AgentReport, Beat, ReplicaSpec
from pals_ray.control.slo import Tally
from pals_ray.types import ReplicaTelemetry, Target

TARGETS = {"chat": Target(throughput_tokens_per_s=100.0), "batch": Target(priority=1)}


def member(model, name, tokens, waiting=3, at_s=0.0):
    spec = ReplicaSpec(name, model, 1, "n")
    tally = Tally(at_s, 8, waiting, tokens, 10, 10, 0.0, None, tokens, 0.0, None)
    report = AgentReport(name, 1, 1, 1, (1, 1), {})
    return Member(spec, Beat(report, ReplicaTelemetry(), {}, 0.0, None, None, "", None, {}, tally=tally))


def after(book, tokens, waiting=3):
    """Ten seconds in which both replicas of a model make so many tokens together."""
    for second in range(11):
        made = tokens * second // 20
        members = {name: member("chat", name, made, waiting, float(second)) for name in ("a", "b")}
        book.observe(members, TARGETS, float(second))
    return {row.model: row for row in book.statuses(TARGETS)}


def test_a_models_replicas_are_judged_together_against_its_whole_target():
    short = after(SloAccounts(), 900)["chat"]
    assert (short.intervals, short.violations, short.throughput_violations) == (2, 2, 2)
    assert "90 of 100 tokens/s while requests waited" in short.latest
    assert after(SloAccounts(), 1000)["chat"].violations == 0
    assert after(SloAccounts(), 900, waiting=0)["chat"].violations == 0, "nobody waited"


def test_a_model_that_nobody_asks_has_an_account_without_intervals():
    idle = after(SloAccounts(), 900)["batch"]
    assert (idle.priority, idle.intervals, idle.violation_share) == (1, 0, None)
