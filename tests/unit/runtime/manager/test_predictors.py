"""Where a replica's model comes from: its profile, else the prior of the model it stands for, else nowhere."""

import pytest

from pals_ray.config.fleet import parse_fleet_config
from pals_ray.config.reader import ConfigError
from pals_ray.models.physics.constants import provenance_of
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.profile import Profile, ProfileError, ProfileSample
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.runtime.manager.predictors import Predictors, read_profile
from pals_ray.types import Provenance

PRODUCT = "virtual A100-SXM"


def fleet(time_scale=2.0, source="pals-ray/tiny-dense", **model):
    loading = {"model_id": "m", "model_source": source}
    engine = model.pop("engine_kwargs", {})
    entry = {"llm_config": {"model_loading_config": loading, "engine_kwargs": engine}, **model}
    return parse_fleet_config({"budget_w": 1200, "time_scale": time_scale, "models": [entry]}, "a test")


def write_profile(path, gpu="A100-SXM", time_scale=2.0, num_gpus=1):
    truth = RooflineModel(
        GroupPhysics(find_gpu("A100-SXM"), find_model("Qwen3-32B"), Parallelism(1)), time_scale=time_scale
    )
    samples = []
    for cap_w in (100.0, 150.0, 200.0, 250.0, 300.0, 400.0):
        for batch in (1, 4, 8, 16, 32):
            said = truth.predict(cap_w, batch)
            samples.append(
                ProfileSample(
                    power_cap_w=cap_w,
                    batch_limit=batch,
                    throughput_tokens_per_s=0.7 * float(said.throughput_tokens_per_s),
                    power_w=float(said.power_w),
                    provenance=Provenance.MODELLED,
                )
            )
    profile = Profile(model="Qwen3-32B", gpu=gpu, num_gpus=num_gpus, time_scale=time_scale, samples=tuple(samples))
    path.write_text(profile.to_json())
    return str(path)


def test_the_prior_of_what_it_stands_for_is_tabulated_at_the_time_scale_of_virtual_gpus():
    predictors = Predictors(fleet(stands_for="Qwen3-32B"))
    slowed = predictors.of("m", PRODUCT, 1, virtual=True)
    real = Predictors(fleet(stands_for="Qwen3-32B")).of("m", "NVIDIA A100-SXM4-80GB", 1, virtual=False)
    assert slowed.source == f"roofline prior of Qwen3-32B on 1 A100-SXM ({provenance_of('A100-SXM')})"
    truth = RooflineModel(GroupPhysics(find_gpu("A100-SXM"), find_model("Qwen3-32B"), Parallelism(1)), time_scale=2.0)
    for cap_w, batch in ((100, 1), (170, 12), (260, 32), (400, 32)):
        said, true = slowed.surface.predict(cap_w, batch), truth.predict(cap_w, batch)
        assert float(said.throughput_tokens_per_s) == pytest.approx(float(true.throughput_tokens_per_s), rel=0.02)
        assert float(said.power_w) == pytest.approx(float(true.power_w), rel=0.02)
        assert float(said.itl_p99_s) == pytest.approx(float(true.itl_p99_s), rel=0.02)
        fast = float(real.surface.predict(cap_w, batch).throughput_tokens_per_s)
        assert fast == pytest.approx(2 * float(said.throughput_tokens_per_s), rel=1e-6)
    assert predictors.of("m", PRODUCT, 1, virtual=True) is slowed, "made twice"


def test_without_stands_for_the_model_that_it_loads_is_looked_up_by_name():
    found = Predictors(fleet(source="meta-llama/Llama-3.1-70B-Instruct", engine_kwargs={"tensor_parallel_size": 4})).of(
        "m", "NVIDIA H100 80GB HBM3", 4, virtual=False
    )
    assert found.source.startswith("roofline prior of Llama-3.1-70B on 4 H100-SXM (fitted on")


def test_whom_nothing_predicts_has_no_model_and_a_note_says_what_would_help():
    predictors = Predictors(fleet(source="acme/private-7B"))
    assert predictors.of("m", PRODUCT, 1, virtual=True) is None
    (note,) = predictors.notes
    assert "nothing predicts m" in note
    assert "acme/private-7B" in note
    assert predictors.of("another", PRODUCT, 1, virtual=True) is None
    pipelined = Predictors(fleet(stands_for="Llama-3.1-8B", engine_kwargs={"pipeline_parallel_size": 2}))
    assert pipelined.of("m", PRODUCT, 2, virtual=True) is None
    assert "pipeline" in pipelined.notes[0]


def test_a_profile_is_fitted_and_goes_before_the_prior(tmp_path):
    path = write_profile(tmp_path / "dense.json")
    found = Predictors(fleet(stands_for="Qwen3-32B", profile=path)).of("m", PRODUCT, 1, virtual=True)
    assert found.source == f"profile {path} (30 samples, modelled)"
    prior = Predictors(fleet(stands_for="Qwen3-32B")).of("m", PRODUCT, 1, virtual=True)
    ratio = (
        found.surface.predict(400, 16).throughput_tokens_per_s / prior.surface.predict(400, 16).throughput_tokens_per_s
    )
    assert float(ratio) == pytest.approx(0.7, rel=0.1)


@pytest.mark.parametrize(
    ("written", "says"),
    [({"gpu": "H100-SXM"}, "H100-SXM"), ({"num_gpus": 2}, "2 A100-SXM"), ({"time_scale": 1.0}, "time_scale")],
)
def test_a_profile_of_another_gpu_group_or_time_scale_is_refused_with_a_note(tmp_path, written, says):
    path = write_profile(tmp_path / "dense.json", **written)
    predictors = Predictors(fleet(stands_for="Qwen3-32B", profile=path))
    assert predictors.of("m", PRODUCT, 1, virtual=True) is None
    assert says in predictors.notes[0]


def test_a_profile_that_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        read_profile(str(tmp_path / "nowhere.json"), 2.0)
    with pytest.raises(ProfileError, match="time_scale"):
        read_profile(write_profile(tmp_path / "p.json", time_scale=4.0), 2.0)
