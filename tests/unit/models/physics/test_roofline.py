"""What is expected of a replica that nobody measured."""

import numpy as np
import pytest

from pals_ray.models.physics.constants import CONSTANTS, provenance_of
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import GPUS, MODELS, Parallelism, find_gpu, find_model


def prior(model="Llama-3.1-8B", gpu="H100", parallelism=None, **more):
    return RooflineModel(GroupPhysics(find_gpu(gpu), find_model(model), parallelism or Parallelism()), **more)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_every_model_on_every_gpu_has_a_sane_surface(model, gpu):
    spec = GPUS[gpu]
    caps = np.linspace(spec.min_limit_w, spec.max_limit_w, 9)[:, None]
    batches = np.array([1, 8, 64, 256])
    said = prior(model, gpu, Parallelism(4)).predict(caps, batches)
    assert said.power_w.shape == (9, 4)
    assert (np.diff(said.throughput_tokens_per_s, axis=0) >= -1e-9 * said.throughput_tokens_per_s[1:]).all()
    assert (np.diff(said.throughput_tokens_per_s, axis=1) > 0).all()
    assert (said.power_w > 4 * spec.idle_context_w).all()
    assert (said.power_w[said.honours_cap] <= 4 * np.broadcast_to(caps, (9, 4))[said.honours_cap] * 1.001).all()
    assert (said.itl_p99_s >= said.itl_p50_s).all()
    assert (said.ttft_p99_s >= said.ttft_p50_s).all()
    assert (said.ttft_p50_s > said.itl_p50_s).all()


def test_a_time_scale_slows_everything_but_watts():
    fast, slow = prior().predict(400, 32), prior(time_scale=2.0).predict(400, 32)
    assert slow.throughput_tokens_per_s == pytest.approx(fast.throughput_tokens_per_s / 2)
    assert slow.itl_p99_s == pytest.approx(2 * fast.itl_p99_s)
    assert slow.ttft_p50_s == pytest.approx(2 * fast.ttft_p50_s)
    assert slow.power_w == pytest.approx(fast.power_w)


def test_longer_prompts_cost_throughput_and_ttft():
    short = prior(workload=Workload(prompt_tokens=64)).predict(700, 64)
    long = prior(workload=Workload(prompt_tokens=4096)).predict(700, 64)
    assert long.throughput_tokens_per_s < short.throughput_tokens_per_s
    assert long.ttft_p50_s > short.ttft_p50_s


def test_the_a100_says_what_is_measured_and_what_is_still_transferred():
    provenance = provenance_of("NVIDIA A100-SXM4-80GB")
    assert "fitted on FACTS's cells" in provenance
    assert "efficiencies and overheads of serving transferred from H100" in provenance
    a100, h100 = CONSTANTS["A100-SXM"], CONSTANTS["H100-SXM"]
    for name in ("memory_efficiency", "compute_efficiency", "layer_overhead_s", "link_efficiency"):
        assert getattr(a100, name) == getattr(h100, name)
