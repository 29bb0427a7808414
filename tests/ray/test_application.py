"""Fleet files to Serve applications, up to where a cluster would be needed."""

import os
import subprocess

import pytest
import yaml

from deployments.application import DEFAULT_CONFIG, EXAMPLES, build
from pals_ray.config.policy_path import UnknownPolicy
from pals_ray.config.reader import ConfigError
from tests.support import fleets

# Building asks Ray for its runtime environment, and would start a cluster where there is none.
pytestmark = pytest.mark.usefixtures("cluster")


def written(tmp_path, **changes):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(DEFAULT_CONFIG.read_text()) | changes))
    return {"config": str(path)}


def with_source(source):
    models = yaml.safe_load(DEFAULT_CONFIG.read_text())["models"]
    models[0]["llm_config"]["model_loading_config"]["model_source"] = source
    return models


def deployment(application, model):
    """The bound deployment of a model, as Serve will see it."""
    return application._bound_deployment.init_kwargs["llm_deployments"][model]._bound_deployment


def test_the_h100_example_builds_one_replica_per_node_group_with_our_hooks():
    application = build({"config": str(EXAMPLES / "h100.yaml")})
    for model, gpus in (("llama-3.1-70b", 4), ("qwen3-30b-a3b", 2)):
        bound = deployment(application, model)
        options = bound._replica_config
        assert options.placement_group_strategy == "STRICT_PACK"
        assert [bundle["GPU"] for bundle in options.placement_group_bundles] == [1] * gpus
        assert bound.init_kwargs["power"].num_gpus == gpus
        # Serve hands every request on at once: it waits in the engine, which judges it.
        assert bound._deployment_config.max_ongoing_requests >= 1_000_000
        engine = bound.init_kwargs["llm_config"].get_engine_config().engine_kwargs
        assert engine["scheduler_cls"] == "pals_ray.engine.scheduler.PowerAwareScheduler"
        assert "worker_cls" not in engine


def test_only_what_an_engine_is_made_from_changes_its_version(tmp_path):
    def versions(**changes):
        application = build(written(tmp_path, **changes))
        return [deployment(application, model)._version for model in ("tiny-dense", "tiny-moe")]

    models = yaml.safe_load(DEFAULT_CONFIG.read_text())["models"]
    models[0]["llm_config"]["deployment_config"]["num_replicas"] = 2
    models[0]["target"] = {"priority": 1}
    before = versions()
    assert versions(budget_w=900, policy="policies.uniform:allocate", models=models) == before
    models[0]["llm_config"]["engine_kwargs"]["max_num_seqs"] = 8
    assert [a == b for a, b in zip(versions(models=models), before, strict=True)] == [False, True]
    assert [a == b for a, b in zip(versions(time_scale=3.0), before, strict=True)] == [False, False]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"policy": "policies.nothing:allocate"}, UnknownPolicy, "policies.proportional:allocate"),
        ({"policy": "policies.uniform:nothing"}, UnknownPolicy, "policies.uniform:nothing"),
        ({"models": with_source("/nowhere/at/all")}, ConfigError, "/nowhere/at/all holds no config.json"),
    ],
)
def test_what_only_the_building_machine_can_tell_is_refused(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        build(written(tmp_path, **changes))


def test_an_unknown_argument_is_refused_with_the_possible_one():
    with pytest.raises(ConfigError, match="config=PATH"):
        build({"budget": "900"})


@pytest.mark.parametrize(
    ("config", "env", "says"),
    [
        ({"watts": 5}, {}, "watts: no such key"),
        ({}, {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}, "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"),
    ],
)
def test_serve_run_says_it_in_one_message_and_starts_nothing(tmp_path, config, env, says):
    path = written(tmp_path, **config)["config"]
    done = subprocess.run(
        [str(fleets.BIN / "serve"), "run", "deployments:build", f"config={path}"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "Started a local Ray instance" not in done.stderr


def test_pals_without_a_cluster_says_how_to_start_one(tmp_path):
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run([str(fleets.BIN / "pals"), "status"], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "serve run deployments:app" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
