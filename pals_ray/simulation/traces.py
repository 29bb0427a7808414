"""Requests over time: real traces scaled and clipped, and synthetic ones. Everything random comes from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals_ray.errors import PalsError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: The "highest 5 min" of an offered load, s.
PEAK_S = 300.0
#: Arrivals bunched within so long stay bunched when a trace is resampled, s.
_SMOOTH_S = 60.0
#: Synthetic rates are given for every so many seconds.
_GRID_S = 1.0


class TraceError(PalsError):
    """Requests that cannot be offered."""


@dataclass(frozen=True, eq=False, slots=True)
class Trace:
    """Requests in order of arrival: `arrival_s` from the start, `prompt_tokens` and `output_tokens`, (n,) each.

    `duration_s` is the time that they are offered over; the last one may come earlier.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    duration_s: float

    def __post_init__(self) -> None:
        if not len(self.arrival_s) == len(self.prompt_tokens) == len(self.output_tokens):
            raise TraceError("a trace needs a prompt and an output length for every arrival")
        if len(self.arrival_s) and (self.arrival_s[0] < 0 or self.arrival_s[-1] > self.duration_s):
            raise TraceError(f"arrivals must lie within the trace's {self.duration_s:g} s")
        if np.any(np.diff(self.arrival_s) < 0):
            raise TraceError("arrivals must be in order of time")
        if np.any(self.prompt_tokens < 1) or np.any(self.output_tokens < 1):
            raise TraceError("every request has at least one prompt and one output token")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def work(self, prompt_share: float) -> FloatArray:
        """(n,) What each request asks of an engine that spends this share of its time on prompts, the rest on outputs;
        1 on average."""
        prompts, outputs = (tokens / tokens.mean() for tokens in (self.prompt_tokens, self.output_tokens))
        return np.asarray(prompt_share * prompts + (1.0 - prompt_share) * outputs)


def lengthened(trace: Trace, factor: float) -> Trace:
    """The same arrivals with prompts and outputs `factor` times as long, 1 token at least."""
    columns = (trace.prompt_tokens, trace.output_tokens)
    prompts, outputs = (np.maximum(np.rint(tokens * factor).astype(np.int64), 1) for tokens in columns)
    return replace(trace, prompt_tokens=prompts, output_tokens=outputs)


def clipped(trace: Trace, max_model_len: int) -> Trace:
    """Fit requests into a model's context: outputs to what leaves one prompt token, then prompts to the rest."""
    outputs = np.minimum(trace.output_tokens, max_model_len - 1)
    prompts = np.minimum(trace.prompt_tokens, max_model_len - outputs)
    return replace(trace, prompt_tokens=prompts, output_tokens=outputs)


def ramped(trace: Trace, ramp_s: float, seed: int) -> Trace:
    """The same requests, thinned at the start: the share that is kept rises from none to all within `ramp_s`."""
    kept = np.random.default_rng(seed).uniform(0.0, 1.0, len(trace)) * ramp_s < trace.arrival_s
    return _picked(trace, kept, trace.arrival_s[kept], trace.duration_s)


def continued(trace: Trace, more_s: float) -> Trace:
    """The same requests, and after them, for so long, those that it begins with once more (again and again)."""
    rounds = math.ceil(more_s / trace.duration_s)
    again_s = (trace.arrival_s + number * trace.duration_s for number in range(rounds + 1))
    arrival_s = np.concatenate(list(again_s))
    kept = np.flatnonzero(arrival_s <= trace.duration_s + more_s)
    return _picked(trace, kept % max(len(trace), 1), arrival_s[kept], trace.duration_s + more_s)


def poisson(lengths: Trace, requests_per_s: float, duration_s: float, seed: int) -> Trace:
    """Poisson arrivals at a constant rate, with lengths drawn from those of `lengths`."""
    return _from_unit_rate(lengths, np.full(_steps(duration_s), requests_per_s), duration_s, seed)


def diurnal(
    lengths: Trace,
    requests_per_s: float,
    duration_s: float,
    seed: int,
    *,
    period_s: float = 86_400.0,
    swing: float = 0.5,
) -> Trace:
    """Poisson arrivals whose rate follows a sine of `period_s` around its mean, by at most `swing` of it."""
    time_s = (np.arange(_steps(duration_s)) + 0.5) * _GRID_S
    rate = requests_per_s * (1.0 - swing * np.cos(2.0 * math.pi * time_s / period_s))
    return _from_unit_rate(lengths, rate, duration_s, seed)


def bursts(
    lengths: Trace,
    requests_per_s: float,
    duration_s: float,
    seed: int,
    *,
    every_s: float = 120.0,
    lasting_s: float = 15.0,
    height: float = 3.0,
) -> Trace:
    """Poisson arrivals at a base rate, `height` times that in bursts of `lasting_s` that begin `every_s` apart on
    average (at exponential intervals); the mean over time is `requests_per_s`."""
    generator = np.random.default_rng([seed, 1])
    time_s = np.arange(_steps(duration_s)) * _GRID_S
    starts_s = np.cumsum(generator.exponential(every_s, math.ceil(4 * duration_s / every_s) + 16))
    latest = np.searchsorted(starts_s, time_s, side="right") - 1
    in_burst = (latest >= 0) & (time_s - starts_s[np.maximum(latest, 0)] < lasting_s)
    shape = np.where(in_burst, height, 1.0)
    return _from_unit_rate(lengths, requests_per_s * shape / shape.mean(), duration_s, seed)


def resampled(
    trace: Trace,
    requests_per_s: float,
    duration_s: float,
    seed: int,
    peak_over_mean: float | None = None,
    prompt_share: float = 0.0,
    own_start: bool = False,
) -> Trace:
    """A trace at another mean rate (and, where given, with its fullest `PEAK_S` at that multiple of the mean).

    Rates are of work (`Trace.work`), in mean requests: while prompts or outputs are longer fewer requests come. In
    *operational time* (the integral of the smoothed rate) work comes at one a unit, bunched as it was. Requests are
    rolled to a start drawn by the seed, repeated or cut to the work wanted, and mapped back through the wanted rate
    over time: the trace's own, stretched to `duration_s`, with its deviations from the mean scaled for the peak. With
    `own_start` that rate begins where the requests do; without, all seeds have it from the trace's start.
    """
    steps = max(round(duration_s / _SMOOTH_S), 1)
    edges_s = np.linspace(0.0, trace.duration_s, steps + 1)
    work = trace.work(prompt_share)
    rate = np.histogram(trace.arrival_s, edges_s, weights=work)[0]
    unit = np.interp(trace.arrival_s, edges_s, np.concatenate(([0.0], np.cumsum(rate))))
    shape = rate / rate.mean()
    if peak_over_mean is not None:
        shape = _with_peak(shape, round(steps * PEAK_S / duration_s), peak_over_mean)
    first = int(np.random.default_rng(seed).integers(0, len(trace)))
    if own_start:
        shape = np.roll(shape, -int(np.searchsorted(edges_s, trace.arrival_s[first], side="right") - 1))
    once = np.cumsum(np.roll(work, -first))
    rounds, rest = divmod(requests_per_s * duration_s, float(once[-1]))
    wanted = int(rounds) * len(trace) + int(np.searchsorted(once, rest))
    if wanted < 1:
        raise TraceError(f"{requests_per_s:g} requests/s over {duration_s:g} s are less than one request")
    at = (first + np.arange(wanted)) % len(trace)
    gaps = np.diff(unit, append=unit[0] + rate.sum())[at]
    place = np.concatenate(([0.0], np.cumsum(gaps)[:-1])) / max(float(gaps.sum()), 1e-9)
    reached = np.concatenate(([0.0], np.cumsum(shape))) / shape.sum()
    arrival_s = np.interp(place, reached, np.linspace(0.0, duration_s, steps + 1))
    return _picked(trace, at, arrival_s, duration_s)


def _picked(trace: Trace, at: NDArray[Any], arrival_s: FloatArray, duration_s: float) -> Trace:
    """The requests of a trace at these indices, or where a mask is true, at other times."""
    return Trace(arrival_s, trace.prompt_tokens[at], trace.output_tokens[at], duration_s)


def _with_peak(shape: FloatArray, steps: int, peak: float) -> FloatArray:
    """A rate of mean 1 whose fullest run of so many steps has the mean `peak`, by scaling deviations from 1."""
    highest = _highest(shape, steps)
    if highest <= 1.0:
        raise TraceError("a trace of constant rate has no peak to scale; leave peak_over_mean out")
    scaled = np.maximum(1.0 + (shape - 1.0) * (peak - 1.0) / (highest - 1.0), 0.0)
    return np.asarray(scaled / scaled.mean())


def _highest(values: FloatArray, steps: int) -> float:
    """The mean of the highest run of so many values, one at least."""
    steps = min(max(steps, 1), len(values))
    return float(np.convolve(values, np.full(steps, 1.0 / steps), "valid").max())


def _steps(duration_s: float) -> int:
    return math.ceil(duration_s / _GRID_S)


def _from_unit_rate(lengths: Trace, rate_per_s: FloatArray, duration_s: float, seed: int) -> Trace:
    """Poisson arrivals of a rate given for every second, by the time change of a unit-rate process."""
    generator = np.random.default_rng(seed)
    edges_s = np.minimum(_GRID_S * np.arange(len(rate_per_s) + 1), duration_s)
    reached = np.concatenate(([0.0], np.cumsum(rate_per_s * np.diff(edges_s))))
    count = int(generator.poisson(reached[-1]))
    places = np.sort(generator.uniform(0.0, reached[-1], count))
    at = np.random.default_rng(int(generator.integers(2**63))).integers(0, len(lengths), count)
    return _picked(lengths, at, np.interp(places, reached, edges_s), duration_s)
