"""Regulation: a signal over time, a synthetic one, and how well a fleet's draw followed it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pals_ray.errors import PalsError

FloatArray = NDArray[np.float64]

#: Scores are of means over so long, s (PJM Manual 12 scores 10 s samples).
SAMPLE_S = 10.0
#: Samples in a window of the correlation, and the largest delay that is tried.
WINDOW = 30
#: A window counts only if the signal moves in it: the least standard deviation, as a share of the range.
LEAST_MOVEMENT = 0.01
AQA_QUANTILE = 0.9


class RegulationError(PalsError):
    """A signal or a record that cannot be followed or scored."""


@dataclass(frozen=True, eq=False, slots=True)
class Signal:
    """Values in [-1, 1] at increasing times, s from the start; each holds until the next one."""

    time_s: FloatArray
    value: FloatArray

    def __post_init__(self) -> None:
        if len(self.time_s) < 2 or self.time_s.shape != self.value.shape:
            raise RegulationError("a signal needs one value for each time, and two at least")
        if not (np.all(np.isfinite(self.time_s)) and np.all(np.diff(self.time_s) > 0)):
            raise RegulationError("a signal's times must increase from one value to the next")
        if not np.all(np.abs(self.value) <= 1.0):
            raise RegulationError("a signal's values must lie in [-1, 1]; divide them by the largest one possible")

    @property
    def end_s(self) -> float:
        """When the last value has held for as long as the one before it, s."""
        return float(2 * self.time_s[-1] - self.time_s[-2])

    def at(self, elapsed_s: float) -> float:
        """The value at a time, s from the start; 0 (the base) before and after the signal."""
        if not self.time_s[0] <= elapsed_s < self.end_s:
            return 0.0
        return float(self.value[np.searchsorted(self.time_s, elapsed_s, side="right") - 1])

    def mean(self, elapsed_s: float, over_s: float) -> float:
        """The mean over the `over_s` seconds up to a time; with 0 the value itself."""
        if over_s <= 0.0:
            return self.at(elapsed_s)
        start_s = elapsed_s - over_s
        turns_s = self.time_s[np.searchsorted(self.time_s, start_s) : np.searchsorted(self.time_s, elapsed_s)]
        knots_s = [start_s, *turns_s.tolist(), min(max(self.end_s, start_s), elapsed_s), elapsed_s]
        return math.fsum(self.at(a) * (b - a) for a, b in pairwise(knots_s)) / over_s


def synthetic_signal(
    duration_s: float, seed: int, *, every_s: float = 2.0, correlation_s: float = 120.0, standard_deviation: float = 0.5
) -> Signal:
    """A synthetic regulation signal: an Ornstein-Uhlenbeck process, sampled exactly and clipped to [-1, 1].

    It begins in its stationary distribution; the same seed gives the same signal. No grid operator's data is in it.
    """
    count = math.ceil(duration_s / every_s)
    kept = math.exp(-every_s / correlation_s)
    noise = np.random.default_rng(seed).normal(0.0, standard_deviation, count)
    value = np.empty(count)
    value[0] = noise[0]
    for i in range(1, count):
        value[i] = kept * value[i - 1] + math.sqrt(1.0 - kept * kept) * noise[i]
    return Signal(every_s * np.arange(count, dtype=np.float64), np.clip(value, -1.0, 1.0))


def sample_means(time_s: FloatArray, value: FloatArray, start_s: float, end_s: float) -> FloatArray:
    """Means over each whole 10 s from `start_s` to `end_s`, of values that hold from their time until the next.

    `time_s` increases, in any steps; before the first the first value holds. An unfinished last 10 s is left out.
    """
    edges_s = start_s + SAMPLE_S * np.arange(math.floor((end_s - start_s) / SAMPLE_S + 1e-9) + 1)
    # The integral of a held value is piecewise linear in time, so interpolating it is exact.
    knots_s = np.concatenate(([min(start_s, time_s[0])], time_s, [max(edges_s[-1], time_s[-1])]))
    held = np.concatenate(([value[0]], value))
    integral = np.concatenate(([0.0], np.cumsum(held * np.diff(knots_s))))
    return np.asarray(np.diff(np.interp(edges_s, knots_s, integral)) / SAMPLE_S, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class RegulationScore:
    """How well a signal was followed: accuracy, delay, precision and PJM's mean of them in [0, 1], 1 the best;
    errors as fractions, 0 the best. `windows` is how many stretches of 5 min accuracy and delay are means of."""

    accuracy: float
    delay: float
    precision: float
    pjm: float
    tracking_error: float
    aqa_error: float
    windows: int


def score(y: FloatArray, power_w: FloatArray, base_w: float, range_w: float) -> RegulationScore:
    """Score 10 s means of draw against 10 s means of the signal `y`, both (n,), n >= 60; target = base + range * y.

    Accuracy, delay, precision: after PJM Manual 12, on the deviation from `base_w`. Precision compares each sample
    with the draw one sample later, as PJM's 10 s allowance has it, so a draw ahead of that loses precision.
    Relative tracking error and AQA error (90th percentile of the error over the range) are of the same sample.
    Raises `RegulationError` for too short a record, or for one whose signal never moves.
    """
    if len(y) != len(power_w) or len(y) < 2 * WINDOW:
        raise RegulationError(
            f"a score needs as many samples of draw as of the signal, and {2 * WINDOW} of each (10 min) at least; "
            f"there are {len(power_w)} and {len(y)}: follow the signal for longer"
        )
    wanted_w, given_w = range_w * y, power_w - base_w
    accuracy, delay, windows = _correlation(wanted_w, given_w, range_w)
    precision = max(0.0, 1.0 - float(np.mean(np.abs(given_w[1:] - wanted_w[:-1])) / np.mean(np.abs(wanted_w[:-1]))))
    error_w = np.abs(given_w - wanted_w)
    return RegulationScore(
        accuracy=accuracy,
        delay=delay,
        precision=precision,
        pjm=(accuracy + delay + precision) / 3,
        tracking_error=float(np.mean(error_w) / np.mean(base_w + wanted_w)),
        aqa_error=float(np.quantile(error_w, AQA_QUANTILE) / range_w),
        windows=windows,
    )


def _correlation(wanted_w: FloatArray, given_w: FloatArray, range_w: float) -> tuple[float, float, int]:
    """Mean accuracy and delay over all windows in which the signal moves, each at the shift that suits it best."""
    shifts = np.arange(WINDOW + 1)
    delay_score = 1.0 - np.maximum(shifts - 1, 0) / WINDOW
    wanted = np.lib.stride_tricks.sliding_window_view(wanted_w, WINDOW)[: len(wanted_w) - 2 * WINDOW + 1]
    given = _standardised(np.lib.stride_tricks.sliding_window_view(given_w, WINDOW), range_w)
    moving = np.flatnonzero(wanted.std(axis=1) >= LEAST_MOVEMENT * range_w)
    if len(moving) == 0:
        raise RegulationError("the signal never moves, so nothing can be said of how it was followed; try another one")
    correlation = np.einsum("tw,tkw->tk", _standardised(wanted, range_w)[moving], given[moving[:, None] + shifts])
    best = np.argmax(correlation + delay_score, axis=1)
    accuracy = np.clip(correlation[np.arange(len(moving)), best], 0.0, 1.0)
    return float(accuracy.mean()), float(delay_score[best].mean()), len(moving)


def _standardised(windows: FloatArray, range_w: float) -> FloatArray:
    """Each window less its mean, of length 1; zero where it does not move: such a draw follows nothing."""
    centred = windows - windows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 1e-9 * range_w, centred / np.maximum(length, 1e-300), 0.0)
