"""The status of a small fleet: every watt accounted for, in the ledger's words and the agents'."""

from dataclasses import replace

import pytest
from rich.console import Console

from pals_ray.cli.status_table import budget_line, status_view
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.manager.fleet_status import (
    Device,
    FleetFacts,
    Member,
    fleet_snapshot,
    fleet_status,
    measured_w,
)
from pals_ray.control.messages import AgentReport, Beat, Hello, ManagedGpu, NodeGpu, NodeInfo, ReplicaSpec
from pals_ray.control.snapshot import Arrivals, Overhead, Share
from pals_ray.types import BudgetSource, GpuInfo, Latency, Provenance, ReplicaTelemetry, Target

UUIDS = ("GPU-0", "GPU-1", "GPU-2")
TARGETS = {"m": Target(throughput_tokens_per_s=500, priority=1)}
SOURCE = BudgetSource("set", 700, 700, "as it was set")
FACTS = FleetFacts("policies.uniform:allocate", "v7", 2.0, SOURCE, 12.0, 3.5, 0.08, ("a note",))
SEEN = ReplicaTelemetry(
    running=5,
    waiting=1,
    throughput_tokens_per_s=450,
    power_w=300,
    ttft=Latency(0.2, 1.5),
    itl=Latency(0.02, None),
    late_share=0.01,
    binding_share=0.8,
)


def _spec():
    return ReplicaSpec("m#1", "m", 2, "n", gpus=UUIDS[:2], max_batch=32)


def _ledger(overhead=None, **config):
    """A node of three GPUs: a replica on two at 200 W each, and one parked at 100 W, under 700 W."""
    ledger = Ledger(LedgerConfig(**config), epoch=4, budget_w=700, now_s=0)
    gpus = tuple(ManagedGpu(uuid, 100, 400, 100) for uuid in UUIDS)
    ledger.add_node(NodeInfo("n", gpus, overhead=overhead or Overhead()), 0)
    ledger.hello(Hello("m#1", "n", 2, fence_epoch=4), 0)
    session = ledger.hello(Hello("m#1", "n", 2, fence_epoch=4), 0).session
    ledger.claim("m#1", session, dict.fromkeys(UUIDS[:2], 100.0), 0)
    park = ledger.report(_report(ledger, session, 1, 100), 0).park
    parking = (park.epoch, park.seq)
    ledger.report(_report(ledger, session, 2, 100, parking=parking, parked_w={"GPU-2": 100.0}), 0)
    ledger.plan({"m#1": Share(400, "a fair share")}, 0)
    ledger.report(_report(ledger, session, 3, 200, parking=parking, parked_w={"GPU-2": 100.0}), 0)
    return ledger


def _report(ledger, session, number, limit_w, **more):
    reply_seq = ledger._reservations.replicas["m#1"].grant.seq
    return AgentReport("m#1", session, number, 4, (4, reply_seq), dict.fromkeys(UUIDS[:2], float(limit_w)), **more)


def _devices(provenance=Provenance.MODELLED, may_set=True):
    drawn_w = dict(zip(UUIDS, (150.0, 150.0, 55.0), strict=True))
    limits_w = dict(zip(UUIDS, (200.0, 200.0, 100.0), strict=True))

    def device(uuid):
        info = GpuInfo(uuid, "virtual A100-SXM", 100, 400, provenance)
        return Device("n", NodeGpu(info, 400, 0, may_set, ()), limits_w[uuid], drawn_w[uuid])

    return {uuid: device(uuid) for uuid in UUIDS}


def _member(telemetry=SEEN, reason="cap: a fair share"):
    report = AgentReport("m#1", 1, 1, 4, (4, 1), {})
    return Member(_spec(), Beat(report, telemetry, {}, 33.0, 200.0, 16, reason, None, {}))


def _status(ledger=None, members=None, devices=None, now_s=0.1):
    ledger = ledger or _ledger()
    members = {"m#1": _member()} if members is None else members
    return fleet_status(ledger, members, TARGETS, devices or _devices(), FACTS, now_s)


def test_charge_draw_and_stranded_watts_add_up():
    status = _status()
    assert (status.budget_w, status.charge_w, status.parked_w, status.measured_w) == (700, 500, 100, 355)
    assert status.unmanaged_w == 33
    assert status.stranded.total_w == 500 - 355
    parts = (status.stranded.minimum_cap_w, status.stranded.headroom_w, status.stranded.not_binding_w)
    assert parts == (45, 100, 0), "the parked GPU's, and what is left under a cap that binds"
    assert (status.over_budget_w, status.over_budget_s, status.last_settle_s) == (12, 3.5, 0.08)


def test_a_cap_that_does_not_bind_strands_its_watts_for_that_reason():
    status = _status(members={"m#1": _member(replace(SEEN, binding_share=0.0))})
    assert (status.stranded.headroom_w, status.stranded.not_binding_w) == (0, 100)


def test_overhead_is_in_charge_draw_and_each_replicas_share():
    overhead = Overhead(30, 0.1)
    status = _status(_ledger(overhead))
    (row,) = status.replicas
    assert status.measured_w == pytest.approx(30 + 1.1 * 355)
    assert row.grant_w == pytest.approx(400)
    assert row.charge_w == pytest.approx(20 + 1.1 * 400)
    assert status.charge_w == pytest.approx(30 + 1.1 * 500)
    assert row.stranded_w == pytest.approx(row.charge_w - (20 + 1.1 * 300))


def test_a_replicas_row_says_point_target_load_and_why():
    (row,) = _status().replicas
    assert (row.replica_id, row.model, row.node_id, row.gpus, row.num_gpus) == ("m#1", "m", "n", UUIDS[:2], 2)
    assert (row.state, row.cap_w, row.batch_limit, row.max_batch) == ("serving", 200, 16, 32)
    assert (row.charge_w, row.grant_w, row.stranded_w) == (400, 400, 100)
    assert row.tokens_per_joule == 450 / 300
    assert row.target.throughput_tokens_per_s == 500
    assert (row.reason, row.grant_reason) == ("cap: a fair share", "a fair share")
    assert row.provenance == "modelled"


def test_a_replica_without_a_beat_yet_has_no_point_and_one_that_went_quiet_is_silent_and_charged():
    (row,) = _status(members={"m#1": Member(_spec())}).replicas
    assert (row.cap_w, row.batch_limit, row.tokens_per_joule, row.reason) == (None, None, None, "starting")
    (row,) = _status(now_s=60).replicas
    assert (row.state, row.charge_w) == ("silent", 400)


def test_gpus_are_listed_with_who_holds_them_and_whether_their_limit_is_ours():
    status = _status()
    assert [(gpu.uuid, gpu.limit_w, gpu.power_w, gpu.replica_id) for gpu in status.gpus] == [
        ("GPU-0", 200, 150, "m#1"),
        ("GPU-1", 200, 150, "m#1"),
        ("GPU-2", 100, 55, None),
    ]
    assert status.enforced
    assert not _status(devices=_devices(may_set=False)).enforced


def test_numbers_of_real_devices_are_called_measured_and_of_virtual_ones_modelled():
    assert _status().provenance == "modelled"
    assert _status(devices=_devices(Provenance.MEASURED)).provenance == "measured"


def test_a_policy_sees_the_watts_that_may_be_divided_and_what_each_replica_draws_by_itself():
    ledger = _ledger(reserve_w=50)
    member = replace(_member(), beat=replace(_member().beat, natural_draw_w=310.0))
    snapshot = fleet_snapshot(ledger, {"m#1": member}, TARGETS, 0.1)
    (replica,) = snapshot.replicas
    assert (snapshot.budget_w, sum(snapshot.parked_charge_w.values())) == (650, 100)
    assert (replica.least_charge_w, replica.most_charge_w, replica.grant_w) == (200, 800, 400)
    assert (replica.natural_draw_w, replica.max_batch, replica.target) == (310, 32, TARGETS["m"])


def test_draw_of_a_node_whose_gpus_are_not_known_yet_is_its_overhead_alone():
    assert measured_w(_ledger(Overhead(30, 0.1)), {}) == 30


def _shown(renderable, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_show_each_number_that_an_operator_asks_for(width):
    shown = _shown(status_view(_status()), width)
    for part in ("700", "500", "355", "a note", "m#1", "200 W/GPU", "16 of 32", "running 5", "waiting 1", "450 tok/s"):
        assert part in shown
    for part in ("1.50 tok/J", "200 ms", "1.50 s", "GPU-2", "parked", "80 ms", "policies.uniform:allocate"):
        assert part in shown
    assert "UNENFORCED" not in shown


def test_the_tables_say_unenforced_and_what_is_not_ours_to_set():
    status = _status(devices=_devices(may_set=False))
    assert "UNENFORCED" in _shown(budget_line(status))
    assert "not ours" in _shown(status_view(status))


def test_a_fleet_without_replicas_or_gpus_has_a_status_too():
    ledger = Ledger(LedgerConfig(), epoch=1, budget_w=700, now_s=0)
    status = fleet_status(ledger, {}, {}, {}, replace(FACTS, last_settle_s=None), 0)
    assert (status.charge_w, status.measured_w, status.replicas, status.gpus) == (0, 0, (), ())
    assert "700" in _shown(status_view(status))


def test_replicas_of_a_model_on_devices_of_one_kind_plan_for_their_mean():
    ledger = Ledger(LedgerConfig(), epoch=4, budget_w=2000, now_s=0)
    ledger.add_node(NodeInfo("n", tuple(ManagedGpu(uuid, 100, 400, 100) for uuid in UUIDS)), 0)
    members = {}
    for uuid, model, per_s in zip(UUIDS, ("m", "m", "other"), (3.8, 4.2, 9.0), strict=True):
        name = f"{model}#{uuid}"
        ledger.hello(Hello(name, "n", 1, fence_epoch=4), 0)
        session = ledger.hello(Hello(name, "n", 1, fence_epoch=4), 0).session
        ledger.claim(name, session, {uuid: 100.0}, 0)
        beat = replace(_member().beat, arrivals=Arrivals(per_s, 100.0))
        members[name] = Member(ReplicaSpec(name, model, 1, "n", gpus=(uuid,), max_batch=32), beat)
    found = fleet_snapshot(ledger, members, {}, 0.1).replicas
    assert [replica.arrivals.per_s for replica in found] == [pytest.approx(4.0), pytest.approx(4.0), 9.0]
