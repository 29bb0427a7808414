"""The agent's core on devices that a dictionary stands for: grants, leases, parking, a controller that fails."""

from dataclasses import replace
from math import inf

import pytest

from pals_ray.control.agent.agent_core import AgentCore
from pals_ray.control.agent.commands import (
    ConfirmGrant,
    OrderEngine,
    ReadLimits,
    SayHello,
    SendBeat,
    SetGroupCap,
    SetLimits,
)
from pals_ray.control.messages import Answer, NodeGpu, ParkOrder, Reply
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.types import GpuInfo, Provenance, Slo, Target
from tests.support.builders import charge_terms, grant

GPUS = ("g0", "g1")
TERMS = charge_terms(gpus=2, node_gpus=2)
GRANT = grant(3, 1, lease_s=60.0)
NO_SLO = Slo()


class Broken:
    """A model that cannot answer."""

    def predict(self, cap_w, batch):
        raise FloatingPointError("no such model")


class Node:
    """Carries an agent's commands out at once, on a dictionary of limits; `said` is what goes to the manager."""

    def __init__(self, may_set=True):
        self.core = AgentCore("r", "n", 2, ReplicaController(2))
        self.limits_w = {"g0": 400.0, "g1": 400.0, "free": 400.0}
        info = GpuInfo("", "A100-SXM", 100.0, 400.0, Provenance.MODELLED)
        self.core.managed = dict.fromkeys(self.limits_w, NodeGpu(info, 400.0, 0.0, may_set, ()))
        self.said = []
        self.batch_limit = self.latency_limits_s = None
        self.do(self.core.claimed(GPUS, 32, 0.0), 0.0)

    def do(self, commands, now_s):
        for command in commands:
            match command:
                case ReadLimits(uuids):
                    self.do(self.core.limits_read({u: self.limits_w[u] for u in uuids}, now_s), now_s)
                case SetLimits(limits_w):
                    self.set(limits_w, now_s)
                case SetGroupCap(limits_w, cap_w):
                    self.set(dict.fromkeys(limits_w, cap_w), now_s)
                case OrderEngine(limit, _, ttft_limit_s, tpot_limit_s):
                    self.batch_limit, self.latency_limits_s = limit, (ttft_limit_s, tpot_limit_s)
                case _:
                    self.said.append(command)

    def set(self, limits_w, now_s):
        self.limits_w |= limits_w
        self.do(self.core.limits_set(limits_w, now_s), now_s)

    def answer(self, now_s=1.0, **answer):
        self.do(self.core.answered(answered(**answer), now_s), now_s)

    def grant(self, grant, now_s=1.0):
        self.do(self.core.granted(grant, now_s), now_s)

    @property
    def caps_w(self):
        return [self.limits_w[uuid] for uuid in GPUS]


def answered(grant=GRANT, epoch=3, session=7, park=None, fail_safe_w=None, slo=NO_SLO):
    return Answer(Reply(epoch, session, grant, (), TERMS, park, "noted"), fail_safe_w, Target(slo, priority=4))


@pytest.fixture
def node():
    return Node()


def test_a_grant_is_in_force_when_it_has_been_obeyed_and_a_cut_acts_at_once(node):
    node.answer()
    assert (node.caps_w, node.batch_limit) == ([250, 250], 32)
    node.grant(replace(GRANT, seq=2, charge_w=300.0))
    assert node.caps_w == [150, 150]
    assert node.core.report().obeyed == (3, 2)
    assert node.said == [ConfirmGrant(), ConfirmGrant()]


def test_the_engine_is_told_the_limits_of_its_target_with_the_next_order(node):
    node.answer(slo=Slo(ttft_s=2.0))
    assert node.latency_limits_s == (2.0, inf)
    node.answer(slo=Slo(tpot_s=0.1))
    node.do(node.core.beat_due(None, 1.5), 1.5)
    assert node.latency_limits_s == (inf, 0.1)


def test_what_is_late_or_from_an_older_manager_changes_nothing(node):
    node.answer()
    node.grant(replace(GRANT, seq=0, charge_w=800.0))
    node.answer(grant=replace(GRANT, epoch=2, seq=9, charge_w=800.0), epoch=2)
    node.answer(grant=replace(GRANT, seq=9, charge_w=800.0), session=6)
    assert node.caps_w == [250, 250]


def test_where_no_point_can_be_chosen_caps_go_down_with_the_ceiling_and_never_up(node):
    node.answer()
    node.core.controller.take_model(Broken(), "broken")
    node.grant(replace(GRANT, seq=2, charge_w=300.0))
    assert node.caps_w == [150, 150]
    assert "no such model" in node.core.reason
    node.grant(replace(GRANT, seq=3, charge_w=700.0))
    assert node.caps_w == [150, 150]


def test_a_lease_that_ended_means_the_fail_safe_cap_until_a_newer_grant(node):
    node.answer(grant=replace(GRANT, lease_s=5.0), fail_safe_w=180.0)
    node.do(node.core.beat_due(None, 6.1), 6.1)
    assert node.caps_w == [180, 180]
    assert "lease" in node.core.reason
    assert node.core.report().expired
    node.grant(replace(GRANT), 6.2)
    assert node.caps_w == [180, 180], "a renewal of an ended lease raised a cap"
    node.grant(replace(GRANT, seq=2), 6.3)
    assert node.caps_w == [250, 250]


def test_limits_that_are_not_ours_to_set_stay_and_the_batch_is_ordered_all_the_same():
    node = Node(may_set=False)
    node.answer(grant=replace(GRANT, pin_batch_limit=8))
    assert (node.caps_w, node.batch_limit) == ([400, 400], 8)


def test_once_the_replica_is_gone_its_gpus_are_down_and_no_grant_raises_them(node):
    node.answer()
    node.do(node.core.replica_gone(2.0), 2.0)
    node.grant(replace(GRANT, seq=5, charge_w=800.0))
    assert node.caps_w == [100, 100]


def test_free_gpus_are_brought_down_as_ordered_and_an_older_order_changes_nothing(node):
    order = ParkOrder("n", "r", 3, 2, {"free": 100.0})
    node.answer(park=order)
    assert node.limits_w["free"] == 100
    assert (node.core.report().parking, node.core.report().parked_w) == ((3, 2), {"free": 100})
    node.do(node.core.park_ordered(replace(order, seq=1, limits_w={"free": 90.0}), 2.0), 2.0)
    assert (node.limits_w["free"], node.core.report().parking) == (100, (3, 2))


def test_while_a_call_is_under_way_nothing_else_begins_and_a_cut_comes_before_the_report(node):
    node.answer()
    beat = node.core.beat_due(None, 2.0)
    assert beat == (ReadLimits(GPUS),)
    assert node.core.beat_due(None, 2.5) == ()
    assert node.core.granted(replace(GRANT, seq=2, charge_w=300.0), 2.6) == ()
    assert not node.core.idle
    node.said.clear()
    node.do(node.core.limits_read(dict.fromkeys(GPUS, 250.0), 2.7), 2.7)
    assert node.core.idle
    assert node.caps_w == [150, 150]
    assert node.said == [ConfirmGrant(), SendBeat()], "one report for all that waited for it"


def test_a_call_that_fails_as_nobody_foresaw_holds_nothing_up(node):
    node.answer()
    node.core.beat_due(None, 2.0)
    node.do(node.core.call_failed(2.1), 2.1)
    assert node.core.idle
    node.grant(replace(GRANT, seq=2, charge_w=300.0))
    assert node.caps_w == [150, 150]


def test_a_gpu_that_cannot_be_read_keeps_the_others_from_rising(node):
    node.answer()
    node.core.granted(replace(GRANT, seq=2, charge_w=700.0), 2.0)
    node.do(node.core.limits_read({"g0": 250.0}, 2.1), 2.1)
    assert node.caps_w == [250, 250]
    assert "g1 cannot be read" in node.core.reason


def test_a_gpu_that_does_not_rise_is_named(node):
    node.answer()
    node.core.granted(replace(GRANT, seq=2, charge_w=700.0), 2.0)
    node.core.limits_read(dict.fromkeys(GPUS, 250.0), 2.1)
    node.core.limits_set(dict.fromkeys(GPUS, 250.0), 2.2, held_by="g1")
    assert "held at 250 W by g1, which does not rise to 350 W" in node.core.reason


def test_a_manager_that_does_not_know_the_agent_is_told_the_limits_read_after_the_fence(node):
    node.answer()
    node.said.clear()
    node.limits_w["g0"] = 240.0
    node.answer(epoch=4, session=0, grant=None)
    (said,) = node.said
    assert isinstance(said, SayHello)
    assert (said.hello.fence_epoch, said.hello.limits_w, said.hello.ceiling_w) == (4, {"g0": 240, "g1": 250}, 250)
    assert node.core.session == 0


def test_late_answers_bring_about_one_hello_a_beat(node):
    node.answer()
    node.said.clear()
    for _ in range(5):
        node.answer(session=0, grant=None)
    assert [type(said) for said in node.said] == [SayHello]
    assert [type(said) for said in node.said] == [SayHello]
    node.do(node.core.beat_due(None, 2.0), 2.0)
    node.answer(session=0, grant=None)
    assert sum(isinstance(said, SayHello) for said in node.said) == 2
