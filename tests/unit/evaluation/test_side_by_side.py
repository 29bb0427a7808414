"""The simulated twin of a live fleet, and what is said of the two."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pals_ray.bench.served_fleet import default_fleet
from pals_ray.bench.validate_simulation import cells
from pals_ray.config.fleet import parse_fleet_config
from pals_ray.control.telemetry import Reading, between
from pals_ray.evaluation.side_by_side import (
    STAGES,
    BudgetStep,
    HeldPoint,
    look_times,
    requests_of,
    rows_of,
    simulated,
    summary,
    twin,
    within,
)
from pals_ray.simulation.fleet import build
from pals_ray.simulation.setting import SimulationError
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, OperatingPoint, Verdicts

#: The dense replica on the second GPU, the MoE on the first and the last.
MEMBERS = (
    ("tiny-dense", (0.98,), SimpleNamespace(max_batch=32, step_tokens=4096, kv_tokens=262_144)),
    ("tiny-moe", (1.0, 0.99), SimpleNamespace(max_batch=24, step_tokens=2048, kv_tokens=524_288)),
)
FULL = HeldPoint(OperatingPoint(250.0, 16), 1.3)
SECONDS = 20.0


@pytest.fixture(scope="module")
def config():
    return parse_fleet_config(default_fleet(), "the default fleet")


@pytest.fixture(scope="module")
def setting(config):
    return twin(config, MEMBERS, parked_dies=[1.01])


def run(setting, stage, seed=3):
    looks_s = look_times(stage, SECONDS)
    return simulated(setting, stage, requests_of(stage, setting.fleet, looks_s[-1], seed), looks_s)


def reading(time_s, tokens, energy_j, itl_s, count, late=0):
    """Counters of an engine all of whose tokens came `itl_s` apart."""
    counts = [0] * (len(LATENCY_EDGES_S) + 1)
    counts[next(i for i, edge_s in enumerate(LATENCY_EDGES_S) if itl_s <= edge_s)] = count
    histograms = {f"{name}_counts": tuple(counts) for name in ("ttft", "tpot", "itl")}
    engine = EngineTelemetry(time_s, 4, 0, 0.1, 0, tokens, 0, 0, 4, 32, 0, Verdicts(count, late), **histograms)
    return Reading(time_s, engine, energy_j, 200.0)


def test_the_twin_has_the_live_dies_scheduler_limits_and_time_scale(setting, config):
    assert setting.fleet.nodes[0].dies == (0.98, 1.0, 0.99, 1.01)
    assert setting.fleet.time_scale == config.time_scale
    dense, moe = setting.fleet.models
    assert (dense.spec, dense.parallelism.num_gpus, dense.kv_capacity_tokens) == ("Qwen3-32B", 1, 262_144)
    assert (moe.spec, moe.parallelism.num_gpus, moe.max_batch, moe.step_tokens) == ("Mixtral-8x7B", 2, 24, 2048)


def test_a_node_whose_dies_are_given_has_these_and_not_those_of_the_seed(setting):
    drawn_w = []
    for die in (0.9, 1.1):
        other = twin_of(setting, (die, 1.0, 1.0, 1.0))
        first, last = run(other, HeldPoint(OperatingPoint(400.0, 32), 1.3))
        drawn_w.append(between(first["tiny-dense"], last["tiny-dense"]).power_w)
    assert drawn_w[1] > 1.1 * drawn_w[0]
    with pytest.raises(SimulationError, match="4 GPUs, but 2 dies"):
        build(twin_of(setting, (1.0, 1.0)), {})


def twin_of(setting, dies):
    (node,) = setting.fleet.nodes
    return replace(setting, fleet=replace(setting.fleet, nodes=(replace(node, dies=dies),)))


def test_the_same_seed_offers_the_same_requests_and_another_one_others(setting):
    one, same, other = (requests_of(FULL, setting.fleet, SECONDS, seed) for seed in (1, 1, 2))
    for model in one:
        assert one[model].arrival_s.tolist() == same[model].arrival_s.tolist()
        assert one[model].output_tokens.tolist() == same[model].output_tokens.tolist()
        assert one[model].arrival_s.tolist() != other[model].arrival_s.tolist()


def test_a_full_batch_makes_a_token_each_per_step_less_what_prompts_take(setting):
    first, last = run(setting, FULL)
    for model, gpus in (("tiny-dense", 1), ("tiny-moe", 2)):
        seen = between(first[model], last[model])
        assert seen.running == 16
        assert 0.8 * 16 < seen.throughput_tokens_per_s * seen.itl.p50_s <= 16
        assert seen.power_w <= gpus * 250


def test_the_budget_falls_between_the_windows_and_is_kept(setting):
    step = next(stage for stage in STAGES if isinstance(stage, BudgetStep))
    looks = run(setting, step)
    before_w, after_w = (
        sum(between(looks[i][m], looks[i + 1][m]).power_w for m in ("tiny-dense", "tiny-moe")) for i in (0, 2)
    )
    # The parked GPU is charged its lowest cap.
    assert after_w <= step.after_w - 100
    assert before_w > step.after_w


def test_every_window_of_a_stage_is_compared_and_judged_by_each_limit():
    live = [{"m": reading(10.0, 0, 0.0, 0.05, 0)}, {"m": reading(20.0, 1000, 2000.0, 0.05, 900)}]
    close = [{"m": reading(5.0, 0, 0.0, 0.05, 0)}, {"m": reading(15.0, 1050, 1900.0, 0.05, 900)}]
    far = [{"m": reading(5.0, 0, 0.0, 0.05, 0)}, {"m": reading(15.0, 1050, 1750.0, 0.05, 900)}]
    (row,) = rows_of(FULL, live, close)
    assert row["what"] == "250 W, batch 16, load 1.3"
    assert row["errors"] == pytest.approx({"tokens_per_s": 0.05, "power_w": -0.05, "itl_p50_s": 0.0, "tpot_p50_s": 0.0})
    assert cells(row)[:2] == ["100.0 / 105.0, +5.0%", "200 / 190, -5.0%"]
    assert within(row)
    assert summary([row])["within"]
    worse = rows_of(FULL, live, far)
    assert not summary([row, *worse])["within"]
    assert summary([row, *worse])["largest_errors"]["power_w"] == pytest.approx(0.125)
    step = BudgetStep(1200.0, 600.0, 0.7)
    later = [{"m": reading(30.0, 1000, 2000.0, 0.05, 900)}, {"m": reading(40.0, 1500, 3000.0, 0.05, 1300)}]
    assert [row["live"]["power_w"] for row in rows_of(step, live + later, close + later)] == [200, 100]


def test_the_attainment_of_all_windows_together_is_compared():
    live = [{"m": reading(10.0, 0, 0.0, 0.05, 0)}, {"m": reading(20.0, 1000, 2000.0, 0.05, 900, 100)}]
    alike, worse = ([live[0], {"m": reading(20.0, 1000, 2000.0, 0.05, 900, late)}] for late in (95, 150))
    found = summary(rows_of(FULL, live, alike))
    assert (found["live_attainment"], found["within"]) == (0.9, True)
    assert found["simulated_attainment"] == pytest.approx(900 / 995)
    assert not summary(rows_of(FULL, live, worse))["within"]


def test_a_side_without_tokens_is_beyond_the_limits():
    silent = [{"m": reading(time_s, 0, 100 * time_s, 0.05, 0)} for time_s in (10.0, 20.0)]
    (row,) = rows_of(FULL, silent, silent)
    assert row["errors"]["tokens_per_s"] is None
    assert not within(row)
