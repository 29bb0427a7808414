"""The queueing model behind a choice: which share of the requests a replica would answer within its SLO.

An engine is a processor that its running requests share, so the number of them is a birth-death chain: requests come at
one rate and end at tokens/s over output tokens, which depends on how many run. Its stationary distribution does not
depend on how output lengths are distributed (processor sharing is insensitive: Kelly, Reversibility and Stochastic
Networks, 1979). Above the batch limit requests wait. Arrivals that swing more than Poisson's widen the distribution by
their peakedness.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import log, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.replica.prediction import Surface
from pals_ray.control.snapshot import Arrivals
from pals_ray.models.power_model import FloatArray
from pals_ray.types import Slo, Target

#: The 99th percentile of a normal deviate.
_P99 = 2.326
_EPS = 1e-12
_NORMAL_PEAK = 1.0 / sqrt(2.0 * pi)


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


def chosen(first: NDArray[np.bool_], these: Attained, those: Attained) -> Attained:
    """`these` where `first` says so (C,), and `those` elsewhere."""
    pairs = ((getattr(these, part.name), getattr(those, part.name)) for part in fields(Attained))
    return Attained(*(np.where(first, one, other) for one, other in pairs))


@dataclass(frozen=True, slots=True)
class QueueingModel:
    """What one replica's requests meet at each of C caps x B batch sizes, whatever their rate and the batch limit.

    `tpot_s` is the mean gap between tokens while so many run, s (C, B); `good` the share of requests that keep the SLO
    while none or so many run, (C, B + 1); `start_s` the TTFT of one that does not wait, s (C, B); `gap` the distance of
    each batch size to the one before, (B,).
    """

    on: Surface
    tpot_s: FloatArray
    good: FloatArray
    start_s: FloatArray | None
    slo: Slo
    log_capacity: FloatArray
    gap: FloatArray

    @classmethod
    def of(cls, on: Surface, arrivals: Arrivals, slo: Slo) -> QueueingModel:
        """Of a surface, with the latencies and output lengths of these arrivals."""
        latency, start_s = arrivals.latency, None
        tpot_s = on.batch / np.maximum(on.capacity_tokens_per_s, _EPS)
        good = np.ones(tpot_s.shape)
        if slo.ttft_s is not None:
            start_s = arrivals.strain * latency.ttft_p50 * on.ttft_p50_s
            good = _share_within(start_s, arrivals.strain * latency.ttft_p99 * on.ttft_p99_s, slo.ttft_s)
        if slo.tpot_s is not None:
            p99_s = latency.tpot_p99 * tpot_p99_s(on, tpot_s, arrivals.output_tokens)
            good = good * _share_within(tpot_s, p99_s, slo.tpot_s)
        # A surface may know points at which nothing at all is safe to be served.
        log_capacity = np.log(np.maximum(on.capacity_tokens_per_s, _EPS))
        gap = np.diff(on.batch, prepend=0.0)
        return cls(on, tpot_s, _from_none(good), start_s, slo, log_capacity, gap)

    def attained(self, column: np.ndarray, arrivals: Arrivals) -> Attained:
        """What becomes of these arrivals at each cap with the batch limit of that column (C,)."""
        on, gap, caps = self.on, self.gap, np.arange(len(self.on.cap_w))
        log_ratio = log(max(arrivals.strain * arrivals.tokens_per_s, _EPS)) - self.log_capacity
        # The chain's states 1, 2, ... are summed up between the batches of the surface, as if weights were geometric.
        ratio_before = np.concatenate((log_ratio[:, :1], log_ratio[:, :-1]), axis=1)
        step = (gap * (ratio_before + log_ratio) + (log_ratio - ratio_before)) * (0.5 / arrivals.peakedness)
        log_weight = np.cumsum(step, axis=1)
        inside = np.arange(len(on.batch)) <= column[:, None]
        log_weight -= np.maximum(np.where(inside, log_weight, 0.0).max(axis=1, keepdims=True), 0.0)
        grows = step > 0.0
        fall = np.maximum(np.abs(step), 1e-9)
        each = np.expm1(-fall / gap)
        summed = np.exp(np.minimum(np.where(grows, log_weight, log_weight - step), 50.0)) * np.expm1(-fall) / each
        # From the larger end: where weights fall that is the state before, which belongs to the interval before.
        summed = np.where(grows, summed, summed * (1.0 + each))
        empty = np.exp(np.minimum(log_weight[:, :1] - step[:, :1], 50.0))
        weight = np.concatenate((empty, np.where(inside, summed, 0.0)), axis=1)
        last = np.exp(log_weight[caps, column])
        place = np.sign(step) * (1.0 / -np.expm1(-fall) - 1.0 / fall - 0.5) + 0.5
        place = np.where(fall < 1e-3, 0.5, place)
        place = np.where(gap > 1.0, np.minimum(place + 0.5 / gap, 1.0), 1.0)
        # In each interval values count at the weights' mean place: so much of them at its upper end, the rest before.
        upper = weight[:, 1:] * place
        at = np.concatenate((weight[:, :1] + weight[:, 1:2] - upper[:, :1], upper), axis=1)
        at[:, 1:-1] += weight[:, 2:] - upper[:, 1:]

        wait_s = np.full(len(caps), np.inf)
        if self.slo.ttft_s is not None and self.start_s is not None:
            wait_s = np.maximum(self.slo.ttft_s - self.start_s[caps, column], 0.0)
        ends_per_s = on.capacity_tokens_per_s[caps, column] / max(arrivals.output_tokens, 1.0)
        log_tail = log_ratio[caps, column] / arrivals.peakedness
        places = np.minimum(np.floor(wait_s * ends_per_s), 1e6)
        waiting, beyond = (last * part for part in _geometric(log_tail, places))
        turned_away = last * np.exp(np.minimum(log_tail * (places + 1.0), 50.0))
        running = weight.sum(axis=1)
        inside_or_waiting, all_of_them = running + waiting, running + waiting + beyond
        good_ones = (at * self.good).sum(axis=1) + self.good[caps, column + 1] * waiting
        queued = waiting + beyond
        drawn_w = on.power_w[:, 0] * at[:, 0] + (on.power_w * at[:, 1:]).sum(axis=1)
        return Attained(
            attainment=good_ones / all_of_them,
            good_share=good_ones / (inside_or_waiting + turned_away),
            running=((on.batch * at[:, 1:]).sum(axis=1) + queued * on.batch[column]) / all_of_them,
            power_w=(drawn_w + queued * on.power_w[caps, column]) / all_of_them,
        )


def _from_none(values: FloatArray) -> FloatArray:
    """Values at the batches, with those of one sequence for none as well."""
    return np.concatenate((values[:, :1], values), axis=1)


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


def tpot_p99_s(on: Surface, tpot_s: FloatArray, output_tokens: float) -> FloatArray:
    """(C, B): the p99 of TPOT, s: a request's is the mean over its gaps, of which few tokens have few."""
    return np.asarray(tpot_s + np.maximum(on.itl_p99_s - tpot_s, 0.0) / sqrt(max(output_tokens - 1.0, 1.0)))


def _share_within(p50_s: FloatArray, p99_s: FloatArray, limit_s: float) -> FloatArray:
    """The share of a lognormal latency with these percentiles within a limit."""
    spread = np.log(np.maximum(p99_s / p50_s, 1.0 + 1e-6)) / _P99
    return _normal_cdf(np.log(limit_s / p50_s) / spread)


def _normal_cdf(deviate: FloatArray) -> FloatArray:
    """The standard normal distribution function, to 1e-7 (Abramowitz and Stegun, 1964, 26.2.17).

    SciPy has it too, for 27 MB more in every agent.
    """
    size = np.minimum(np.abs(deviate), 40.0)
    t = 1.0 / (1.0 + 0.2316419 * size)
    terms = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * size * size) * _NORMAL_PEAK * terms
    return np.asarray(np.where(deviate > 0.0, 1.0 - tail, tail))


def _geometric(log_ratio: FloatArray, terms: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sums of ratio^k, over k = 1..terms and beyond; the latter is huge for a ratio of 1 or more."""
    ratio = np.exp(np.minimum(log_ratio, 5.0))
    near_one = np.abs(ratio - 1.0) < 1e-6
    grown = np.expm1(np.minimum(log_ratio * terms, 50.0))
    first = np.where(near_one, terms, ratio * grown / np.where(near_one, 1.0, ratio - 1.0))
    beyond = np.exp(np.minimum(log_ratio * (terms + 1.0), 0.0)) / np.maximum(1.0 - ratio, 1e-9)
    rest = np.where(ratio < 1.0, beyond, 1e9 * (1.0 + first))
    return first, rest
