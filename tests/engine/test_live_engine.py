"""A running engine obeys a limit that changes, loses no request over it, and says truly what it does."""

import time

import pytest

from pals_ray.engine.hook_checks import engine_hooks_missing
from pals_ray.types import LATENCY_EDGES_S, Verdicts

from .harness import wait_until

FAR_S, NEAR_S = 100.0, 1e-6


def test_scheduler_and_stat_logger_have_both_reported(dense_engine):
    assert engine_hooks_missing(dense_engine.block) is None
    assert dense_engine.block.scheduler().max_batch == 16


def test_a_lowered_limit_drains_the_batch_keeps_what_waits_and_lets_it_rise_again(dense_engine):
    block = dense_engine.block
    block.order_batch_limit(16)
    # Of different lengths, so that they finish one after another.
    requests = [dense_engine.generate(max_tokens=200 + 30 * i) for i in range(24)]
    wait_until(lambda: block.scheduler().running == 16, 10, "16 running")
    wait_until(lambda: block.telemetry().running == 16, 10, "16 running, says the logger too")

    block.order_batch_limit(4)
    wait_until(lambda: block.scheduler().limit_in_force == 4, 5, "the limit in force")
    wait_until(lambda: block.scheduler().running == 4, 30, "the batch drained to 4")
    held = block.scheduler()
    assert held.waiting > 0
    wait_until(lambda: block.telemetry().requests_finished > 0 and block.scheduler().waiting < held.waiting, 30, "flow")
    assert block.scheduler().running <= 4

    block.order_batch_limit(16)
    wait_until(lambda: block.scheduler().running > 4, 5, "the batch rose again")
    outputs = [request.result(60) for request in requests]
    assert [len(output.token_ids) for output in outputs] == [200 + 30 * i for i in range(24)]
    assert {output.finish_reason for output in outputs} == {"length"}


def test_what_the_logger_counts_is_what_was_generated(dense_engine):
    block = dense_engine.block
    wait_until(lambda: block.scheduler().running == block.telemetry().running == 0, 10, "an idle engine")
    before, started_s = block.telemetry(), time.monotonic()
    outputs = [request.result(60) for request in [dense_engine.generate(50, "x" * 30) for _ in range(6)]]
    took_s = time.monotonic() - started_s
    wait_until(lambda: block.telemetry().running == 0, 10, "an idle engine")
    after = block.telemetry()

    assert sum(len(output.token_ids) for output in outputs) == 300
    assert after.generation_tokens - before.generation_tokens == 300
    assert after.prompt_tokens - before.prompt_tokens == 6 * 30
    assert after.requests_finished - before.requests_finished == 6
    assert after.waiting == 0
    first = [a - b for a, b in zip(after.ttft_counts, before.ttft_counts, strict=True)]
    between = [a - b for a, b in zip(after.itl_counts, before.itl_counts, strict=True)]
    assert (sum(first), sum(between)) == (6, 300 - 6)
    # All that a request waited lies between its start and its end: the histogram's lower edges can't sum to more.
    lower_edges_s = (0.0, *LATENCY_EDGES_S)
    assert 0 < sum(n * s for n, s in zip(between, lower_edges_s, strict=True)) < 6 * took_s
    assert sum(n * s for n, s in zip(first, lower_edges_s, strict=True)) < 6 * took_s


@pytest.fixture
def judged(dense_engine):
    """What the engine has judged since the test began. Its limits are far away at first."""
    block = dense_engine.block
    block.order_batch_limit(16)
    block.order_latency_limits(FAR_S, FAR_S)
    wait_until(lambda: block.scheduler().running == 0, 10, "an idle engine")
    before = block.telemetry().verdicts
    yield lambda: block.telemetry().verdicts - before
    block.order_batch_limit(16)


def test_answers_within_their_limits_are_good_those_of_one_token_and_stopped_by_text_too(dense_engine, judged):
    arrived = dense_engine.block.telemetry().arrived
    tpots = sum(dense_engine.block.telemetry().tpot_counts)
    requests = [dense_engine.generate(20) for _ in range(20)] + [dense_engine.generate(1) for _ in range(2)]
    for request in requests:
        request.result(60)
    assert judged() == Verdicts(good=22, good_tokens=402)
    stopped = dense_engine.generate(500, stop=[chr(code) for code in range(128)]).result(60)
    assert stopped.finish_reason == "stop"
    wait_until(lambda: judged().judged == 23, 5, "its end")
    assert judged().good == 23
    assert dense_engine.block.telemetry().arrived == arrived + 23
    assert sum(dense_engine.block.telemetry().tpot_counts) in (tpots + 20, tpots + 21)


def test_a_request_is_late_while_it_still_waits_by_a_limit_that_changes_meanwhile(dense_engine, judged):
    block = dense_engine.block
    block.order_batch_limit(1)
    first = dense_engine.generate(900)
    wait_until(lambda: block.scheduler().running == 1, 10, "one running")
    second = dense_engine.generate(5)
    wait_until(lambda: block.scheduler().waiting == 1, 10, "one waiting")
    assert judged() == Verdicts()
    block.order_latency_limits(0.05, FAR_S)
    wait_until(lambda: judged() == Verdicts(late_ttft=1), 2, "late")
    assert block.scheduler().waiting == 1
    assert not second.done()
    first.result(60)
    second.result(60)
    assert judged() == Verdicts(good=1, late_ttft=1, good_tokens=900)


def test_a_slow_answer_is_late_by_tpot_when_it_ends(dense_engine, judged):
    dense_engine.block.order_latency_limits(FAR_S, NEAR_S)
    dense_engine.generate(10).result(60)
    assert judged() == Verdicts(late_tpot=1)


def test_a_client_that_goes_is_judged_only_where_a_limit_was_broken(dense_engine, judged):
    block = dense_engine.block
    for limit_s, verdicts in ((FAR_S, Verdicts()), (NEAR_S, Verdicts(late_tpot=1))):
        block.order_latency_limits(FAR_S, limit_s)
        generated = block.telemetry().generation_tokens
        gone = dense_engine.generate(900)
        wait_until(lambda was=generated: block.telemetry().generation_tokens > was + 16, 10, "tokens")
        gone.cancel()
        wait_until(lambda: block.scheduler().running == 0, 10, "the abort")
        assert judged() == verdicts


def test_kv_use_and_waiting_requests_are_shown_while_they_last(dense_engine):
    block = dense_engine.block
    requests = [dense_engine.generate(200) for _ in range(20)]
    wait_until(lambda: block.telemetry().running == 16 and block.telemetry().waiting == 4, 10, "16 running, 4 waiting")
    wait_until(lambda: 0 < block.telemetry().kv_use < 1, 10, "KV cache in use")
    for request in requests:
        request.result(60)
    wait_until(lambda: block.telemetry().kv_use == 0, 10, "the KV cache freed")


def test_any_output_of_random_weights_is_valid_text_and_is_not_cut_short(dense_engine):
    output = dense_engine.generate(400, "naïve café ☕").result(60)
    assert len(output.token_ids) == 400
    assert output.text.encode().decode() == output.text
    assert len(output.text) > 100


def test_a_rank_without_a_gpu_is_an_error_not_an_invented_uuid(dense_engine):
    with pytest.raises(Exception, match="no GPU"):
        dense_engine.call_ranks("pals_gpu_uuid")
