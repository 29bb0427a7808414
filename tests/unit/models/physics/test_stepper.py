"""The hot loop's physics against the physics."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.models.grid import GridModel
from pals_ray.models.physics.die_spread import die_factor
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.physics.stepper import GroupStepper
from pals_ray.models.specs import GPUS, Parallelism, find_gpu, find_model

GROUPS = [
    (GroupPhysics(GPUS[gpu], find_model(model), Parallelism(tensor, expert)), [die_factor(i) for i in range(tensor)])
    for gpu in GPUS
    for model, tensor, expert in (("Llama-3.1-8B", 1, 1), ("Llama-3.1-70B", 4, 1), ("Qwen3-30B-A3B", 2, 2))
]
STEPPERS = [GroupStepper(physics, dies) for physics, dies in GROUPS]


@settings(max_examples=300)
@given(
    st.integers(0, len(GROUPS) - 1),
    st.integers(0, 8192),
    st.integers(0, 256),
    st.integers(1, 6000),
    st.floats(0.0, 1.0),
)
def test_a_step_takes_as_long_and_draws_as_much_as_the_group_physics_says(which, prefill, seqs, context, share):
    (physics, dies), stepper = GROUPS[which], STEPPERS[which]
    seqs = max(seqs, int(prefill == 0))
    cap_w = physics.gpu.min_limit_w + share * (physics.gpu.max_limit_w - physics.gpu.min_limit_w)
    work = StepWork(prefill, prefill / 2, seqs, seqs * context)
    said = physics.group_step(work, [cap_w] * len(dies), dies)
    duration_s, power_w, binding = stepper.step(prefill, prefill / 2, seqs, seqs * context, cap_w)
    # Between two dies of which one is held and the other not, their mean stands for both.
    assert duration_s == pytest.approx(said.duration_s, rel=1.5e-3)
    assert power_w == pytest.approx(sum(said.power_w), rel=5e-3)
    assert binding == pytest.approx(sum(rank.binding for rank in said.ranks) / len(dies), abs=0.75)


def test_a_grid_answers_as_the_model_at_every_batch_and_near_every_cap():
    physics = GroupPhysics(find_gpu("A100-SXM"), find_model("Llama-3.1-8B"), Parallelism())
    model = RooflineModel(physics)
    grid = GridModel(model, 100.0, 400.0, 64)
    for cap_w in (100.0, 131.3, 250.0, 399.2, 400.0):
        for batch in (1, 7, 64):
            said, found = model.predict(cap_w, batch), grid.predict(cap_w, batch)
            crossed = grid.predict([[cap_w]], [[float(batch)]])
            for name in ("throughput_tokens_per_s", "power_w", "itl_p99_s", "ttft_p99_s"):
                assert float(getattr(found, name)) == pytest.approx(float(getattr(said, name)), rel=5e-3)
                assert getattr(crossed, name).shape == (1, 1)
                assert float(getattr(crossed, name)[0, 0]) == float(getattr(found, name))
