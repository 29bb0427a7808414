"""Step times: what the two estimates say between measured batches, at caps, and where a sample is wrong."""

import dataclasses

import numpy as np
import pytest

from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.step_times import StepTimes
from tests.unit.models.synthetic import replica

CAPS, BATCHES = (150.0, 225.0, 300.0, 400.0), (4, 8, 16, 32, 64, 128)


def steps_of(table):
    return StepTimes.of(Posterior(table))


def test_both_estimates_predict_steps_between_measured_batches_at_every_cap():
    steps = steps_of(replica(CAPS, BATCHES, noise=0.005, latency=True))
    truth = replica(CAPS, (12, 48, 100), noise=0.0, latency=True)
    for said in steps.logs(truth.cap_w, np.log2(truth.batch)):
        off = np.abs(np.exp(said) / truth.latency["itl_p50_s"] - 1.0)
        assert off.mean() < 0.02
        assert off.max() < 0.06


def test_one_wrong_itl_among_the_caps_of_a_batch_is_outvoted():
    table = replica(CAPS, BATCHES, noise=0.003, latency=True)
    itl_s = table.latency["itl_p50_s"].copy()
    wrong = int(np.flatnonzero((table.cap_w == 300.0) & (table.batch == 32))[0])
    itl_s[wrong] *= 1.6
    spoiled = dataclasses.replace(table, latency={**table.latency, "itl_p50_s": itl_s})
    log2 = np.log2(table.batch)
    for good, bad in zip(
        steps_of(table).logs(table.cap_w, log2), steps_of(spoiled).logs(table.cap_w, log2), strict=True
    ):
        assert np.abs(bad - good).max() < 0.05


def test_one_wrong_itl_at_the_only_row_of_a_batch_is_not_believed():
    table = replica((400.0,), BATCHES, noise=0.003, latency=True)
    itl_s = table.latency["itl_p50_s"].copy()
    itl_s[3] *= 3.0
    spoiled = dataclasses.replace(table, latency={**table.latency, "itl_p50_s": itl_s})
    good, bad = (fit_surface(t).predict(400.0, table.batch).itl_p50_s for t in (table, spoiled))
    assert np.abs(bad / good - 1.0).max() < 0.15


def test_a_wrong_throughput_leaves_the_itl_at_its_batch_alone():
    table = replica(CAPS, BATCHES, noise=0.003, latency=True)
    rate = table.throughput_tokens_per_s.copy()
    rate[9] *= 0.4
    spoiled = dataclasses.replace(table, throughput_tokens_per_s=rate)
    good, bad = (fit_surface(t).predict(table.cap_w, table.batch).itl_p50_s for t in (table, spoiled))
    assert np.abs(bad / good - 1.0).max() < 0.05


def test_a_batch_out_of_reach_follows_the_line_of_the_steps():
    steps = steps_of(replica(CAPS, BATCHES, noise=0.0, latency=True))
    _, near = steps.logs(np.full(2, 400.0), np.log2([128.0, 256.0]))
    assert np.exp(near[1] - near[0]) == pytest.approx((0.02 + 0.0004 * 256) / (0.02 + 0.0004 * 128), rel=0.05)


def test_without_enough_itls_there_are_no_step_times():
    table = replica(CAPS, BATCHES, latency=True)
    itl_s = np.full(len(table), np.nan)
    itl_s[:3] = 0.02
    assert steps_of(dataclasses.replace(table, latency={"itl_p50_s": itl_s})) is None
    assert steps_of(dataclasses.replace(table, latency={})) is None
