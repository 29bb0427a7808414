"""The batch limit that a scheduler obeys, and what it says of itself."""

import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.scheduler_hook import SchedulerHook

MAX_BATCH = 16


@pytest.fixture
def block(tmp_path):
    return ControlBlock.create(tmp_path / "block")


@given(ordered=st.integers(1, 100), running=st.integers(0, MAX_BATCH))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_limit_is_the_ordered_one_within_one_and_the_start_value_and_never_below_what_runs(block, ordered, running):
    hook = SchedulerHook(block, MAX_BATCH)
    block.order_batch_limit(ordered)
    limit = hook.limit(running)
    assert 1 <= limit <= MAX_BATCH
    assert limit >= running
    assert limit == max(min(ordered, MAX_BATCH), running)
    assert block.scheduler().limit_in_force == min(ordered, MAX_BATCH)


def test_the_start_value_holds_until_something_is_ordered(block):
    assert SchedulerHook(block, MAX_BATCH).limit(0) == MAX_BATCH


def test_the_first_heartbeat_comes_with_the_scheduler_and_names_its_process(block):
    assert block.scheduler().heartbeat_ns == 0
    before_ns = time.monotonic_ns()
    SchedulerHook(block, MAX_BATCH)
    assert before_ns <= block.scheduler().heartbeat_ns <= time.monotonic_ns()
    assert block.engine().pid == os.getpid()
    assert block.scheduler().max_batch == MAX_BATCH


def test_what_a_step_left_is_published(block):
    hook = SchedulerHook(block, MAX_BATCH)
    hook.publish(running=3, waiting=5)
    assert (block.scheduler().running, block.scheduler().waiting) == (3, 5)
