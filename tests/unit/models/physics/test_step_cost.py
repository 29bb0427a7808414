"""How long a step takes and what it draws, with and without a cap."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.models.physics.constants import constants_for
from pals_ray.models.physics.step_cost import (
    LEAST_DUTY,
    GroupPhysics,
    StepWork,
    distinct_expert_share,
    mean_prefill_context,
)
from pals_ray.models.specs import GPUS, MODELS, Parallelism, find_gpu, find_model

LLAMA_ON_H100 = GroupPhysics(find_gpu("H100"), find_model("Llama-3.1-8B"), Parallelism())
DECODE = StepWork(decode_seqs=64, kv_tokens=64 * 600)
PREFILL = StepWork(prefill_tokens=8192, prefill_context_tokens=512)

works = st.builds(
    StepWork,
    prefill_tokens=st.floats(0, 8192),
    prefill_context_tokens=st.floats(1, 8192),
    decode_seqs=st.floats(1, 512),
    kv_tokens=st.floats(1, 512 * 4096),
)
groups = st.builds(
    lambda gpu, model, tensor: GroupPhysics(GPUS[gpu], MODELS[model], Parallelism(tensor)),
    st.sampled_from(sorted(GPUS)),
    st.sampled_from(sorted(MODELS)),
    st.sampled_from([1, 2, 8]),
)


@given(groups, works, st.floats(60, 1000), st.floats(1.01, 2.0))
def test_a_higher_cap_never_slows_a_step_and_never_lowers_its_draw(group, work, cap_w, factor):
    low, high = group.step(work, cap_w), group.step(work, cap_w * factor)
    assert high.duration_s <= low.duration_s * (1 + 1e-9)
    assert high.power_w >= low.power_w * (1 - 1e-3)


@given(groups, works, st.floats(60, 1000))
def test_a_draw_is_under_its_cap_unless_the_clock_floor_holds_it_there_and_that_is_flagged(group, work, cap_w):
    step = group.step(work, cap_w)
    if step.power_w > cap_w:
        assert not step.honours_cap
        duty = LEAST_DUTY if group.gpu.pulses_clock else 1.0
        idle_w = group.gpu.idle_context_w
        floor_w = group.locked_step(work, group.clock_floor)[1]
        assert step.clock == pytest.approx(duty * group.clock_floor)
        assert step.power_w == pytest.approx(idle_w + duty * (floor_w - idle_w))
    else:
        assert step.honours_cap


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([1, 2, 4, 8]), works)
def test_a_part_that_pulses_its_clock_keeps_its_lowest_cap_at_any_load_and_is_slow_there(model, tensor, work):
    group = GroupPhysics(find_gpu("A100"), MODELS[model], Parallelism(tensor))
    low, middle = (group.step(work, cap_w, die=1.03) for cap_w in (100.0, 150.0))
    assert low.honours_cap
    assert low.power_w <= 100.0
    assert low.duration_s >= middle.duration_s
    if low.clock < group.clock_floor:
        assert low.power_w == pytest.approx(100.0 * (1.0 - group.constants.cap_margin))


def test_a_clock_that_falls_to_the_voltage_floor_saves_no_energy_per_cycle_from_there_on():
    at = find_gpu("A100")
    constants = replace(constants_for(at.name), active_power=0.0, dram_power=0.0, voltage_floor=0.4)
    group = GroupPhysics(at, find_model("Llama-3.1-8B"), Parallelism(), constants)
    draws_w = [group.locked_step(PREFILL, clock)[1] - at.idle_context_w for clock in (0.2, 0.4)]
    assert draws_w[1] / draws_w[0] == pytest.approx(2.0, rel=0.05)


def test_latency_that_follows_the_clock_slows_a_small_step_and_costs_nothing_at_the_highest_clock():
    def times_s(share):
        constants = replace(constants_for("A100-SXM"), latency_clock_share=share)
        group = GroupPhysics(find_gpu("A100"), find_model("OLMoE-1B-7B"), Parallelism(4), constants)
        return [group.locked_step(StepWork(decode_seqs=1, kv_tokens=300), clock)[0] for clock in (1.0, 0.5)]

    (host, host_slow), (chip, chip_slow) = times_s(0.0), times_s(1.0)
    assert chip == pytest.approx(host)
    assert host_slow < 1.1 * host
    assert chip_slow > 1.5 * chip


@given(groups, works, st.floats(60, 1000))
def test_one_step_and_a_sweep_say_the_same(group, work, cap_w):
    one = group.step(work, cap_w)
    many = group.sweep(
        [cap_w, 2000.0], work.decode_seqs, work.kv_tokens, work.prefill_tokens, work.prefill_context_tokens
    )
    assert many.duration_s[0] == pytest.approx(one.duration_s, rel=1e-6)
    assert many.power_w[0] == pytest.approx(one.power_w, rel=1e-6)
    assert many.natural_w[1] == pytest.approx(group.natural_draw_w(work), rel=1e-9)


def test_a_binding_cap_is_undershot_by_two_to_three_percent():
    step = LLAMA_ON_H100.step(DECODE, 400)
    assert step.binding
    assert 0.97 * 400 <= step.power_w <= 0.98 * 400


def test_a_cap_above_the_natural_draw_changes_nothing():
    natural_w = LLAMA_ON_H100.natural_draw_w(DECODE)
    step = LLAMA_ON_H100.step(DECODE, natural_w * 1.1)
    assert not step.binding
    assert step.power_w == pytest.approx(natural_w)


def test_decode_is_flat_in_the_cap_and_then_falls_off_a_cliff_while_prefill_bends_at_once():
    natural_w = LLAMA_ON_H100.natural_draw_w(DECODE)

    def speed(work, cap_w):
        return LLAMA_ON_H100.locked_step(work, 1.0)[0] / LLAMA_ON_H100.step(work, cap_w).duration_s

    assert speed(DECODE, 0.7 * natural_w) > 0.93
    assert speed(DECODE, 210) < 0.6
    assert speed(PREFILL, 0.7 * LLAMA_ON_H100.natural_draw_w(PREFILL)) < 0.87


def test_the_slowest_gpu_sets_the_groups_step_and_the_others_draw_less():
    group = GroupPhysics(find_gpu("A100"), find_model("Mixtral-8x7B"), Parallelism(2))
    step = group.group_step(DECODE, (150.0, 250.0), (1.0, 1.0))
    alone = group.step(DECODE, 250.0)
    assert step.duration_s == group.step(DECODE, 150.0).duration_s > alone.duration_s
    assert step.power_w[1] < alone.power_w


def test_a_group_with_a_cap_missing_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        LLAMA_ON_H100.group_step(DECODE, (300.0,), (1.0, 1.0))


@given(st.floats(1, 4096), st.sampled_from([(8, 2), (128, 8), (256, 8), (16, 1)]))
def test_experts_touched_lie_between_one_tokens_and_all(tokens, mixture):
    experts, active = mixture
    share = distinct_expert_share(tokens, experts, active)
    assert active / experts * (1 - 1e-9) <= share <= 1.0


def test_a_larger_batch_reads_more_of_a_mixtures_weights_but_not_of_a_dense_models():
    moe = GroupPhysics(find_gpu("H100"), find_model("Qwen3-30B-A3B"), Parallelism())
    growth = {
        name: group.step(StepWork(decode_seqs=32), 700).duration_s / group.step(StepWork(decode_seqs=1), 700).duration_s
        for name, group in (("moe", moe), ("dense", LLAMA_ON_H100))
    }
    assert growth["moe"] > 1.5 > growth["dense"]


def test_more_ranks_make_a_step_faster_but_not_in_proportion():
    model, gpu = find_model("Llama-3.1-70B"), find_gpu("H100")
    times = [GroupPhysics(gpu, model, Parallelism(n)).step(DECODE, 700).duration_s for n in (2, 4, 8)]
    assert times[0] > times[1] > times[2] > times[0] / 4


def test_mean_context_of_chunks_counts_what_was_computed_before():
    assert mean_prefill_context([(100, 0)]) == 50
    assert mean_prefill_context([(100, 0), (100, 400)]) == (50 + 450) / 2
    assert mean_prefill_context([]) == 0


def test_sweeps_broadcast_their_arguments():
    grid = LLAMA_ON_H100.sweep(np.array([[300.0], [700.0]]), np.array([1.0, 8.0, 64.0]))
    assert grid.duration_s.shape == (2, 3)
