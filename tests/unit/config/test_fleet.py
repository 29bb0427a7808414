import copy
from pathlib import Path

import pytest
import yaml

from pals_ray.config.fleet import load_fleet_config, parse_fleet_config
from pals_ray.config.reader import ConfigError
from pals_ray.types import Slo

EXAMPLES = Path(__file__).parents[3] / "deployments" / "examples"
DEFAULT_CONFIG, H100_CONFIG = EXAMPLES / "tiny.yaml", EXAMPLES / "h100.yaml"
TINY = yaml.safe_load(DEFAULT_CONFIG.read_text())


def changed(path, value):
    """The default fleet file with one key set; `path` as in models.0.llm_config."""
    content = copy.deepcopy(TINY)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in parents:
        place = place[part]
    place[last] = value
    return content


def test_the_default_fleet_is_two_models_on_four_virtual_a100s():
    fleet = load_fleet_config(DEFAULT_CONFIG)
    assert [(model.model_id, model.num_gpus) for model in fleet.models] == [("tiny-dense", 1), ("tiny-moe", 2)]
    assert (fleet.budget_w, fleet.hardware.virtual.gpu, fleet.hardware.virtual.count) == (1200, "A100-SXM", 4)
    assert (fleet.reserve_w, fleet.overhead.a_w, fleet.overhead.b) == (0, 0, 0)
    assert {model.target.target().slo for model in fleet.models} == {Slo(ttft_s=4.0, tpot_s=0.2)}


def test_the_h100_example_is_a_70b_on_four_and_an_moe_on_two_under_3000_w():
    fleet = load_fleet_config(H100_CONFIG)
    assert [(model.model_id, model.num_gpus) for model in fleet.models] == [("llama-3.1-70b", 4), ("qwen3-30b-a3b", 2)]
    assert (fleet.budget_w, fleet.hardware.kind) == (3000, "nvml")
    slos = [model.target.target().slo for model in fleet.models]
    assert [(slo.ttft_s, slo.tpot_s) for slo in slos] == [(2.0, 0.2), (2.0, 0.1)]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("budget_w", -5, "budget_w: Input should be greater than 0"),
        ("budget_w", float("nan"), "budget_w"),
        ("budget_w", "plenty", "budget_w"),
        ("budget_w", 399, "needs 400 W with every GPU at its lowest cap"),
        ("reserve_w", 1200, "leaves nothing of 1200 W"),
        ("policy", "uniform", "package.module:function"),
        ("time_scale", 0.5, "time_scale"),
        ("watts", 5, "watts: no such key"),
        ("models", [], "models: the list is empty; name one model at least"),
        ("models", None, "models: Input should be a valid tuple"),
        ("hardware.virtual.gpu", "A1000", "A100-SXM"),
        ("models.0.stands_for", "Qwen3-33B", "Qwen3-32B"),
        ("models.0.stands_for", None, "stands_for"),
        ("models.1.llm_config.engine_kwargs.tensor_parallel_size", 8, "needs 8 GPUs on one node, which has 4"),
        ("models.1.llm_config.engine_kwargs.tensor_parallel_size", 0, "at least 1"),
        ("models.1.llm_config.placement_group_config", {"strategy": "PACK"}, "over several nodes"),
        ("models.1.llm_config.placement_group_config", {"bundles": [{"CPU": 1}]}, "tensor x pipeline parallel needs 2"),
        ("models.1.llm_config.placement_group_config", {"bundle_per_worker": {"GPU": 0.5}}, "fractions"),
        ("models.1.llm_config.model_loading_config.model_id", "tiny-dense", "tiny-dense is there twice"),
        ("models.1.llm_config.model_loading_config", {}, "model_loading_config.model_id"),
        ("models.1.target", {"priority": -1}, "priority"),
        ("models.1.target", {"slo": {"tpot_s": 0}}, "models.1.target.slo.tpot_s: Input should be greater than 0"),
        ("models.1.target", {"ttft_p99_s": 1.0}, "models.1.target: ttft_p99_s is no longer known"),
        ("models.1.slo", {"ttft_s": 1.0}, "models.1: an SLO belongs to the target"),
        ("domains", [{"name": "a", "budget_w": 500, "parent": "b"}], "parent 'b' is not a domain"),
        (
            "domains",
            [{"name": "a", "budget_w": 5, "parent": "b"}, {"name": "b", "budget_w": 5, "parent": "a"}],
            "its own ancestor",
        ),
    ],
)
def test_a_wrong_fleet_file_is_refused_with_the_key_and_what_is_possible(path, value, says):
    with pytest.raises(ConfigError) as refused:
        parse_fleet_config(changed(path, value), "fleet.yaml")
    assert "fleet.yaml" in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not YAML"), ("- 1", "must hold a mapping"), (None, "No such file or directory")]
)
def test_a_file_that_holds_no_fleet_is_refused_by_name(tmp_path, text, says):
    path = tmp_path / "fleet.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        load_fleet_config(path)
    assert str(path) in str(refused.value)
