"""What live telemetry may and may not teach."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.models.correction import CorrectedModel, Correction, Observation
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_gpu, find_model

MODEL = RooflineModel(GroupPhysics(find_gpu("H100"), find_model("Llama-3.1-8B"), Parallelism()))


def seen(cap_w=700.0, batch=32, rate=1.0, draw=1.0, running=None, **more):
    """A replica whose truth is the model times `rate` and `draw`."""
    said = MODEL.predict(cap_w, batch)
    observation = Observation(
        cap_w=cap_w,
        batch_limit=batch,
        running=batch if running is None else running,
        waiting=5.0,
        idled=False,
        throughput_tokens_per_s=float(said.throughput_tokens_per_s) * rate,
        power_w=float(said.power_w) * draw,
        binding_share=0.0,
        interval_s=0.5,
    )
    return replace(observation, **more)


def makes(cap_w, running):
    return float(MODEL.predict(cap_w, running).throughput_tokens_per_s)


def after(observation, beats=200, start=None):
    correction = start or Correction()
    for _ in range(beats):
        correction, _ = correction.updated(MODEL, observation)
    return correction


def test_a_saturated_replicas_bias_is_learnt():
    learnt = after(seen(rate=0.8, draw=1.15))
    assert learnt.throughput == pytest.approx(0.8, rel=0.01)
    assert learnt.power == pytest.approx(1.15, rel=0.01)


def test_one_beat_moves_little():
    learnt = after(seen(rate=0.5), beats=1)
    assert 0.95 < learnt.throughput < 1.0


def test_with_free_places_what_the_batch_makes_is_learnt_too_if_more_slowly():
    few = seen(rate=0.8, running=10, waiting=0.0, throughput_tokens_per_s=0.8 * makes(700.0, 10))
    assert after(few).throughput == pytest.approx(0.8, rel=0.01)
    assert after(few, beats=10).throughput > after(seen(rate=0.8), beats=10).throughput


def test_one_or_two_sequences_say_nothing_of_the_capacity():
    correction, why = Correction().updated(MODEL, seen(rate=0.3, running=2, waiting=0.0))
    assert correction.throughput == 1.0
    assert "too little runs" in why


def test_evidence_takes_most_of_the_models_doubt():
    plain = MODEL.predict(700, 32).throughput_rel_std
    assert CorrectedModel(MODEL, Correction(), 1).predict(700, 32).throughput_rel_std == pytest.approx(plain)
    sure = CorrectedModel(MODEL, after(seen()), 1).predict(700, 32).throughput_rel_std
    assert 0.15 * plain < sure < 0.3 * plain


def test_a_binding_cap_says_nothing_of_the_natural_draw():
    correction, why = Correction().updated(MODEL, seen(cap_w=300, draw=0.7, binding_share=1.0))
    assert correction.power == 1.0
    assert "cap binds" in why


def test_bursts_between_which_the_engine_idles_say_nothing_of_capacity_or_draw():
    start = Correction(1.1, 0.9)
    correction, why = start.updated(MODEL, seen(rate=0.4, draw=0.5, running=8, waiting=0.0, idled=True))
    assert correction == start
    assert "not all the time" in why


def test_an_idle_replica_teaches_nothing():
    assert Correction(0.9, 1.1).updated(MODEL, seen(running=0.0, waiting=0.0))[0] == Correction(0.9, 1.1)


@given(st.floats(0, 1e9), st.floats(0, 1e6), st.floats(1, 512), st.floats(0.01, 100))
def test_no_reading_takes_a_correction_out_of_its_bounds(rate, power_w, running, interval_s):
    observation = Observation(400.0, 512, running, 1.0, False, rate, power_w, 0.0, interval_s)
    correction = after(observation, beats=20)
    assert 0.5 <= correction.throughput <= 2.0
    assert 0.5 <= correction.power <= 2.0


def test_a_corrected_model_scales_rates_draw_and_latencies():
    plain, corrected = MODEL.predict(700, 32), CorrectedModel(MODEL, Correction(0.8, 1.1), 1).predict(700, 32)
    assert corrected.throughput_tokens_per_s == pytest.approx(0.8 * plain.throughput_tokens_per_s)
    assert corrected.power_w == pytest.approx(1.1 * plain.power_w)
    assert corrected.itl_p99_s == pytest.approx(plain.itl_p99_s / 0.8)


def test_a_corrected_draw_stays_within_the_cap():
    caps = np.array([250.0, 300.0, 700.0])
    corrected = CorrectedModel(MODEL, Correction(1.0, 2.0), 1).predict(caps, 32)
    assert (corrected.power_w <= caps).all()
