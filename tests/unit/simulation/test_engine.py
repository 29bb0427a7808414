"""One engine: what its scheduler does, step by step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.models.physics.step_cost import StepWork
from pals_ray.models.physics.stepper import GroupStepper
from pals_ray.simulation.engine.energy_meter import Meter
from pals_ray.simulation.engine.request_log import ModelLog
from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint

from .worlds import served


def make_engine(prompts, outputs, arrivals=None, *, max_batch=64, kv_tokens=100_000, step_tokens=8192, cap_w=400.0):
    """An engine, its log, and its physics."""
    n = len(prompts)
    arrival_s = np.zeros(n) if arrivals is None else np.array(arrivals, dtype=float)
    log = ModelLog(Trace(arrival_s, np.array(prompts), np.array(outputs), float(arrival_s[-1])))
    point = OperatingPoint(cap_w, max_batch)
    model = served(max_batch=max_batch, step_tokens=step_tokens, kv_tokens=kv_tokens, fixed=point)
    stepper = GroupStepper(model.physics, [1.0])
    engine = Engine(log, stepper, Meter(10_000.0), model, number=0, node_factor=1.0, time_scale=1.0)
    return engine, log, model.physics


def submit(engine, log, count=None):
    for request in range(len(log.arrival_s) if count is None else count):
        engine.submit(request, log.arrival_s[request])


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget():
    engine, log, physics = make_engine([5000], [2], step_tokens=2048)
    submit(engine, log)
    engine.advance(1000.0)
    chunks = [(2048, 1024.0), (2048, 2048 + 1024.0), (904, 4096 + 452.0)]
    first_s = sum(physics.step(StepWork(n, context), 400.0).duration_s for n, context in chunks)
    decode_s = physics.step(StepWork(decode_seqs=1, kv_tokens=5001), 400.0).duration_s
    assert log.first_token_s[0] == pytest.approx(first_s, rel=1e-3)
    assert log.finish_s[0] - log.first_token_s[0] == pytest.approx(decode_s, rel=1e-3)


def test_decodes_go_on_in_the_steps_that_compute_a_prompt():
    engine, log, physics = make_engine([100, 4000], [50, 1], [0.0, 0.1])
    submit(engine, log)
    engine.advance(0.1)
    before = engine.generated
    engine.advance(log.arrival_s[1] + 0.02)
    engine.advance(1000.0)
    assert before > 0
    gap_s = physics.step(StepWork(4000, 2000.0, 1, 110), 400.0).duration_s
    assert log.first_token_s[1] - 0.1 < gap_s + 0.02
    assert sum(engine.itl_counts) == 49
    longest = max(i for i, count in enumerate(engine.itl_counts) if count)
    assert 1e-3 * 1.05**longest == pytest.approx(gap_s, rel=0.06)


def test_a_lowered_limit_drains_and_preempts_nobody():
    engine, log, _ = make_engine([64] * 40, [100 + 10 * i for i in range(40)], max_batch=32)
    submit(engine, log)
    engine.advance(0.5)
    assert (engine.running, engine.queued) == (32, 8)
    engine.order_batch_limit(4, 0.5)
    seen = []
    for now_s in np.arange(0.5, 6.0, 0.01).tolist():
        engine.advance(now_s)
        seen.append(engine.running)
    assert engine.preemptions == 0
    drained = next(i for i, running in enumerate(seen) if running <= 4)
    assert all(a >= b for a, b in pairwise(seen[: drained + 1]))
    assert max(seen[drained:]) == 4
    engine.order_batch_limit(64, 6.0)
    assert engine.batch_limit == 32


def test_a_full_cache_preempts_the_last_one_let_in_and_all_finish():
    engine, log, _ = make_engine([300] * 6, [400] * 6, kv_tokens=2500)
    submit(engine, log)
    engine.advance(1000.0)
    assert engine.preemptions > 0
    assert engine.finished == 6
    assert engine.outstanding == 0
    assert engine.kv_use == 0.0
    assert engine.generated == 6 * 400
    # First come, first served: the one that came first is never the one to give way.
    assert log.finish_s[0] == min(log.finish_s)


def test_a_prompt_waits_until_the_cache_can_hold_all_of_it():
    engine, log, _ = make_engine([600, 600], [50, 50], kv_tokens=1000)
    submit(engine, log)
    engine.advance(0.2)
    assert (engine.running, engine.queued) == (1, 1)
    engine.advance(1000.0)
    assert log.first_token_s[1] > log.finish_s[0]
    assert engine.preemptions == 0


def test_a_cut_slows_the_step_under_way_within_its_settling():
    engine, log, physics = make_engine([8000], [1])
    submit(engine, log)
    full_s = physics.step(StepWork(8000, 4000.0), 400.0).duration_s
    low = physics.step(StepWork(8000, 4000.0), 120.0)
    cut_s = full_s / 2
    engine.advance(cut_s)
    engine.order_cap(120.0, cut_s)
    engine.read(cut_s + 0.05)
    assert engine.power_w == pytest.approx(low.power_w, rel=1e-3)
    engine.advance(1000.0)
    # The cut settles within 40 ms, in which the step may go on at up to full speed.
    expected_s, head_start_s = cut_s + 0.5 * low.duration_s, 0.04 * (low.duration_s / full_s - 1.0)
    assert expected_s - head_start_s <= log.first_token_s[0] <= 1.001 * expected_s


def test_a_load_step_overshoots_a_binding_cap_for_a_moment():
    engine, log, physics = make_engine([8000], [1], cap_w=150.0)
    submit(engine, log)
    engine.advance(0.01)
    assert engine.power_w > 300.0
    engine.advance(0.06)
    assert engine.power_w <= 150.0
    assert engine.power_w == pytest.approx(physics.step(StepWork(8000, 4000.0), 150.0).power_w, rel=1e-3)


def test_an_idle_engine_draws_its_idle_watts():
    engine, _, physics = make_engine([1], [1])
    engine.read(10.0)
    assert engine.energy_j == pytest.approx(10.0 * physics.gpu.idle_context_w)


@settings(max_examples=60)
@given(st.data())
def test_whatever_comes_nothing_is_lost_and_the_counters_agree(data):
    n = data.draw(st.integers(1, 30))
    prompts = data.draw(st.lists(st.integers(1, 3000), min_size=n, max_size=n))
    outputs = data.draw(st.lists(st.integers(1, 300), min_size=n, max_size=n))
    gaps = data.draw(st.lists(st.floats(0.0, 0.5), min_size=n, max_size=n))
    engine, log, _ = make_engine(prompts, outputs, np.cumsum(gaps), max_batch=8, kv_tokens=3600, step_tokens=1024)
    orders = st.tuples(st.sampled_from(["cap", "limit", "read"]), st.floats(100.0, 400.0), st.integers(1, 64))
    for request in range(n):
        now_s = log.arrival_s[request]
        engine.submit(request, now_s)
        what, cap_w, limit = data.draw(orders)
        if what == "cap":
            engine.order_cap(cap_w, now_s)
        elif what == "limit":
            engine.order_batch_limit(limit, now_s)
        else:
            engine.read(now_s)
        assert engine.finished + engine.outstanding == request + 1
        assert 0.0 <= engine.kv_use <= 1.0
    engine.read(log.arrival_s[n - 1] + 5000.0)
    assert engine.finished == n
    assert engine.generated == sum(outputs)
    assert engine.prompted == sum(prompts)
    assert list(log.tokens) == outputs
    assert sum(engine.itl_counts) == sum(outputs) - n
    assert engine.kv_use == 0.0
    assert all(a <= f <= e for a, f, e in zip(log.arrival_s, log.first_token_s, log.finish_s, strict=True))
