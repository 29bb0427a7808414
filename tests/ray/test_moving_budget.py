"""A budget that a schedule or a signal moves, and targets that an operator changes: on real agents and manager."""

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import ray

from pals_ray.cli import main
from pals_ray.config.reader import ConfigError
from pals_ray.control.budget.regulation import Signal
from pals_ray.runtime.manager.storage import read_state
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE
from pals_ray.types import Slo, Target
from tests.support import fleets
from tests.support.dummies import MODEL, DummyFleet
from tests.support.fleets import sampled_limits, wait_for

BUDGET_W = 900
LOWEST_W = 400


@pytest.fixture(scope="module")
def shared(cluster, tmp_path_factory):
    made = DummyFleet(tmp_path_factory.mktemp("state"))
    made.configure(BUDGET_W)
    made.serve(2, 1)
    yield made
    made.close()


@pytest.fixture
def serving(shared):
    """Two replicas on three of four GPUs, raised under a budget that was set."""
    shared.fleet.set_budget(BUDGET_W)
    wait_for(shared.settled, 10, "the budget is not handed out", 0.05)
    return shared


def entries(*rows, now=None):
    """A schedule of (start, end, watts), the times in s from now."""
    now = now or datetime.now(UTC)
    times = [(now + timedelta(seconds=start), now + timedelta(seconds=end), watts) for start, end, watts in rows]
    return {"entries": [{"start": s.isoformat(), "end": e.isoformat(), "budget_w": w} for s, e, w in times]}


def constant(y, duration_s=600.0):
    return Signal(np.array([0.0, duration_s]), np.array([y, y]))


def kill_manager():
    (process,) = fleets.actor_processes("GlobalPowerManager")
    process.kill()
    wait_for(lambda: not process.is_running() or process.status() == "zombie", 5, "it survives", 0.02)


def test_a_schedule_moves_the_budget_at_its_instants_and_what_was_set_comes_back(serving):
    began_s = time.monotonic()
    with sampled_limits(serving.gpus) as samples:
        source = serving.fleet.schedule_budget(entries((-60, 2, 700), (2, 4, 500)))
        assert (source.kind, source.set_w, source.asked_w) == ("schedule", BUDGET_W, 700)
        assert sum(serving.limits_w()) <= 700.01
        wait_for(lambda: serving.status().budget_w == 500, 4, "the next entry is not kept", 0.05)
        assert serving.status().source.asked_w == 500
        wait_for(lambda: serving.status().budget_w == BUDGET_W, 5, "the budget does not come back", 0.05)
    assert samples.worst_after(began_s + 2.5, began_s + 3.9) <= 500.01, "later than half a second"
    wait_for(serving.settled, 5, "what came back is not handed out", 0.05)
    assert sum(serving.limits_w()) > BUDGET_W - 1
    wait_for(lambda: "no entry of the schedule holds" in serving.status().source.reason, 3, "status does not say so")


def test_a_schedule_under_the_lowest_caps_is_held_at_them_with_the_watts_needed(serving):
    source = serving.fleet.schedule_budget(entries((-60, 600, 150)))
    assert "150 W" in source.warning
    assert "400 W" in source.warning
    status = serving.status()
    assert (status.budget_w, status.source.asked_w) == (LOWEST_W, 150)
    assert source.warning in status.notes
    assert serving.limits_w() == [100] * 4
    change = serving.fleet.set_budget(BUDGET_W)
    assert change.ended == "the schedule"
    assert serving.status().source.kind == "set"
    assert not any("schedule" in note for note in serving.status().notes)


def test_a_followed_signal_moves_the_budget_under_its_ceiling(serving):
    assert serving.fleet.follow_signal(constant(-1.0), base_w=700, range_w=150, ceiling_w=800).kind == "signal"
    wait_for(lambda: serving.status().source.asked_w == 550, 12, "the signal's mean does not come down", 0.1)
    assert serving.status().source.set_w == BUDGET_W
    with sampled_limits(serving.gpus) as samples:
        # Idle GPUs draw far less than the target, and would have the budget corrected up for ever.
        serving.fleet.follow_signal(constant(1.0), base_w=700, range_w=150, ceiling_w=800)
        wait_for(lambda: serving.status().source.warning, 12, "nothing says that the ceiling holds", 0.1)
        wait_for(lambda: sum(serving.limits_w()) > 780, 5, "the budget stays below its ceiling", 0.1)
    assert "over the ceiling of 800 W" in serving.status().source.warning
    assert samples.worst_after(0) <= 800.01
    assert serving.fleet.set_budget(600).ended == "the followed signal"
    assert serving.status().budget_w == 600


@pytest.mark.parametrize("kind", ["schedule", "signal"])
def test_what_moves_the_budget_survives_the_manager(serving, kind):
    if kind == "schedule":
        serving.fleet.schedule_budget(entries((-60, 600, 600)))
    else:
        serving.fleet.follow_signal(constant(0.0), base_w=600, range_w=100, ceiling_w=600)
    wait_for(lambda: serving.status().budget_w == 600, 5, "the budget does not move", 0.05)
    if kind == "signal":
        wait_for(lambda: _left_s(serving) < 1195, 8, "the signal does not go on", 0.1)
    epoch = serving.status().epoch
    with sampled_limits(serving.gpus) as samples:
        kill_manager()
        wait_for(lambda: _epoch() > epoch and serving.settled(), 20, "no other manager takes over", 0.1)
        status = serving.status()
    assert samples.worst_after(0) <= 600.01
    assert (status.budget_w, status.source.kind, status.source.set_w) == (600, kind, BUDGET_W)
    if kind == "signal":
        assert _left_s(serving) < 1195, "the signal began anew"
    assert serving.fleet.set_budget(BUDGET_W).ended is not None
    kept = read_state(str(serving.storage))
    assert (kept.plan, kept.budget_w) == (None, BUDGET_W)


def _left_s(serving):
    return float(serving.status().source.reason.split("; ")[1].split(" s")[0])


def _epoch():
    try:
        return ray.get(ray.get_actor(MANAGER_NAME, namespace=NAMESPACE).ping.remote(), timeout=5)
    except (ValueError, ray.exceptions.RayError):
        return 0


def test_the_same_configuration_again_keeps_schedule_and_targets_and_another_one_ends_them(serving):
    serving.fleet.schedule_budget(entries((-60, 600, 600)))
    serving.fleet.set_target(MODEL, ttft_s=2.0)
    serving.configure(BUDGET_W)
    status = serving.status()
    assert (status.budget_w, status.source.kind, status.replicas[0].target.slo.ttft_s) == (600, "schedule", 2.0)
    serving.configure(800)
    status = serving.status()
    assert (status.budget_w, status.source.kind, status.replicas[0].target.slo.ttft_s) == (800, "set", None)
    serving.configure(BUDGET_W)


def test_a_target_changes_alone_and_survives_the_manager(serving):
    fleet = serving.fleet
    assert fleet.set_target(MODEL, throughput_tokens_per_s=500, priority=1).throughput_tokens_per_s == 500
    changed = fleet.set_target(MODEL, throughput_tokens_per_s=None, tpot_s=0.05, window_s=60)
    assert changed == Target(Slo(tpot_s=0.05, window_s=60), priority=1)
    epoch = serving.status().epoch
    kill_manager()
    wait_for(lambda: _epoch() > epoch and serving.settled(), 20, "no other manager takes over", 0.1)
    assert {row.target for row in serving.status().replicas} == {changed}
    fleet.set_target(MODEL, tpot_s=None, window_s=300, priority=0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda fleet: fleet.set_target("nobody", priority=1), f"it has {MODEL}"),
        (lambda fleet: fleet.set_target(MODEL, priority=-1), "priority"),
        (lambda fleet: fleet.set_target(MODEL, watts=5), "watts: no such key"),
        (lambda fleet: fleet.set_target(MODEL, ttft_s=0), "slo.ttft_s"),
        (lambda fleet: fleet.set_target(MODEL, attainment=1), "slo.attainment"),
        (lambda fleet: fleet.set_target(MODEL, ttft_p99_s=1), "ttft_p99_s is no longer known"),
        (lambda fleet: fleet.schedule_budget({"entries": []}), "there is none"),
        (lambda fleet: fleet.schedule_budget("/nowhere.yaml"), "/nowhere.yaml"),
        (lambda fleet: fleet.follow_signal("/nowhere.csv", base_w=1, range_w=0, ceiling_w=1), "/nowhere.csv"),
        (lambda fleet: fleet.follow_signal(constant(0.0), base_w=700, range_w=800, ceiling_w=900), "nothing"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(serving, call, says):
    before = serving.status()
    with pytest.raises(ConfigError, match=says):
        call(serving.fleet)
    after = serving.status()
    assert (after.budget_w, after.source, after.replicas[0].target) == (
        before.budget_w,
        before.source,
        before.replicas[0].target,
    )


def test_the_async_calls_do_the_same(serving):
    fleet = serving.fleet  # found outside the loop, which must not block

    async def calls():
        scheduled = await fleet.schedule_budget_async(entries((-60, 600, 600)))
        followed = await fleet.follow_signal_async(constant(0.0), base_w=650, range_w=100, ceiling_w=800)
        target = await fleet.set_target_async(MODEL, priority=2)
        await fleet.set_target_async(MODEL, priority=0)
        return scheduled.asked_w, followed.asked_w, target.priority, await fleet.policies_async()

    *done, policies = asyncio.run(calls())
    assert done == [600, 650, 2]
    assert [policy.path for policy in policies if policy.in_use] == ["policies.uniform:allocate"]


class TestCommandLine:
    """`pals`, run in this process on the shared cluster."""

    @pytest.fixture
    @staticmethod
    def pals(serving, monkeypatch, capsys):
        monkeypatch.setattr("pals_ray.connect", lambda: serving.fleet)

        def run(*args):
            monkeypatch.setattr("sys.argv", ["pals", *map(str, args)])
            with pytest.raises(SystemExit) as ended:
                main.main()
            said = capsys.readouterr()
            return ended.value.code or 0, " ".join(said.out.split()), " ".join(said.err.split())

        return run

    def test_a_schedule_from_a_file_shows_in_budget_and_status(self, pals, tmp_path):
        path = tmp_path / "night.json"
        path.write_text(json.dumps(entries((-60, 600, 300))))
        code, out, _ = pals("budget", "schedule", path)
        assert code == 0
        assert "! the schedule asks for 300 W" in out
        for command in (("budget", "show"), ("status",)):
            assert (
                "a schedule moves the budget (set: 900 W): entry 1 of the schedule: 300 W, until 2" in pals(*command)[1]
            )
        assert "the schedule has ended" in pals("budget", "set", 800)[1]
        assert "stays as it was set: 800 W" in pals("budget", "show")[1]

    def test_a_signal_from_a_file_is_followed(self, pals, tmp_path):
        path = tmp_path / "signal.csv"
        path.write_text("value\n" + "0.5\n" * 100)
        code, out, err = pals("budget", "follow", path, "--base", 700, "--range", 100, "--ceiling", 850)
        assert (code, err) == (0, "")
        assert "the draw follows a signal (set: 900 W)" in out
        assert pals("budget", "follow", path, "--base", 700, "--range", 800, "--ceiling", 850)[0] == 1

    def test_a_target_is_changed_and_shown(self, pals):
        code, out, _ = pals("target", MODEL, "--throughput", 700, "--ttft", 1.5, "--tpot", "0.05")
        assert (code, out) == (0, f"{MODEL}: 700 tok/s, 99% of requests within TTFT 1.5 s and TPOT 50 ms over 300 s")
        assert "(limit 1.5 s)" in pals("status")[1]
        code, out, _ = pals("target", MODEL, "--throughput", "none", "--ttft", "none", "--tpot", "none")
        assert (code, out) == (0, f"{MODEL}: all demand")
        code, _, err = pals("target", MODEL, "--ttft-p99", 1.5)
        assert (code, "ttft_p99_s is no longer known" in err) == (1, True)
        code, _, err = pals("target", "nobody", "--priority", 1)
        assert (code, err) == (1, f"pals: there is no model 'nobody' in this fleet; it has {MODEL}")

    def test_policies_are_listed_with_the_one_in_use(self, pals):
        code, out, _ = pals("policies")
        assert code == 0
        assert "in use policies.uniform:allocate Every GPU the same" in out
        assert out.count("in use") == 1
        assert "policies.pals:allocate" in out
