"""The queueing model behind a choice: which share of the requests a replica would answer within its SLO.

An engine is a processor that its running requests share, so the number of them is a birth-death chain: requests come at
one rate and end at tokens/s over output tokens, which depends on how many run. Its stationary distribution does not
depend on how output lengths are distributed (processor sharing is insensitive: Kelly, Reversibility and Stochastic
Networks, 1979). Above the batch limit requests wait. Arrivals that swing more than Poisson's widen the distribution by
their peakedness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from pals_ray.control.replica.prediction import Surface
from pals_ray.control.snapshot import Arrivals
from pals_ray.models.power_model import FloatArray
from pals_ray.types import Slo, Target

#: The 99th percentile of a normal deviate.
_P99 = 2.326
_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class Attained:
    """What becomes of the arrivals at each of C caps with its batch limit, (C,) each.

    `attainment` is the share of good requests, 0 where more comes than is served. `good_share` is the same where those
    that will be late are turned away: what a replica that cannot serve all still makes of them. `running` sequences and
    `power_w`, GPU watts of the group, are means.
    """

    attainment: FloatArray
    good_share: FloatArray
    running: FloatArray
    power_w: FloatArray


def attained(on: Surface, column: np.ndarray, arrivals: Arrivals, slo: Slo) -> Attained:
    """The attainment at each cap with the batch limit of that column (C,)."""
    caps, batch, latency = np.arange(len(on.cap_w)), on.batch, arrivals.latency
    # A surface may know points at which nothing at all is safe to be served.
    log_ratio = np.log(max(arrivals.strain * arrivals.tokens_per_s, _EPS) / np.maximum(on.capacity_tokens_per_s, _EPS))
    # The chain's states 1, 2, ... are summed up between the batches of the surface, as if weights were geometric there.
    before = np.concatenate(([0.0], batch[:-1]))
    gap = batch - before
    ratio_before = np.concatenate((log_ratio[:, :1], log_ratio[:, :-1]), axis=1)
    step = gap * (ratio_before + log_ratio) / 2.0 + (log_ratio - ratio_before) / 2.0
    step /= arrivals.peakedness
    log_weight = np.cumsum(step, axis=1)
    inside = np.arange(len(batch)) <= column[:, None]
    log_weight -= np.maximum(np.where(inside, log_weight, 0.0).max(axis=1, keepdims=True), 0.0)
    fall = np.maximum(np.abs(step), 1e-9)
    upper = np.where(step > 0.0, log_weight, log_weight - step)
    summed = np.exp(np.minimum(upper, 50.0)) * np.expm1(-fall) / np.expm1(-fall / gap)
    # From the larger end: where weights fall that is the state before, which belongs to the interval before.
    summed = np.where(step > 0.0, summed, summed * np.exp(-fall / gap))
    empty = np.exp(np.minimum(log_weight[:, :1] - step[:, :1], 50.0))
    weight = np.concatenate((empty, np.where(inside, summed, 0.0)), axis=1)
    last = np.exp(log_weight[caps, column])
    place = np.where(fall < 1e-3, 0.5, np.sign(step) * (1.0 / -np.expm1(-fall) - 1.0 / fall - 0.5) + 0.5)
    place = np.where(gap > 1.0, np.minimum(place + 0.5 / gap, 1.0), 1.0)

    def summed_up(values: FloatArray) -> FloatArray:
        """(C,): the sum of values at the batches 0, ... by weight, in each interval at the weights' mean place."""
        inner = values[..., :-1] + place * (values[..., 1:] - values[..., :-1])
        return np.asarray(weight[:, 0] * values[..., 0] + (weight[:, 1:] * inner).sum(axis=1))

    good = np.ones((len(caps), len(batch) + 1))
    wait_s = np.full(len(caps), np.inf)
    if slo.ttft_s is not None:
        p50_s, p99_s = (
            arrivals.strain * factor * predicted_s
            for factor, predicted_s in ((latency.ttft_p50, on.ttft_p50_s), (latency.ttft_p99, on.ttft_p99_s))
        )
        within = _share_within(p50_s, p99_s, slo.ttft_s)
        good = np.concatenate((within[:, :1], within), axis=1)
        wait_s = np.maximum(slo.ttft_s - p50_s[caps, column], 0.0)
    if slo.tpot_s is not None:
        tpot_s = mean_tpot_s(on)
        on_time = _share_within(tpot_s, latency.tpot_p99 * tpot_p99_s(on, arrivals.output_tokens), slo.tpot_s)
        good = good * np.concatenate((on_time[:, :1], on_time), axis=1)
    ends_per_s = on.capacity_tokens_per_s[caps, column] / max(arrivals.output_tokens, 1.0)
    log_tail = log_ratio[caps, column] / arrivals.peakedness
    places = np.minimum(np.floor(wait_s * ends_per_s), 1e6)
    waiting, beyond = (last * part for part in _geometric(log_tail, places))
    turned_away = last * np.exp(np.minimum(log_tail * (places + 1.0), 50.0))
    inside_or_waiting, all_of_them = weight.sum(axis=1) + waiting, weight.sum(axis=1) + waiting + beyond
    good_ones = summed_up(good) + good[caps, column + 1] * waiting
    drawn_w = np.concatenate((on.power_w[:, :1], on.power_w), axis=1)
    full_w = on.power_w[caps, column]
    return Attained(
        attainment=good_ones / all_of_them,
        good_share=good_ones / (inside_or_waiting + turned_away),
        running=(summed_up(np.concatenate(([0.0], batch))) + (waiting + beyond) * batch[column]) / all_of_them,
        power_w=(summed_up(drawn_w) + (waiting + beyond) * full_w) / all_of_them,
    )


def paced_by(target: Target, wanted_tokens_per_s: float) -> bool:
    """Whether a replica is to keep the pace that its engine was started for: without SLO and tokens/s target."""
    return not target.slo.judges and target.throughput_tokens_per_s is None and wanted_tokens_per_s > 0.0


def kept_pace(on: Surface, running: FloatArray, slowest_s: float) -> FloatArray:
    """(C,): 1, or less where the p99 gap between tokens is longer than `slowest_s` while so many run at each cap (C,).

    That is the gap of a full batch at the highest cap. Clients that wait for an answer before they ask again send less
    to a slower replica, so without this each cut of the cap would justify the next.
    """
    at = np.minimum(np.searchsorted(on.batch, running), len(on.batch) - 1)
    return np.asarray(np.minimum(slowest_s / on.itl_p99_s[np.arange(len(running)), at], 1.0))


def mean_tpot_s(on: Surface) -> FloatArray:
    """(C, B): the mean gap between tokens while so many run, s."""
    return np.asarray(on.batch / np.maximum(on.capacity_tokens_per_s, _EPS))


def tpot_p99_s(on: Surface, output_tokens: float) -> FloatArray:
    """(C, B): the p99 of TPOT, s: a request's is the mean over its gaps, of which few tokens have few."""
    tpot_s = mean_tpot_s(on)
    return np.asarray(tpot_s + np.maximum(on.itl_p99_s - tpot_s, 0.0) / np.sqrt(max(output_tokens - 1.0, 1.0)))


def _share_within(p50_s: FloatArray, p99_s: FloatArray, limit_s: float) -> FloatArray:
    """The share of a lognormal latency with these percentiles within a limit."""
    spread = np.log(np.maximum(p99_s / p50_s, 1.0 + 1e-6)) / _P99
    return np.asarray(ndtr(np.log(limit_s / p50_s) / spread))


def _geometric(log_ratio: FloatArray, terms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sums of ratio^k, over k = 1..terms and beyond; the latter is huge for a ratio of 1 or more."""
    ratio = np.exp(np.minimum(log_ratio, 5.0))
    near_one = np.abs(ratio - 1.0) < 1e-6
    grown = np.expm1(np.minimum(log_ratio * terms, 50.0))
    first = np.where(near_one, terms, ratio * grown / np.where(near_one, 1.0, ratio - 1.0))
    beyond = np.exp(np.minimum(log_ratio * (terms + 1.0), 0.0)) / np.maximum(1.0 - ratio, 1e-9)
    rest = np.where(ratio < 1.0, beyond, 1e9 * (1.0 + first))
    return first, rest
