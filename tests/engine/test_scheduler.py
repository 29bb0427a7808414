"""vLLM's own scheduler class under our limit, two `schedule()` calls in flight as on GPUs (the CPU never has two)."""

import time

import pytest
import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pals_ray.engine.control_block import BLOCK_VARIABLE, BlockError, ControlBlock
from pals_ray.engine.scheduler import PowerAwareScheduler
from pals_ray.engine.virtual.tiny_models import make_tiny_model
from pals_ray.types import Verdicts

MAX_BATCH = 8
BLOCK_TOKENS = 16
FAR_S, NEAR_S = 100.0, 1e-9


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    model = make_tiny_model("tiny-dense", tmp_path_factory.mktemp("models"))
    config = VllmConfig(
        model_config=ModelConfig(model=str(model), dtype="float32", max_model_len=256),
        cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=False),
        scheduler_config=SchedulerConfig(
            max_num_seqs=MAX_BATCH,
            max_num_batched_tokens=512,
            max_model_len=256,
            is_encoder_decoder=False,
        ),
        device_config=DeviceConfig("cpu"),
    )
    config.scheduler_config.async_scheduling = True  # vLLM turns it off on a CPU
    config.cache_config.num_gpu_blocks = 1000
    return config


@pytest.fixture
def block(tmp_path, monkeypatch):
    block = ControlBlock.create(tmp_path / "block")
    monkeypatch.setenv(BLOCK_VARIABLE, str(block.path))
    return block


def make_scheduler(vllm_config, scheduler_class=PowerAwareScheduler):
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=1000, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=BLOCK_TOKENS,
        log_stats=True,
    )


@pytest.fixture
def scheduler(vllm_config, block):
    return make_scheduler(vllm_config)


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def judging(request, vllm_config, block, monkeypatch):
    """A scheduler of either kind that judges by limits that tests keep far away, or break."""
    monkeypatch.setattr(vllm_config.scheduler_config, "async_scheduling", request.param)
    block.order_latency_limits(FAR_S, FAR_S)
    return make_scheduler(vllm_config)


def add_requests(scheduler, count, max_tokens=6, ago_s=0.0, resumable=False, **sampling):
    """Requests that came to the frontend `ago_s` ago."""
    init_none_hash(hash)
    hasher = get_request_block_hasher(BLOCK_TOKENS, hash)
    requests = []
    for i in range(count):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
        name, came_s = f"r{len(scheduler.requests)}-{i}", time.time() - ago_s
        tokens = [1, 2, 3, 4]
        requests.append(Request(name, tokens, params, None, 0, came_s, block_hasher=hasher, resumable=resumable))
        scheduler.add_request(requests[-1])
    return requests


def finish_step(scheduler, output):
    """Hand the step's sampled tokens back, as EngineCore does."""
    ids = list(output.num_scheduled_tokens)
    sampled = ModelRunnerOutput(
        req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=[[7] for _ in ids]
    )
    scheduler.update_from_output(output, sampled)


def run_to_the_end(scheduler):
    for _ in run_two_in_flight(scheduler):
        pass


def run_two_in_flight(scheduler, deadline_s=20.0):
    """Keep two scheduled steps in flight until nothing is left; yields what runs after each `schedule()`."""
    in_flight, until = [], time.monotonic() + deadline_s
    while scheduler.has_unfinished_requests() or in_flight:
        assert time.monotonic() < until, "requests are left"
        output = scheduler.schedule()
        if output.total_num_scheduled_tokens:
            in_flight.append(output)
        yield len(scheduler.running)
        if len(in_flight) == 2 or not output.total_num_scheduled_tokens:
            finish_step(scheduler, in_flight.pop(0))


def test_two_steps_in_flight_survive_a_limit_lowered_between_them(scheduler, block):
    add_requests(scheduler, 12)
    first = scheduler.schedule()
    block.order_batch_limit(2)
    second = scheduler.schedule()
    assert len(first.num_scheduled_tokens) == len(second.num_scheduled_tokens) == MAX_BATCH
    reading = block.scheduler()
    assert (reading.running, reading.waiting, reading.limit_in_force) == (MAX_BATCH, 4, 2)
    finish_step(scheduler, first)
    finish_step(scheduler, second)
    assert not [r for r in scheduler.requests.values() if r.status == RequestStatus.PREEMPTED]


def test_running_requests_drain_to_a_lower_limit_and_all_finish(scheduler, block):
    add_requests(scheduler, 20)
    running = []
    for count in run_two_in_flight(scheduler):
        running.append(count)
        if len(running) == 3:
            block.order_batch_limit(2)
    assert max(running[:3]) == MAX_BATCH
    first_drained = running.index(2)
    assert all(count <= 2 for count in running[first_drained:])
    assert not scheduler.requests


def test_a_raised_limit_admits_what_waits_but_never_above_the_start_value(scheduler, block):
    block.order_batch_limit(2)
    add_requests(scheduler, 20)
    running = []
    for count in run_two_in_flight(scheduler):
        running.append(count)
        if len(running) == 3:
            assert set(running) == {2}
            block.order_batch_limit(1000)
    assert max(running) == MAX_BATCH
    assert not scheduler.requests


@pytest.mark.parametrize("asynchronous", [True, False])
def test_it_is_over_the_scheduler_that_vllm_would_take(vllm_config, block, monkeypatch, asynchronous):
    monkeypatch.setattr(vllm_config.scheduler_config, "async_scheduling", asynchronous)
    ours, theirs = make_scheduler(vllm_config), vllm_config.scheduler_config.get_scheduler_cls()
    assert isinstance(ours, PowerAwareScheduler)
    assert isinstance(ours, theirs)
    assert isinstance(ours, AsyncScheduler) is asynchronous


def test_without_an_order_it_schedules_what_vllms_own_does(vllm_config, block):
    ours, theirs = make_scheduler(vllm_config), make_scheduler(vllm_config, AsyncScheduler)
    steps = []
    for scheduler in (ours, theirs):
        add_requests(scheduler, 20)
        steps.append(list(run_two_in_flight(scheduler)))
    assert steps[0] == steps[1]


def test_a_newer_vllms_admission_limit_is_used_where_there_is_one(vllm_config, block):
    class NewerScheduler(PowerAwareScheduler):
        """Has the attribute of vLLM 0.31 and later before our constructor looks."""

        max_num_active_reqs = MAX_BATCH

    scheduler = make_scheduler(vllm_config, NewerScheduler)
    block.order_batch_limit(3)
    scheduler.schedule()
    assert (scheduler.max_num_active_reqs, scheduler.max_num_running_reqs) == (3, MAX_BATCH)


def test_a_scheduler_without_a_block_says_what_is_missing(vllm_config, monkeypatch):
    monkeypatch.delenv(BLOCK_VARIABLE, raising=False)
    with pytest.raises(BlockError, match=BLOCK_VARIABLE):
        make_scheduler(vllm_config)


def test_the_limits_of_a_step_and_of_the_cache_are_published(scheduler, block):
    said = block.scheduler()
    assert (said.max_batch, said.step_tokens, said.kv_tokens) == (MAX_BATCH, 512, 1000 * BLOCK_TOKENS)


def test_requests_within_their_limits_are_good_with_every_token(judging, block):
    add_requests(judging, 12)
    assert block.telemetry().arrived == 12
    run_to_the_end(judging)
    assert block.telemetry().verdicts == Verdicts(good=12, good_tokens=72)


def test_what_still_waits_is_late_at_the_first_step_after_its_limit(judging, block):
    block.order_batch_limit(1)
    add_requests(judging, 1)
    add_requests(judging, 1, ago_s=FAR_S + 1)
    in_flight = judging.schedule()
    assert block.telemetry().verdicts == Verdicts()
    finish_step(judging, in_flight)
    assert block.scheduler().waiting == 1
    assert block.telemetry().verdicts == Verdicts(late_ttft=1)
    run_to_the_end(judging)
    assert block.telemetry().verdicts == Verdicts(good=1, late_ttft=1, good_tokens=6)


def test_slow_answers_are_late_by_tpot_and_those_of_one_token_are_not(judging, block):
    block.order_latency_limits(FAR_S, NEAR_S)
    add_requests(judging, 3)
    add_requests(judging, 2, max_tokens=1)
    run_to_the_end(judging)
    assert block.telemetry().verdicts == Verdicts(late_tpot=3, good=2, good_tokens=2)


def test_clients_that_go_are_judged_only_where_a_limit_was_broken(judging, block):
    waiting, running, late = (add_requests(judging, 1, ago_s=ago_s)[0] for ago_s in (0, 0, FAR_S - 0.2))
    finish_step(judging, judging.schedule())
    judging.finish_requests(waiting.request_id, RequestStatus.FINISHED_ABORTED)
    judging.finish_requests([running.request_id, "stranger"], RequestStatus.FINISHED_ABORTED)
    assert block.telemetry().verdicts == Verdicts()
    finish_step(judging, judging.schedule())
    block.order_latency_limits(FAR_S, NEAR_S)
    judging.finish_requests([late.request_id], RequestStatus.FINISHED_ABORTED)
    judging.finish_requests([late.request_id], RequestStatus.FINISHED_ABORTED)
    assert block.telemetry().verdicts == Verdicts(late_tpot=1)


def test_a_client_that_goes_while_its_step_runs_harms_nothing(judging, block):
    (gone,) = add_requests(judging, 1)
    in_flight = judging.schedule()
    judging.finish_requests([gone.request_id], RequestStatus.FINISHED_ABORTED)
    finish_step(judging, in_flight)
    run_to_the_end(judging)
    assert (block.telemetry().arrived, block.telemetry().verdicts) == (1, Verdicts())


def test_the_frontends_stop_string_is_an_end_and_no_abort(judging, block):
    (request,) = add_requests(judging, 1, stop=["x"], detokenize=True)
    finish_step(judging, judging.schedule())
    judging.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
    assert block.telemetry().verdicts == Verdicts(good=1, good_tokens=1)


def test_what_the_engine_gives_up_or_ends_as_it_stops_has_failed(judging, block):
    first, *_ = add_requests(judging, 3)
    finish_step(judging, judging.schedule())
    judging.finish_requests({first.request_id}, RequestStatus.FINISHED_ERROR)
    judging.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert block.telemetry().verdicts == Verdicts(late_failed=3)


def test_a_preempted_request_is_judged_from_its_first_token(judging, block):
    add_requests(judging, 2)
    finish_step(judging, judging.schedule())
    judging.reset_prefix_cache(reset_running_requests=True)
    block.order_latency_limits(NEAR_S, FAR_S)
    run_to_the_end(judging)
    assert block.telemetry().verdicts == Verdicts(good=2, good_tokens=12)


def test_a_session_that_gets_more_input_is_counted_once_and_not_judged(judging, block):
    session, *_ = add_requests(judging, 1, max_tokens=1, resumable=True)
    finish_step(judging, judging.schedule())
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    more = Request(session.request_id, [5, 6], SamplingParams(max_tokens=1, ignore_eos=True), None, resumable=True)
    judging.add_request(more)
    finish_step(judging, judging.schedule())
    judging.add_request(Request(session.request_id, [7], session.sampling_params, None))
    assert not judging.requests
    assert (block.telemetry().arrived, block.telemetry().verdicts) == (1, Verdicts())


def test_pooling_requests_are_judged_by_the_wait_for_their_result(judging, block):
    for name, ago_s in (("a", 0.0), ("b", FAR_S + 1)):
        pooling = PoolingParams(task="embed")
        judging.add_request(Request(name, [1, 2, 3], None, pooling, 0, time.time() - ago_s))
    output = judging.schedule()
    ids = list(output.num_scheduled_tokens)
    index = {name: i for i, name in enumerate(ids)}
    results = ModelRunnerOutput(req_ids=ids, req_id_to_index=index, pooler_output=[torch.zeros(4) for _ in ids])
    judging.update_from_output(output, results)
    assert block.telemetry().verdicts == Verdicts(good=1, late_ttft=1)
