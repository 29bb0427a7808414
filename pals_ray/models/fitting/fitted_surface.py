"""From samples to a lookup table: the fit evaluated over caps and batches, made monotone in the cap (see `lookup`)."""

from __future__ import annotations

import numpy as np

from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.form import Shape
from pals_ray.models.fitting.sample_checks import LATENCY_COLUMNS, SampleTable, check_enough
from pals_ray.models.fitting.smooth import smooth_log_ratio
from pals_ray.models.fitting.step_times import StepTimes
from pals_ray.models.lookup import FitReport, SurfaceModel, knots
from pals_ray.models.power_model import FloatArray, PowerModel
from pals_ray.models.specs import ModelSpec

# TTFT in steps where no latency was measured: an admitted request waits for the current step and has one of its own.
_TTFT_STEPS = 2.0
# p99 / p50 of ITL has a median of 2.50 over the 328 configurations of the ML.ENERGY file; TTFT is assumed alike.
_TAIL = 2.5

# Interpolation between measured steps follows wrong ones too, so it may move the fits by at most this, in logs.
_NEAR = 0.3

# How far the table reaches beyond the measurements: factors on the cap, octaves of batch.
_CAP_REACH = (0.5, 1.5)
_BATCH_REACH_OCTAVES = 2.0


def fit_surface(
    table: SampleTable, model: ModelSpec | None = None, latency_prior: PowerModel | None = None
) -> SurfaceModel:
    """Fit a model to measurements. `model` adds what is known of its experts, `latency_prior` the shape of latencies
    that were not measured. Raises `SampleError` where the table cannot carry a fit.
    """
    check_enough(table)
    posterior = Posterior(table, model)
    table = posterior.table
    log2 = np.log2(table.batch)
    low, high = _CAP_REACH
    cap_knots, batch_knots = knots(
        table.cap_w.min() * low, table.cap_w.max() * high, float(log2.max()) + _BATCH_REACH_OCTAVES
    )
    caps, batches = _with(table.cap_w, cap_knots), _with(log2, batch_knots)
    grid = (len(caps), len(batches))
    cap_grid, log2_grid = (a.reshape(-1) for a in np.meshgrid(caps, batches, indexing="ij"))
    batch_grid = np.exp2(log2_grid)
    throughput, power, shape = posterior.mean_logs(cap_grid, batch_grid)
    throughput, power = (_monotone(logs.reshape(grid)).reshape(-1) for logs in (throughput, power))
    latencies = _latency_logs(posterior, latency_prior, cap_grid, log2_grid, throughput, shape)
    stds = posterior.predictive_std_logs(cap_grid, batch_grid)
    fields = np.stack([throughput, power + np.log(table.num_gpus), *latencies, *stds], axis=-1).reshape(*grid, -1)
    outliers = tuple((float(table.cap_w[i]), int(table.batch[i])) for i in posterior.outliers())
    report = FitReport(posterior.values(), posterior.undetermined(), outliers)
    return SurfaceModel(caps, batches, fields, table.num_gpus, report)


def _monotone(logs: FloatArray) -> FloatArray:
    """Made never to fall along the caps (axis 0): the mean of the least such surface above and the greatest below."""
    above = np.maximum.accumulate(logs, axis=0)
    below = np.minimum.accumulate(logs[::-1], axis=0)[::-1]
    return np.asarray((above + below) / 2.0)


def _with(points: FloatArray, grid: FloatArray) -> FloatArray:
    """Sorted union, without grid points that nearly coincide with another."""
    merged = np.unique(np.concatenate([points, grid]))
    keep = np.concatenate([[True], np.diff(merged) > 1e-6 * np.abs(merged[1:])])
    return np.asarray(merged[keep])


def _latency_logs(
    posterior: Posterior,
    prior: PowerModel | None,
    cap: FloatArray,
    log2: FloatArray,
    log_throughput: FloatArray,
    shape: Shape,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Logs of ITL p50, ITL p99, TTFT p50, TTFT p99 at 1-d points: a formula each, corrected by what was measured.

    ITL p50 starts from batch / throughput (Little's law of a full batch), TTFT p50 from the slowdown of compute
    (prefill) or from `prior`, tails from the median. A measured ITL p50 is also a step time; where there are
    enough of them, the answer is the mean of the formula and the two estimates of `StepTimes`.
    """
    table = posterior.table
    measured = {name: np.log(values) for name, values in table.latency.items()}

    def formulas(
        cap: FloatArray, log2: FloatArray, log_throughput: FloatArray, log_slowdown: FloatArray
    ) -> dict[str, FloatArray]:
        itl = log2 * np.log(2.0) - log_throughput
        if prior is not None:
            said = prior.predict(cap, np.exp2(log2))
            itl_tail, ttft_tail = np.log(said.itl_p99_s / said.itl_p50_s), np.log(said.ttft_p99_s / said.ttft_p50_s)
            return dict(zip(LATENCY_COLUMNS, (itl, itl_tail, np.log(said.ttft_p50_s), ttft_tail), strict=True))
        tail = np.full_like(itl, np.log(_TAIL))
        # Measured TTFTs give the level; with the cap they change as prefill does, which follows compute.
        ttft = log_slowdown if "ttft_p50_s" in measured else np.log(_TTFT_STEPS) + itl
        return dict(zip(LATENCY_COLUMNS, (itl, tail, ttft, tail), strict=True))

    fitted, _, shape_there = posterior.mean_logs(table.cap_w, table.batch)
    log2_there = np.log2(table.batch)
    # Measured throughput, because a row's own ratio of latency to step time is free of the fit's error; fitted
    # where all other rows contradict the measurement.
    rate = np.where(posterior.throughput_believed(), np.log(table.throughput_tokens_per_s), fitted)
    expected = formulas(table.cap_w, log2_there, rate, shape_there.log_slowdown)
    out = formulas(cap, log2, log_throughput, shape.log_slowdown)
    for name, values in measured.items():
        start = expected[name]
        if name.endswith("p99_s"):
            median = name.replace("p99", "p50")
            seen = measured.get(median, expected[median])
            start = start + np.where(np.isfinite(seen), seen, expected[median])
        there, here = (log2_there, shape_there.log_depth), (log2, shape.log_depth)
        out[name] = out[name] + smooth_log_ratio(values - start, there, here)
    itl, itl_tail, ttft, ttft_tail = out.values()
    steps = StepTimes.of(posterior)
    if steps is not None:
        fitted, near = steps.logs(cap, log2)
        both = (itl + fitted) / 2.0
        itl = both + np.clip(near - both, -_NEAR, _NEAR) / 3.0
    # A tail is a ratio to its median, and never below it.
    return itl, itl + np.maximum(itl_tail, 0.0), ttft, ttft + np.maximum(ttft_tail, 0.0)
