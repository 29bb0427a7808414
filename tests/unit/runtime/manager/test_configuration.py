"""What a manager makes of a configuration: that of the manager before, and a change of a target."""

import copy
from pathlib import Path

import pytest
import yaml

from pals_ray.config.fleet import parse_fleet_config
from pals_ray.config.reader import ConfigError
from pals_ray.runtime.manager.configuration import changed_target, deployment_of, same_ledger, stored_config
from pals_ray.types import Slo, Target

TINY = yaml.safe_load((Path(__file__).parents[4] / "deployments" / "examples" / "tiny.yaml").read_text())


def with_target(target):
    content = copy.deepcopy(TINY)
    content["models"][0]["target"] = target
    return content


def test_what_was_deployed_is_gone_on_with():
    assert stored_config(None) is None
    config = parse_fleet_config(TINY, "tiny.yaml")
    assert stored_config(config.model_dump(mode="json")) == config


def test_what_an_earlier_version_deployed_is_waited_out_with_a_word_in_the_log(caplog):
    assert stored_config(with_target({"ttft_p99_s": 1.0})) is None
    assert "waiting for the next deployment" in caplog.text
    assert "ttft_p99_s is no longer known" in caplog.text


def test_another_slo_keeps_the_running_ledger_and_is_deployed():
    before, after = (parse_fleet_config(with_target({"slo": {"tpot_s": s}}), "x") for s in (0.1, 0.2))
    assert same_ledger(before, after)
    assert deployment_of(after).targets["tiny-dense"] == Target(Slo(tpot_s=0.2))


def test_a_target_changes_alone_and_a_wrong_one_names_model_and_key():
    targets = {"m": Target(Slo(ttft_s=2.0, tpot_s=0.1), priority=1)}
    changed = changed_target(targets, "m", {"tpot_s": None, "attainment": 0.95, "throughput_tokens_per_s": 10})
    assert changed == Target(Slo(ttft_s=2.0, attainment=0.95), throughput_tokens_per_s=10, priority=1)
    with pytest.raises(ConfigError, match="the target of m stays as it is") as refused:
        changed_target(targets, "m", {"window_s": 5})
    assert "target.slo.window_s" in str(refused.value)
    with pytest.raises(ConfigError, match="there is no model 'n' in this fleet; it has m"):
        changed_target(targets, "n", {"window_s": 50})
