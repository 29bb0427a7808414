"""The virtual A100 and RTX PRO 6000 against what was measured of serving under caps."""

from pathlib import Path

import numpy as np
import pytest

from pals_ray.bench.caps.report import left_out_errors, rtx_errors
from pals_ray.bench.caps.serving import A100_CELLS, a100_cells, v2_energy_errors
from pals_ray.bench.measured_data import load_mlenergy_v2, load_mmbt
from pals_ray.models.physics.constants import CONSTANTS
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.physics.stepper import GroupStepper
from pals_ray.models.specs import Parallelism, find_gpu, find_model

DATA = Path(__file__).parents[5] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the measured data is not at {DATA}")
#: The MoE models of PALS's sweep, and its caps and batches.
SWEPT = ("OLMoE-1B-7B", "Qwen1.5-MoE-A2.7B", "DeepSeek-MoE-16B", "Phi-3.5-MoE", "Mixtral-8x7B")
CAPS_W = np.arange(100.0, 401.0, 50.0)
BATCHES = np.array([1.0, 4.0, 8.0, 16.0, 32.0, 64.0])


def a100(model):
    return GroupPhysics(find_gpu("A100"), find_model(model), Parallelism(4))


def swept(model):
    """Tokens/s and W of a GPU, batch x cap, under HellaSwag's lengths."""
    said = RooflineModel(a100(model), Workload(190, 5)).predict(CAPS_W, BATCHES[:, None])
    return said.throughput_tokens_per_s, said.power_w / 4


@pytest.mark.parametrize("cells", A100_CELLS, ids=lambda cells: cells.model)
def test_the_a100_is_as_fast_and_draws_as_much_as_facts_says(cells):
    tokens, power_w = a100_cells(cells.model, CONSTANTS["A100-SXM"])
    off = np.abs(tokens[1, 1:5] / tokens[1, 5] - cells.relative_tokens)
    assert (off <= (0.05, 0.03, 0.03, 0.03)).all()
    assert power_w[:, 5] == pytest.approx([cells.single_w, cells.natural_w], rel=0.08)


@pytest.mark.parametrize("cells", A100_CELLS, ids=lambda cells: cells.model)
def test_prompts_that_are_drained_before_the_next_are_slowed_as_a_steady_mix_is(cells):
    """PALS's closed loop: all prompts of a batch in chunks of 8,192 tokens, then four decode steps."""
    physics = a100(cells.model)
    caps_w = np.array([150.0, 200.0, 250.0, 300.0, 400.0])
    prefill = physics.sweep(caps_w, 32.0, 0.0, 64 * 190 / 2, 95.0).duration_s
    decode = physics.sweep(caps_w, 64.0, 64 * 192.5).duration_s
    speed = 1.0 / (2 * prefill + 4 * decode)
    assert (np.abs(speed[:4] / speed[4] - cells.relative_tokens) <= (0.05, 0.03, 0.03, 0.03)).all()


@pytest.mark.parametrize("model", SWEPT)
def test_an_a100_keeps_100_w_at_any_batch_and_collapses_there(model):
    tokens, power_w = swept(model)
    assert ((power_w[:, 0] >= 98.0) & (power_w[:, 0] <= 100.0)).all()
    collapse = tokens[:, 0] / tokens[:, 1]
    assert ((collapse >= 0.2) & (collapse <= 0.5)).all()
    stepper = GroupStepper(a100(model), [1.03, 0.97, 1.0, 1.01])
    for batch in BATCHES:
        assert stepper.step(0.0, 0.0, batch, 200.0 * batch, 100.0)[1] <= 400.0


@pytest.mark.parametrize("model", SWEPT)
def test_a_binding_cap_is_drawn_to_99_to_100_percent_and_tokens_never_fall_with_batch(model):
    tokens, power_w = swept(model)
    natural_w = power_w[:, -1:]
    held = (natural_w > 1.2 * CAPS_W) & (CAPS_W < 400.0)
    drawn = (power_w / CAPS_W)[held]
    assert ((drawn >= 0.97) & (drawn <= 1.0)).all()
    assert (drawn[drawn.argsort()[len(drawn) // 10 :]] >= 0.99).all()
    assert (np.diff(tokens, axis=0) > 0).all()


def test_the_best_cap_of_the_sweep_saves_about_as_much_as_in_facts():
    """FACTS: mean of the five models +18.3 % tokens/J at the node (1.05 x GPU + 345 W), +32.2 % at the GPUs."""
    node, gpu = [], []
    for model in SWEPT:
        tokens, power_w = (values[-1] for values in swept(model))
        per_j = tokens / (1.05 * 4 * power_w + 345.0)
        node.append(per_j.max() / per_j[-1])
        gpu.append((tokens / power_w).max() / (tokens[-1] / power_w[-1]))
    assert np.mean(node) == pytest.approx(1.183, abs=0.03)
    assert np.mean(gpu) == pytest.approx(1.322, abs=0.04)


@needs_data
def test_a_step_of_the_a100_takes_about_the_energy_that_the_leaderboard_measured():
    v2 = load_mlenergy_v2(DATA / "mlenergy_v2_a100" / "llm_text_generation.csv")
    errors = np.concatenate(list(v2_energy_errors(v2, CONSTANTS["A100-SXM"]).values()))
    assert np.median(np.abs(errors)) < 0.2


@needs_data
def test_a_cap_slows_vllm_and_its_clock_as_measured_on_an_rtx_pro_6000():
    sweep = load_mmbt(DATA / "mmbt_rtx_pro_6000" / "sweep.csv")
    for errors in rtx_errors(sweep, CONSTANTS["RTX PRO 6000"]).values():
        tokens, power, clock = np.abs(errors)
        assert tokens.max() <= 0.05
        assert power.max() <= 0.06
        assert clock.max() <= 0.06


@needs_data
def test_three_caps_predict_the_others_on_an_rtx_pro_6000():
    tokens, power, clock = left_out_errors(load_mmbt(DATA / "mmbt_rtx_pro_6000" / "sweep.csv"))
    assert tokens.mean() <= 0.03
    assert power.mean() <= 0.03
    assert clock.mean() <= 0.05
