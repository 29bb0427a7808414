"""Scenarios: the shipped ones can be used, and one that cannot says what is wrong and what is possible."""

from __future__ import annotations

import pytest
import yaml

from pals_ray.config.reader import ConfigError
from pals_ray.config.scenario import SHIPPED, find_scenario, load_scenario, start_batch
from pals_ray.config.trace_files import load_trace
from pals_ray.evaluation.cases import cases_of

NAMES = (
    "demand_response",
    "failures",
    "mixed_fleet",
    "pals_cluster",
    "pals_node",
    "pals_paper",
    "pals_paper_cluster",
    "regulation",
)


@pytest.fixture
def changed(tmp_path):
    def changed(**changes):
        content = yaml.safe_load((SHIPPED / "regulation.yaml").read_text())
        content.update(changes)
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return changed


def test_the_shipped_scenarios_are_those_of_the_evaluation():
    assert tuple(sorted(file.stem for file in SHIPPED.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_scenario_can_be_used_with_its_sample_trace(name):
    path = find_scenario(name)
    scenario = load_scenario(path)
    assert scenario.name == name
    assert "static" in scenario.policies
    assert "pals" in scenario.policies
    assert len(load_trace(path.parent / scenario.trace.sample, scenario.trace.format)) > 100


def test_pals_node_is_the_grid_of_the_paper():
    scenario = load_scenario(find_scenario("pals_node"))
    assert len(scenario.fleets) == 16
    assert {fleet.nodes[0].gpu for fleet in scenario.fleets} == {"A100-SXM", "H100-SXM"}
    for fleet in scenario.fleets:
        (node,), (model,) = fleet.nodes, fleet.models
        assert model.max_batch == 256
        slos = {name: limits.slo_of(model) for name, limits in scenario.limits.items()}
        large = model.name in {"Llama-3.1-70B", "Mixtral-8x7B", "Llama-4-Scout"}
        assert (slos["server"].ttft_s, slos["server"].tpot_s) == (2.0, 0.2 if large else 0.1)
        assert (slos["interactive"].ttft_s, slos["interactive"].tpot_s) == (0.5, 0.04)
        assert len(node.models) * model.tensor_parallel == node.gpus == 4


@pytest.mark.parametrize(
    ("policy", "most", "start"),
    [("static", 256, 64), ("static", 32, 32), ("static@256", 256, 256), ("pals", 256, 256), ("pals@64", 256, 64)],
)
def test_engines_start_at_what_a_policy_name_says_and_static_ones_at_64(policy, most, start):
    assert start_batch(policy, most) == start


def test_every_budget_is_a_case_and_the_common_peak_only_at_the_first():
    names = [case.name for case in cases_of(load_scenario(find_scenario("pals_cluster")))]
    assert len(names) == len(set(names)) == 8
    assert [name for name in names if "together" in name] == [
        "three nodes, server, load 0.65 together, 4800 W",
        "three nodes, server, load 0.75 together, 4800 W",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": ["static", "magic"]}, r"policies: unknown policy 'magic'; possible are static"),
        ({"policies": ["power_only@0"]}, "unknown policy 'power_only@0'"),
        ({"limits": {"server": {"ttft_s": 2.0}}}, "tpot_s"),
        ({"limits": {"server": {"ttft_s": 0.0, "tpot_s": 0.1}}}, "ttft_s"),
        ({"limits": {"s": {"ttft_s": 1, "tpot_s": 1, "models": {"GPT-2": {"ttft_s": 1, "tpot_s": 1}}}}}, "no fleet"),
        ({"load": {"closed": True}}, "needs load.targets"),
        ({"seeds": [7], "tuning_seeds": [7]}, "overlap"),
        ({"budget": {"watts": 900, "shares": [0.5]}}, "not both"),
        ({"budget": {"regulation": {"base_share": 0.9, "range_share": 0.2}}}, "exceed the natural draw"),
        ({"budget": {"event": {"share": 0.5, "start_s": 10, "end_s": 99999}}}, "end within 3600 s"),
        ({"load": {"shares": [0.7], "of": "budget"}}, "needs budget.watts"),
        ({"oracle": True}, "one model each"),
        ({"failures": [{"kind": "node_death", "at_s": 5}]}, "needs `who`"),
        ({"surprise": 1}, "surprise: no such key"),
    ],
)
def test_a_scenario_that_cannot_be_used_says_why(changed, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_scenario(changed(**changes))


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (
            {"gpu": "A100-SXM", "gpus": 2, "models": ["Qwen3-30B-A3B", "Llama-3.1-8B"]},
            "2 GPUs, but its replicas need 3",
        ),
        ({"gpu": "A1000", "gpus": 4, "models": ["Llama-3.1-8B"]}, "unknown GPU 'A1000'"),
        ({"gpu": "A100-SXM", "gpus": 4, "models": ["Mixtral-8x7B"]}, "not among the fleet's models"),
        ({"gpu": "A100-SXM", "gpus": 4, "models": ["Llama-3.1-8B"]}, "Qwen3-30B-A3B has no replica"),
    ],
)
def test_replicas_that_do_not_fit_are_refused(changed, node, said):
    fleet = yaml.safe_load((SHIPPED / "regulation.yaml").read_text())["fleets"][0]
    with pytest.raises(ConfigError, match=said):
        load_scenario(changed(fleets=[{**fleet, "nodes": [node]}]))


def test_a_models_slo_can_be_given_and_its_old_limits_are_refused(changed):
    fleet = yaml.safe_load((SHIPPED / "regulation.yaml").read_text())["fleets"][0]

    def asked(target):
        return load_scenario(changed(fleets=[{**fleet, "models": [m | {"target": target} for m in fleet["models"]]}]))

    (spec,) = asked({"slo": {"tpot_s": 0.1}}).fleets
    assert {model.target.target().slo.tpot_s for model in spec.models} == {0.1}
    with pytest.raises(ConfigError, match="itl_p99_s is no longer known"):
        asked({"itl_p99_s": 0.1})


def test_an_unknown_name_lists_the_shipped_scenarios():
    with pytest.raises(ConfigError, match=", ".join(NAMES)):
        find_scenario("pals_nod")
