"""The profile file: a round trip, older versions, and everything that is refused."""

import json

import numpy as np
import pytest

from pals_ray.models.fitting.sample_checks import samples_from_columns
from pals_ray.models.profile import VERSION, Profile, ProfileError, profile_from_json, samples_of
from pals_ray.types import Provenance


def table(**more):
    return samples_from_columns(
        {
            "power_cap_w": [200, 200, 300, 300, 400],
            "batch_limit": [8, 64, 8, 64, 32],
            "throughput_tokens_per_s": [300, 900, 330, 1300, 1100],
            "power_w": [390, 392, 480, 590, 700],
            "num_gpus": [2] * 5,
            **more,
        }
    )


def profile(**more):
    samples = samples_of(table(itl_p50_s=[0.02, "", 0.02, 0.05, 0.03]), Provenance.MODELLED, "2026-01-01T00:00:00Z")
    fields = {"model": "tiny-moe", "gpu": "A100-SXM", "tensor_parallel": 2, "num_gpus": 2, "engine": "vllm 0.29.0"}
    return Profile(**{**fields, **more}, samples=samples)


def test_a_profile_survives_a_round_trip_with_its_fit():
    made = profile(time_scale=2.0)
    made = made.with_fit(made.surface())
    read = profile_from_json(made.to_json())
    assert read == made
    assert read.fit is not None
    assert read.fit.parameters
    assert read.samples[0].provenance is Provenance.MODELLED
    assert np.isnan(read.table().latency["itl_p50_s"][1])


def test_the_same_samples_give_the_same_model_again():
    made = profile()
    a, b = made.surface(), profile_from_json(made.to_json()).surface()
    assert np.array_equal(a.predict([250, 350], [8, 16]).power_w, b.predict([250, 350], [8, 16]).power_w)


def test_version_1_is_still_read():
    old = {
        "version": 1,
        "model": "m",
        "gpu": "H100-SXM",
        "tp": 2,
        "provenance": "measured",
        "samples": [{"power_cap_w": 300, "batch_limit": 8, "throughput_tokens_per_s": 100, "power_w": 500}],
    }
    read = profile_from_json(json.dumps(old))
    assert read.version == VERSION
    assert (read.tensor_parallel, read.num_gpus, read.time_scale) == (2, 2, 1.0)
    assert read.samples[0].provenance is Provenance.MEASURED


def test_another_time_scale_is_refused_with_both():
    profile(time_scale=2.0).check_time_scale(2.0)
    with pytest.raises(ProfileError, match=r"time_scale 2.*runs at 1"):
        profile(time_scale=2.0).check_time_scale(1.0)


def broken(**changes):
    raw = json.loads(profile().to_json())
    raw.update(changes)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "p.json: not JSON"),
        ("[]", "no `version`"),
        ("{}", "no `version`"),
        (broken(version="two"), "version is 'two'"),
        (broken(version=99), "version 99 is newer than 2"),
        (broken(colour="red"), "colour: Extra inputs"),
        (broken(time_scale=0), "time_scale: Input should be greater than 0"),
        (broken(samples=[{"power_cap_w": 1}]), "samples.0.batch_limit: Field required"),
        (broken(samples="none"), "samples"),
    ],
)
def test_a_wrong_file_is_rejected_saying_where(text, words):
    with pytest.raises(ProfileError) as refused:
        profile_from_json(text, "p.json")
    assert words in str(refused.value)
