"""The check after an engine's start names the hook that is missing, and why."""

import time
from importlib.metadata import EntryPoint

import pytest

from pals_ray.engine import hook_checks
from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.scheduler_hook import SchedulerHook

OURS = EntryPoint("pals_ray", "pals_ray.engine.stat_logger:PowerStatLogger", "vllm.stat_logger_plugins")


@pytest.fixture
def block(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(hook_checks, "entry_points", lambda group: [OURS])
    return ControlBlock.create(tmp_path / "block")


@pytest.fixture
def with_scheduler(block):
    SchedulerHook(block, 16)
    return block


def test_a_scheduler_that_never_wrote_is_named_first(block):
    assert "scheduler_cls='pals_ray.engine.scheduler.PowerAwareScheduler'" in hook_checks.engine_hooks_missing(block)


def test_sources_without_installed_metadata_are_named(with_scheduler, monkeypatch):
    monkeypatch.setattr(hook_checks, "entry_points", lambda group: [])
    assert "not installed as a package" in hook_checks.engine_hooks_missing(with_scheduler)


def test_a_plugin_list_without_our_name_is_named(with_scheduler, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "somebody,else")
    assert "VLLM_PLUGINS='somebody,else' leaves it out" in hook_checks.engine_hooks_missing(with_scheduler)


def test_a_plugin_that_is_there_and_allowed_failed(with_scheduler, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "else,pals_ray")
    assert "failed to load" in hook_checks.engine_hooks_missing(with_scheduler)


def test_nothing_is_missing_once_both_have_written(with_scheduler):
    with_scheduler.field("logger_heartbeat_ns")[0] = time.monotonic_ns()
    assert hook_checks.engine_hooks_missing(with_scheduler) is None


def test_this_installation_has_the_plugin():
    assert OURS.name in {point.name for point in hook_checks.entry_points(group=OURS.group)}
