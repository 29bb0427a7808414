"""What the ledger does, one behaviour at a time; `test_ledger_machine` looks for what nobody thought of."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest

from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import (
    AgentReport,
    Commands,
    GpuHeldError,
    Hello,
    LedgerError,
    ManagedGpu,
    NodeInfo,
    Reply,
    StaleEpochError,
)
from pals_ray.control.snapshot import Domain, Overhead, Share
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import Grant

CONFIG = LedgerConfig(lease_s=5.0, silent_s=2.0, confirm_s=1.0, rebuild_s=10.0)


def node(name: str = "n", gpus: int = 4, limit_w: float = 400.0, domain: str | None = None, **more: object) -> NodeInfo:
    found = tuple(ManagedGpu(f"{name}-{number}", 100.0, 400.0, limit_w, **more) for number in range(gpus))
    return NodeInfo(name, found, domain)


class FakeAgent:
    """An agent that does at once what it is told, and says so."""

    def __init__(self, ledger: Ledger, replica_id: str, node_id: str = "n", gpus: int = 1, now_s: float = 0.0) -> None:
        self.ledger, self.replica_id, self.node_id, self.gpus = ledger, replica_id, node_id, gpus
        self.limits_w: dict[str, float] = {}
        self.number = 0
        self.hello(now_s)

    def hello(self, now_s: float, ceiling_w: float = 0.0) -> Reply:
        hello = Hello(self.replica_id, self.node_id, self.gpus, self.ledger.epoch, dict(self.limits_w), ceiling_w)
        self.reply = self.ledger.hello(hello, now_s)
        self.number = 0
        self.report(now_s)
        return self.reply

    def report(self, now_s: float, grant: Grant | None = None, **changes: object) -> Reply:
        self.number += 1
        grant = grant or self.reply.grant
        if self.reply.terms and grant and "limits_w" not in changes:
            self.limits_w = dict.fromkeys(self.reply.uuids, self.reply.terms.cap_w(grant.charge_w))
        park = self.reply.park
        fields = {
            "limits_w": dict(self.limits_w),
            "parking": (park.epoch, park.seq) if park else (0, 0),
            "parked_w": dict(park.limits_w) if park else {},
            "number": self.number,
            "expired": False,
            "session": self.reply.session,
        } | changes
        obeyed = (grant.epoch, grant.seq) if grant else (0, 0)
        told = AgentReport(self.replica_id, fence_epoch=self.ledger.epoch, obeyed=obeyed, **fields)  # type: ignore[arg-type]
        self.last = told
        self.reply = self.ledger.report(told, now_s)
        return self.reply

    def claim(self, *uuids: str, now_s: float = 0.0) -> Commands:
        self.reply, commands = self.ledger.claim(
            self.replica_id, self.reply.session, dict.fromkeys(uuids, 100.0), now_s
        )
        self.report(now_s)
        return commands


def fleet(budget_w: float = 1000.0, config: LedgerConfig = CONFIG) -> tuple[Ledger, FakeAgent, FakeAgent]:
    """Four GPUs, parked, and two replicas of one GPU each at their least charge."""
    ledger = Ledger(config, epoch=1, budget_w=budget_w, now_s=0.0)
    ledger.add_node(node(), 0.0)
    a, b = FakeAgent(ledger, "a"), FakeAgent(ledger, "b")
    a.claim("n-0")
    b.claim("n-1")
    a.report(0.0)
    return ledger, a, b


def want(**charges_w: float) -> Mapping[str, Share]:
    return {name: Share(charge_w, "wanted") for name, charge_w in charges_w.items()}


def test_an_engine_may_start_only_when_the_nodes_gpus_are_parked_inside_the_budget() -> None:
    ledger = Ledger(CONFIG, epoch=1, budget_w=500.0, now_s=0.0)
    ledger.add_node(node(), 0.0)
    hello = Hello("a", "n", 1, 1)
    reply = ledger.hello(hello, 0.0)
    assert ledger.reserved_w() == 1600.0
    assert not ledger.may_start("a", 0.0)[0]
    limits_w = dict(reply.park.limits_w)
    report = AgentReport("a", reply.session, 1, 1, (1, 1), {}, (1, reply.park.seq), limits_w | {"n-3": 400.0})
    ledger.report(report, 0.1)
    assert not ledger.may_start("a", 0.1)[0]
    ledger.report(AgentReport("a", reply.session, 2, 1, (1, 1), {}, (1, reply.park.seq), limits_w), 0.2)
    assert ledger.may_start("a", 0.2)[0]
    assert ledger.reserved_w() == 400.0


def test_watts_are_granted_only_after_their_release_was_confirmed() -> None:
    ledger, a, b = fleet(budget_w=800.0)
    grants = ledger.plan(want(a=400.0, b=100.0), 1.0)
    assert [grant.charge_w for grant in grants.raises] == [400.0]
    a.report(1.1, grants.raises[0])
    moved = ledger.plan(want(a=200.0, b=400.0), 2.0)
    assert [(grant.replica_id, grant.charge_w) for grant in moved.cuts] == [("a", 200.0)]
    assert [(grant.replica_id, grant.charge_w) for grant in moved.raises] == [("b", 200.0)]
    assert "not released yet" in moved.raises[0].reason
    b.report(2.1, moved.raises[0])
    assert ledger.plan(None, 2.2).raises == ()
    a.report(2.3, moved.cuts[0])
    assert ledger.raise_due
    assert [grant.charge_w for grant in ledger.plan(None, 2.3).raises] == [400.0]
    assert ledger.reserved_w() == 800.0


def test_an_earlier_grant_is_reserved_until_a_later_one_is_confirmed() -> None:
    ledger, a, _ = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    first = ledger.plan(want(a=300.0, b=100.0), 2.0).cuts[0]
    ledger.plan(want(a=150.0, b=100.0), 2.1)
    assert ledger.replica("a", 2.1).reserved_w == 400.0
    a.report(2.2, first)
    assert ledger.replica("a", 2.2).reserved_w == 300.0


def test_late_and_repeated_reports_change_nothing() -> None:
    ledger, a, _ = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    high = a.last
    a.report(2.1, ledger.plan(want(a=200.0, b=100.0), 2.0).cuts[0])
    low = a.last
    a.report(3.1, ledger.plan(want(a=400.0, b=100.0), 3.0).raises[0])
    for late in (low, high, low):
        assert "late" in ledger.report(late, 4.0).reason
        assert ledger.replica("a", 4.0).charge_w == 400.0


def test_a_silent_replica_keeps_its_charge_and_the_others_make_do() -> None:
    ledger, a, b = fleet(budget_w=1000.0)
    for grant in ledger.plan(want(a=400.0, b=400.0), 1.0).raises:
        {"a": a, "b": b}[grant.replica_id].report(1.1, grant)
    ledger.set_budget(800.0, 1.2)
    b.report(1.3)
    cut = ledger.plan(None, 100.0)
    assert ledger.replica("a", 100.0).reserved_w == 400.0
    b.report(100.1)
    (deeper,) = ledger.plan(None, 100.2).cuts
    assert (deeper.replica_id, deeper.charge_w) == ("b", 200.0)
    assert cut.raises == ()
    b.report(100.3, deeper)
    assert ledger.in_force(100.3).value


def test_a_budget_below_the_least_is_refused_with_the_watts_needed_and_changes_nothing() -> None:
    ledger, *_ = fleet(config=LedgerConfig(reserve_w=50.0))
    for asked_w in (449.0, 10.0):
        with pytest.raises(InfeasibleBudget) as refused:
            ledger.set_budget(asked_w, 1.0)
        assert (refused.value.asked_w, refused.value.needed_w) == (asked_w, 450.0)
    for nonsense_w in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(LedgerError):
            ledger.set_budget(nonsense_w, 1.0)
    assert ledger.budget_w == 1000.0
    ledger.set_budget(450.0, 1.0)
    assert ledger.budget_w == 450.0


def test_a_budget_cut_is_in_force_once_every_agent_confirmed_it() -> None:
    ledger, a, b = fleet()
    for grant in ledger.plan(want(a=300.0, b=300.0), 1.0).raises:
        {"a": a, "b": b}[grant.replica_id].report(1.1, grant)
    cuts = ledger.set_budget(600.0, 2.0).cuts
    assert sum(grant.charge_w for grant in cuts) == pytest.approx(400.0)
    state = ledger.in_force(2.1)
    assert (state.value, state.over_w, set(state.awaited)) == (False, 200.0, {"a", "b"})
    a.report(2.2, cuts[0])
    assert ledger.in_force(2.2).awaited == ("b",)
    b.report(2.3, cuts[1])
    assert ledger.in_force(2.3).value


def test_domains_hold_within_the_fleet() -> None:
    domains = (Domain("rack", 700.0), Domain("row", 450.0, "rack"))
    ledger = Ledger(CONFIG, epoch=1, budget_w=2000.0, domains=domains, now_s=0.0)
    agents = {}
    for name, domain in (("x", "row"), ("y", "rack"), ("z", None)):
        ledger.add_node(node(name, 1, 100.0, domain), 0.0)
        agents[name] = FakeAgent(ledger, name, name)
        agents[name].claim(f"{name}-0")
        agents[name].report(0.0)
    for grant in ledger.plan(want(x=400.0, y=400.0, z=400.0), 1.0).raises:
        agents[grant.replica_id].report(1.1, grant)
    assert ledger.reserved_w("row") <= 450.0
    assert ledger.reserved_w("rack") == pytest.approx(700.0)
    assert ledger.replica("z", 1.1).charge_w == 400.0
    ledger.set_budget(300.0, 2.0, "rack")
    assert sum(ledger.replica(name, 2.0).grant_w for name in "xy") == pytest.approx(300.0)
    with pytest.raises(InfeasibleBudget, match="rack"):
        ledger.set_budget(199.0, 2.0, "rack")
    with pytest.raises(LedgerError, match="no domain 'cellar'"):
        ledger.set_budget(199.0, 2.0, "cellar")


def test_gpus_of_a_replica_that_differ_are_charged_each_its_own_and_not_raised() -> None:
    ledger = Ledger(CONFIG, epoch=1, budget_w=2000.0, now_s=0.0)
    ledger.add_node(node(gpus=2), 0.0)
    a = FakeAgent(ledger, "a", gpus=2)
    a.claim("n-0", "n-1")
    grant = ledger.plan(want(a=600.0), 1.0).raises[0]
    a.report(1.1, grant, limits_w={"n-0": 300.0, "n-1": 100.0})
    assert ledger.replica("a", 1.1).charge_w == 400.0
    assert ledger.replica("a", 1.1).reserved_w == 600.0
    assert ledger.plan(want(a=800.0), 1.2).raises == ()
    a.report(1.3, grant, limits_w={"n-0": 300.0})
    assert not ledger.replica("a", 1.3).confirmed
    a.report(1.4, grant, limits_w={"n-0": 300.0, "n-1": 300.0})
    assert ledger.plan(want(a=800.0), 1.5).raises[0].charge_w == 800.0


def test_a_limit_raised_behind_our_back_is_charged_and_the_others_are_cut() -> None:
    ledger, a, b = fleet(budget_w=700.0)
    b.report(1.1, ledger.plan(want(a=100.0, b=400.0), 1.0).raises[0])
    a.report(1.2, limits_w={"n-0": 250.0})
    assert ledger.in_force(1.2).over_w == 150.0
    a.report(2.5, limits_w={"n-0": 250.0})
    b.report(2.5)
    assert [(cut.replica_id, cut.charge_w) for cut in ledger.plan(None, 2.6).cuts] == [("b", 250.0)]


def test_a_reading_that_is_no_number_counts_as_not_read() -> None:
    ledger, a, _ = fleet()
    a.report(1.0, limits_w={"n-0": float("nan")})
    assert ledger.replica("a", 1.0).charge_w == 100.0
    assert not ledger.replica("a", 1.0).confirmed


def test_gpus_of_a_replica_that_left_stay_charged_until_they_are_parked() -> None:
    ledger, a, b = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    b.report(1.2)
    stale = b.last
    commands = ledger.leave("a", 2.0)
    assert ledger.reserved_w() == 700.0
    assert commands.parks[0].executor == "b"
    assert "n-0" in commands.parks[0].limits_w
    late = AgentReport("b", b.reply.session, stale.number + 1, 1, stale.obeyed, stale.limits_w, (1, 1), {"n-0": 100.0})
    ledger.report(late, 2.1)
    assert ledger.reserved_w() == 700.0
    b.number += 1
    b.report(2.2)
    b.report(2.3)
    assert ledger.reserved_w() == 400.0


def test_a_goodbye_releases_what_it_read() -> None:
    ledger, a, _ = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    goodbye = AgentReport("a", a.reply.session, a.number + 1, 1, (0, 0), {"n-0": 100.0})
    ledger.leave("a", 2.0, goodbye)
    assert ledger.reserved_w() == 400.0


def test_a_held_or_foreign_gpu_cannot_be_claimed() -> None:
    ledger, a, _ = fleet()
    c = FakeAgent(ledger, "c")
    with pytest.raises(GpuHeldError) as held:
        c.claim("n-0")
    assert held.value.holder == "a"
    with pytest.raises(LedgerError, match="not a managed GPU"):
        c.claim("elsewhere")
    with pytest.raises(LedgerError, match="claims 2"):
        c.claim("n-2", "n-3")
    with pytest.raises(LedgerError, match="where 1 of 4"):
        FakeAgent(ledger, "d", gpus=2)
    before_w = ledger.reserved_w()
    a.claim("n-0")
    assert ledger.reserved_w() == before_w


def test_a_node_that_does_not_fit_is_refused_with_the_watts_needed() -> None:
    ledger, *_ = fleet(budget_w=700.0)
    with pytest.raises(InfeasibleBudget) as refused:
        ledger.add_node(node("other"), 1.0)
    assert refused.value.needed_w == 800.0
    assert [view.node_id for view in ledger.nodes()] == ["n"]
    assert ledger.reserved_w() == 400.0


def test_a_node_whose_limits_may_not_be_set_needs_the_operators_leave() -> None:
    fixed = node(limit_w=300.0, may_set=False)
    ledger = Ledger(CONFIG, epoch=1, budget_w=1000.0, now_s=0.0)
    with pytest.raises(InfeasibleBudget) as refused:
        ledger.add_node(fixed, 0.0)
    assert refused.value.needed_w == 1200.0
    ledger = Ledger(LedgerConfig(allow_unenforced=True), epoch=1, budget_w=1000.0, now_s=0.0)
    ledger.add_node(fixed, 0.0)
    a = FakeAgent(ledger, "a")
    assert ledger.may_start("a", 0.0)[0]
    assert "UNENFORCED" in (ledger.unenforced(0.0) or "")
    a.reply, _ = ledger.claim("a", a.reply.session, {"n-0": 300.0}, 0.0)
    assert ledger.replica("a", 0.0).reserved_w == 300.0
    a.report(0.1, limits_w={"n-0": 300.0})
    guided = ledger.plan(want(a=200.0), 0.2)
    assert [grant.charge_w for grant in guided.raises] == [200.0]
    assert ledger.replica("a", 0.2).reserved_w == 300.0


def test_a_lost_node_stays_charged_until_it_is_gone_or_seen_again() -> None:
    ledger, a, b = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    b.report(1.1)
    with pytest.raises(LedgerError, match="still speak"):
        ledger.add_node(NodeInfo("again", node(limit_w=100.0).gpus), 1.2)
    ledger.node_lost("n")
    assert ledger.reserved_w() == 700.0
    assert ledger.plan(want(a=400.0, b=400.0), 2.0).raises == ()
    ledger.add_node(NodeInfo("again", node(limit_w=100.0).gpus), 3.0)
    assert ledger.reserved_w() == 700.0
    assert ledger.replicas(3.0) == ()
    c = FakeAgent(ledger, "c", "again", now_s=3.0)
    c.report(3.1)
    assert ledger.reserved_w() == 400.0
    ledger.node_gone("again")
    assert ledger.reserved_w() == 0.0


def test_an_agent_whose_lease_ended_gets_a_newer_grant_for_the_same_watts() -> None:
    ledger, a, _ = fleet()
    raised = ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0]
    a.report(1.1, raised)
    reply = a.report(9.0, raised, limits_w={"n-0": 150.0}, expired=True)
    assert (reply.grant.seq > raised.seq, reply.grant.charge_w) == (True, 400.0)
    assert ledger.reserved_w() == 700.0


def test_a_new_manager_charges_in_full_whom_it_has_not_heard_and_raises_nobody() -> None:
    old, a, b = fleet(budget_w=1000.0)
    for grant in old.plan(want(a=350.0, b=400.0), 1.0).raises:
        {"a": a, "b": b}[grant.replica_id].report(1.1, grant)
    assert old.unsaved
    new = Ledger(CONFIG, epoch=2, budget_w=1000.0, known=pickle.loads(pickle.dumps(old.memo())), now_s=0.0)
    assert old.unsaved
    old.saved()
    assert not old.unsaved
    assert new.reserved_w() == old.reserved_w() == 950.0
    a.ledger = b.ledger = new
    stale = new.hello(Hello("a", "n", 1, 1), 0.1)
    assert (stale.session, stale.epoch) == (0, 2)
    reply = a.hello(0.2, ceiling_w=350.0)
    assert (reply.grant.epoch, reply.grant.charge_w) == (2, 350.0)
    commands = new.plan(want(a=400.0, b=400.0), 0.3)
    assert (commands.raises, commands.parks) == ((), ())
    assert "not heard" in commands.reason
    b.hello(0.4, ceiling_w=400.0)
    assert [grant.charge_w for grant in new.plan(want(a=400.0, b=400.0), 0.5).raises] == [400.0]


def test_a_new_manager_that_hears_nothing_goes_on_without_forgetting() -> None:
    old, a, b = fleet()
    a.report(1.1, old.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    new = Ledger(CONFIG, epoch=2, budget_w=1000.0, known=old.memo(), now_s=0.0)
    b.ledger = new
    assert new.needed_w(0.1) == 400.0
    b.hello(0.1)
    assert new.rebuilding(9.9)[0]
    b.report(10.1)
    raises = new.plan(want(a=400.0, b=400.0), 10.2).raises
    assert [(grant.replica_id, grant.charge_w) for grant in raises] == [("b", 400.0)]
    assert new.reserved_w() == 1000.0
    with pytest.raises(InfeasibleBudget) as refused:
        new.set_budget(600.0, 10.3)
    assert refused.value.needed_w == 700.0


def test_a_manager_that_lost_its_records_waits_until_every_old_lease_has_ended() -> None:
    old, a, b = fleet(budget_w=1000.0)
    for grant in old.plan(want(a=350.0, b=400.0), 1.0).raises:
        {"a": a, "b": b}[grant.replica_id].report(1.1, grant)
    new = Ledger(CONFIG, epoch=2, budget_w=1000.0, now_s=2.0)
    new.add_node(node(), 2.0)
    a.ledger = new
    a.hello(2.0, ceiling_w=350.0)
    commands = new.plan(want(a=400.0), 6.9)
    assert (commands.raises, commands.parks, a.reply.park) == ((), (), None)
    assert "without a record" in commands.reason
    a.report(7.1)
    assert new.plan(want(a=400.0), 7.1).parks[0].limits_w.keys() == {"n-1", "n-2", "n-3"}


def test_a_superseded_manager_grants_nothing_more() -> None:
    ledger, a, _ = fleet()
    with pytest.raises(StaleEpochError):
        ledger.hello(Hello("b", "n", 1, 7), 1.0)
    assert ledger.plan(want(a=400.0, b=400.0), 1.1) == Commands(reason="a manager of epoch 7 is in charge")
    assert a.report(1.2).grant is None


def test_a_replaced_agent_takes_over_what_is_in_force() -> None:
    ledger, a, _ = fleet()
    a.report(1.1, ledger.plan(want(a=400.0, b=100.0), 1.0).raises[0])
    former = a.last
    a.limits_w = {"n-0": 320.0}
    reply = a.hello(2.0)
    assert reply.uuids == ("n-0",)
    assert ledger.replica("a", 2.0).grant_w == 320.0
    assert ledger.report(former, 2.1).session == 0


def test_pins_reach_the_agent_without_a_change_of_watts() -> None:
    ledger, a, _ = fleet()
    shares = {"a": Share(100.0, "wanted", pin_cap_w=100.0, pin_batch_limit=8), "b": Share(100.0, "wanted")}
    (grant,) = ledger.plan(shares, 1.0).raises
    assert (grant.replica_id, grant.pin_batch_limit, grant.charge_w) == ("a", 8, 100.0)
    a.report(1.1, grant)
    assert ledger.plan(shares, 1.2).raises == ()


def test_overhead_and_clock_floors_are_charged() -> None:
    ledger = Ledger(CONFIG, epoch=1, budget_w=2000.0, now_s=0.0)
    gpus = tuple(ManagedGpu(f"g{n}", 100.0, 400.0, 100.0, floor_w=121.0) for n in range(2))
    ledger.add_node(NodeInfo("n", gpus, overhead=Overhead(50.0, 0.1)), 0.0)
    assert ledger.reserved_w() == pytest.approx(1.1 * 242.0 + 50.0)


def test_a_thousand_replicas_are_planned_at_once_within_the_budget() -> None:
    ledger = Ledger(CONFIG, epoch=1, budget_w=1e6, now_s=0.0)
    agents = []
    for number in range(125):
        ledger.add_node(node(f"n{number}", 8, 100.0), 0.0)
        for gpu in range(8):
            agent = FakeAgent(ledger, f"r{number}-{gpu}", f"n{number}")
            agent.claim(f"n{number}-{gpu}")
            agents.append(agent)
    shares = {agent.replica_id: Share(200.0 + number % 7, "wanted") for number, agent in enumerate(agents)}
    raises = ledger.plan(shares, 0.5).raises
    assert {grant.replica_id: grant.charge_w for grant in raises} == {k: share.charge_w for k, share in shares.items()}
    cuts = ledger.set_budget(150_000.0, 0.6).cuts
    assert len(cuts) == len(agents)
    assert sum(grant.charge_w for grant in cuts) <= 150_000.0 + 1e-6
