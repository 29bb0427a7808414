"""Whole runs: manager, agents and engines together."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.regulation import synthetic_signal
from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.control.budget.signal_following import Following
from pals_ray.control.snapshot import Overhead
from pals_ray.errors import InfeasibleBudget
from pals_ray.simulation.results.figures import figures
from pals_ray.simulation.run import Run
from pals_ray.simulation.setting import Failure, Messages, SimNode, SimulationError
from pals_ray.simulation.simulate import collect, simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Slo, Target
from policies import static, uniform

from .worlds import fleet_setting, poisson, served

#: From a cut of the budget until every cap is in force: two messages, a call to the driver under way, and the own.
SETTLE_S = 0.1
CUTS = {
    "budget_w": 800.0,
    "plan": Schedule((Entry(20.0, 40.0, 420.0), Entry(55.0, 70.0, 300.0, ramp_s=5.0))),
}


def fingerprint(result):
    """Every digit of a result."""
    parts = [result.energy_j, result.node_energy_j, result.tokens, result.grants, result.stranded_w, result.cuts]
    for model in result.models.values():
        r = model.requests
        parts += [r.first_token_s.tobytes(), r.finish_s.tobytes(), r.tokens.tobytes(), r.replica.tobytes()]
        parts += [model.itl_counts.tobytes()]
    for one in result.replicas:
        parts += [one.energy_j, one.cap_changes, one.cap_w.tobytes(), one.power_w.tobytes(), one.running.tobytes()]
    return repr(parts)


def test_the_same_seed_gives_the_same_result_to_the_last_digit_and_another_seed_does_not():
    setting = fleet_setting(replicas=3, **CUTS, duration_s=30.0, seed=7, messages=Messages(lost=0.05))
    requests = {"m": poisson(15.0, 30.0, seed=1)}
    first = fingerprint(simulate(setting, requests))
    assert first == fingerprint(simulate(setting, requests))
    assert first != fingerprint(simulate(replace(setting, seed=8), requests))


def test_a_result_does_not_depend_on_the_process():
    code = (
        "import hashlib\n"
        "from tests.unit.simulation.test_run import *\n"
        "result = simulate(fleet_setting(replicas=2, duration_s=5.0), {'m': poisson(10.0, 5.0, seed=1)})\n"
        "print(hashlib.sha256(fingerprint(result).encode()).hexdigest())\n"
    )
    root = Path(__file__).parents[3]
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


@pytest.mark.parametrize("lost", [0.0, 0.3])
@pytest.mark.parametrize("policy", [None, uniform.allocate])
def test_what_is_charged_stays_within_the_budget_at_every_event_but_for_settling_after_a_cut(lost, policy):
    # With a third of the messages lost a cut may wait for the answer to the next beat that gets through.
    settle_s = SETTLE_S if not lost else 10.0
    more = {} if policy is None else {"policy": policy}
    setting = fleet_setting(replicas=2, **CUTS, duration_s=80.0, messages=Messages(lost=lost), **more)
    run = Run(setting, {"m": poisson(14.0, 80.0, seed=3)})
    fell_s, before_w = -math.inf, 800.0
    events = run.events
    run_next = events.run_next

    def checked() -> None:
        nonlocal fell_s, before_w
        now_s = events.next_s
        run_next()
        if run.budgets.budget_w < before_w:
            fell_s = now_s
        before_w = run.budgets.budget_w
        assert run.budgets.charge_w <= run.budgets.budget_w + 1e-6 or now_s <= fell_s + settle_s

    events.run_next = checked
    run.to_the_end()
    result = collect(run)
    if not lost:  # else a replica that has not heard of a cut may rise within its old grant once all seems settled
        assert result.charge_over_s <= sum(cut.settled_s for cut in result.cuts) + 1e-9
    # A cut of the ramp that the next one overtook, its message lost, settles with that one.
    overtaken = [cut.settled_s is None for cut in result.cuts]
    assert not any(overtaken) or (lost and not overtaken[-1])
    done_s = math.inf
    for cut in reversed(result.cuts):
        done_s = done_s if cut.settled_s is None else cut.at_s + cut.settled_s
        assert done_s - cut.at_s <= settle_s
    assert len(result.cuts) > 2
    assert result.over_budget_s <= result.charge_over_s + 0.3 * len(result.cuts)
    assert result.models["m"].requests.tokens.sum() == result.tokens > 0


def test_a_constant_budget_is_never_exceeded_by_a_charge():
    result = simulate(
        fleet_setting(replicas=4, budget_w=900.0, duration_s=60.0),
        {"m": poisson(80.0, 60.0, seed=2)},
    )
    assert result.charge_over_s == 0.0
    assert result.charge_w.max() <= 900.0
    assert result.cuts == ()
    assert result.charge_w[-20:].mean() > 700.0


def test_all_that_arrived_finished_runs_or_waits():
    result = simulate(fleet_setting(duration_s=40.0, budget_w=400.0), {"m": poisson(14.0, 40.0, seed=2)})
    requests = result.models["m"].requests
    finished = np.isfinite(requests.finish_s)
    begun = np.isfinite(requests.first_token_s)
    assert (requests.replica >= 0).all()
    assert (requests.tokens[finished] == requests.output_tokens[finished]).all()
    assert (requests.tokens[~finished] < requests.output_tokens[~finished]).all()
    assert (requests.tokens[~begun] == 0).all()
    assert (~finished).sum() > 20
    assert result.tokens == requests.tokens.sum()


def test_energy_at_both_boundaries_is_the_integral_of_the_series():
    overhead = Overhead(300.0, 0.2)
    setting = fleet_setting(replicas=2, overhead=overhead, duration_s=30.0)
    node = replace(setting.fleet.nodes[0], num_gpus=4)
    setting = replace(setting, fleet=replace(setting.fleet, nodes=(node,)), budget_w=2300.0)
    result = simulate(setting, {"m": poisson(5.0, 30.0, seed=2)})
    assert result.energy_j == pytest.approx(result.power_w.sum() * 0.5, rel=1e-6)
    assert result.node_energy_j == pytest.approx(300.0 * 30.0 + 1.2 * result.energy_j, rel=1e-9)
    assert result.node_power_w.mean() * 30.0 == pytest.approx(result.node_energy_j, rel=1e-6)
    idle_w = setting.fleet.models[0].physics.gpu.idle_bare_w
    assert result.energy_j > 2 * idle_w * 30.0 + sum(r.energy_j for r in result.replicas) - 1e-6


def test_static_holds_every_gpu_at_its_highest_cap_and_the_start_batch():
    result = simulate(fleet_setting(policy=static.allocate, duration_s=20.0), {"m": poisson(5.0, 20.0, seed=2)})
    for replica in result.replicas:
        assert (replica.cap_w == 400.0).all()
        assert (replica.batch_limit == 64).all()
        assert replica.cap_changes == 1


def test_with_few_requests_the_controller_saves_watts_and_still_serves_them():
    requests = {"m": poisson(4.0, 360.0, seed=2)}
    model = served(target=Target(slo=Slo(ttft_s=0.5, tpot_s=0.1)))
    full = simulate(fleet_setting(model, policy=static.allocate, duration_s=360.0), requests)
    ours = simulate(fleet_setting(model, duration_s=360.0, follow_s=60.0), requests)
    assert figures(ours, 60.0)["attainment"] >= 0.98
    assert ours.energy_j < 0.95 * full.energy_j


def test_a_silent_agent_goes_to_its_fail_safe_cap_and_comes_back():
    setting = fleet_setting(
        policy=static.allocate,
        duration_s=40.0,
        failures=(Failure("agent_silent", 10.0, 15.0, "m#0"),),
        fail_safe_cap_w=150.0,
    )
    result = simulate(setting, {"m": poisson(10.0, 40.0, seed=2)})
    cap_w = result.replicas[0].cap_w
    time_s = result.time_s
    assert (cap_w[(time_s > 1) & (time_s < 14)] == 400.0).all()
    assert (cap_w[(time_s > 16.5) & (time_s < 25)] == 150.0).all()
    assert cap_w[-1] == 400.0
    assert (result.replicas[1].cap_w[time_s > 1] == 400.0).all()
    assert result.charge_over_s == 0.0


def test_a_new_manager_takes_over_and_divides_again_without_passing_the_budget():
    setting = fleet_setting(replicas=3, duration_s=40.0, budget_w=800.0, failures=(Failure("manager_down", 10.0, 3.0),))
    result = simulate(setting, {"m": poisson(60.0, 40.0, seed=2)})
    assert result.charge_over_s == 0.0
    assert result.charge_w.max() <= 800.0
    caps = np.array([replica.cap_w for replica in result.replicas])
    assert caps.sum(axis=0)[-4:].min() > 700.0


def test_when_a_node_dies_its_requests_are_served_elsewhere_and_its_watts_stop():
    setting = fleet_setting(duration_s=60.0)
    nodes = tuple(SimNode(name, "A100-SXM", 1, ("m",), overhead=Overhead(100.0, 0.0)) for name in ("a", "b"))
    setting = replace(
        setting,
        fleet=replace(setting.fleet, nodes=nodes),
        budget_w=1000.0,
        failures=(Failure("node_death", 20.0, who="a"),),
    )
    offered = poisson(6.0, 30.0, seed=2)
    result = simulate(setting, {"m": offered})
    requests = result.models["m"].requests
    assert np.isfinite(requests.finish_s).all()
    assert (requests.replica[requests.arrival_s > 20.0] == 1).all()
    dead = result.replicas[0]
    assert dead.power_w[result.time_s > 20.5].max() == 0.0
    assert dead.tokens > 0
    assert result.node_power_w[-1] == pytest.approx(100.0 + result.power_w[-1], rel=1e-6)


def test_a_followed_signal_is_followed():
    following = Following(base_w=420.0, range_w=70.0, ceiling_w=800.0)
    signal = synthetic_signal(180.0, seed=1)
    plan = FollowedSignal(following, tuple(signal.time_s.tolist()), tuple(signal.value.tolist()), 0.0)
    setting = fleet_setting(duration_s=180.0, plan=plan, policy=uniform.allocate)
    result = simulate(setting, {"m": poisson(40.0, 180.0, seed=2)})
    late = result.time_s > 30.0
    error = np.abs(result.node_power_w - result.target_w)[late].mean() / result.target_w[late].mean()
    assert result.target_w.std() > 10.0
    assert error < 0.06


def test_what_cannot_be_is_refused_with_what_would_help():
    requests = {"m": poisson(1.0, 5.0, seed=1)}
    with pytest.raises(InfeasibleBudget, match="needed"):
        simulate(fleet_setting(budget_w=150.0), requests)
    with pytest.raises(SimulationError, match="KV cache"):
        simulate(fleet_setting(served(kv_tokens=100)), {"m": Trace(np.zeros(1), np.array([90]), np.array([20]), 1.0)})
    with pytest.raises(SimulationError, match="does not serve"):
        simulate(fleet_setting(), {"other": requests["m"]})
    other = replace(served(), name="n", fixed=OperatingPoint(400.0, 8))
    with pytest.raises(SimulationError, match="fixed point"):
        simulate(fleet_setting(served(), other), requests)
    with pytest.raises(SimulationError, match="does not fit"):
        simulate(fleet_setting(served("Llama-3.1-70B")), requests)


def test_after_the_end_requests_are_followed_until_each_has_its_verdict():
    slo = Target(slo=Slo(ttft_s=1.0, tpot_s=0.02))
    offered = {"m": poisson(8.0, 90.0, seed=1)}
    setting = fleet_setting(served(target=slo), duration_s=40.0)
    cut, followed = (simulate(replace(setting, follow_s=s), offered) for s in (0.0, 50.0))
    came = followed.models["m"].requests.arrival_s < 40.0
    good, late = followed.models["m"].requests.verdicts(slo.slo, followed.followed_s)
    assert (good | late)[came].all()
    unjudged = ~np.logical_or(*cut.models["m"].requests.verdicts(slo.slo, cut.followed_s))
    assert unjudged[came].any()
    assert cut.followed_s == 40.0 < followed.followed_s <= 90.0
    # Nothing else is taken from the time after the end, and the load goes on meanwhile.
    assert followed.node_energy_j == cut.node_energy_j
    assert followed.tokens == cut.tokens
    assert len(followed.time_s) == len(cut.time_s)
    assert np.isfinite(followed.models["m"].requests.first_token_s[~came & (offered["m"].arrival_s < 45.0)]).any()
