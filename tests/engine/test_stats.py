"""The stat logger, as vLLM loads and calls it."""

from bisect import bisect_left

import pytest
from vllm.plugins import STAT_LOGGER_PLUGINS_GROUP, load_plugins_by_group
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock
from pals_ray.engine.stat_logger import PowerStatLogger
from pals_ray.types import LATENCY_EDGES_S


@pytest.fixture
def block(tmp_path, monkeypatch):
    block = ControlBlock.create(tmp_path / "block")
    monkeypatch.setenv(BLOCK_VARIABLE, str(block.path))
    return block


def test_vllm_finds_it_through_the_installed_package(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert load_plugins_by_group(STAT_LOGGER_PLUGINS_GROUP)["pals_ray"] is PowerStatLogger


def test_it_does_nothing_in_an_engine_that_is_not_ours(monkeypatch):
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    logger = PowerStatLogger(None)
    logger.log_engine_initialized()
    logger.record(SchedulerStats(num_running_reqs=1), IterationStats())


def test_it_reports_as_soon_as_the_engine_is_up(block):
    logger = PowerStatLogger(None)
    assert block.logger_heartbeat_ns() == 0
    logger.log_engine_initialized()
    assert block.logger_heartbeat_ns() > 0


def test_counters_add_up_and_gauges_replace(block):
    logger = PowerStatLogger(None)
    for running in (3, 2):
        iteration = IterationStats()
        iteration.num_generation_tokens = 5
        iteration.prompt_token_stats.total = 7
        iteration.num_preempted_reqs = 1
        iteration.finished_requests = [
            FinishedRequestStats(FinishReason.STOP, num_generation_tokens=1),
            FinishedRequestStats(FinishReason.LENGTH, num_generation_tokens=9, mean_time_per_output_token=0.025),
        ]
        iteration.time_to_first_tokens_iter = [0.5]
        iteration.inter_token_latencies_iter = [0.02, 0.03]
        logger.record(
            SchedulerStats(
                num_running_reqs=running, num_waiting_reqs=4, num_skipped_waiting_reqs=1, kv_cache_usage=0.5
            ),
            iteration,
        )
    telemetry = block.telemetry()
    assert (telemetry.running, telemetry.waiting, telemetry.kv_use) == (2, 5, 0.5)
    assert (telemetry.generation_tokens, telemetry.prompt_tokens) == (10, 14)
    assert (telemetry.preemptions, telemetry.requests_finished) == (2, 4)
    assert (sum(telemetry.ttft_counts), sum(telemetry.itl_counts)) == (2, 4)
    # One token has no time per output token.
    assert sum(telemetry.tpot_counts) == telemetry.tpot_counts[bisect_left(LATENCY_EDGES_S, 0.025)] == 2


def test_a_record_of_either_half_alone_is_taken(block):
    logger = PowerStatLogger(None)
    logger.record(SchedulerStats(num_running_reqs=3), None)
    logger.record(None, IterationStats())
    assert block.telemetry().running == 3
