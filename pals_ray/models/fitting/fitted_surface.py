"""From samples to a lookup table: the fit evaluated over caps and batches, made monotone in the cap (see `lookup`)."""

from __future__ import annotations

import numpy as np

from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.sample_checks import LATENCY_COLUMNS, SampleTable, check_enough
from pals_ray.models.fitting.smooth import LogRatio
from pals_ray.models.fitting.step_times import StepTimes
from pals_ray.models.lookup import FitReport, SurfaceModel
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
_CAP_KNOTS = 64
_BATCH_KNOTS_PER_OCTAVE = 4


def fit_surface(
    table: SampleTable, model: ModelSpec | None = None, latency_prior: PowerModel | None = None
) -> SurfaceModel:
    """Fit a model to measurements. `model` adds what is known of its experts, `latency_prior` the shape of latencies
    that were not measured. Raises `SampleError` where the table cannot carry a fit.
    """
    check_enough(table)
    posterior = Posterior(table, model)
    table = posterior.table
    caps = _with(
        table.cap_w, np.geomspace(table.cap_w.min() * _CAP_REACH[0], table.cap_w.max() * _CAP_REACH[1], _CAP_KNOTS)
    )
    log2 = np.log2(table.batch)
    top = float(log2.max()) + _BATCH_REACH_OCTAVES
    batches = _with(log2, np.linspace(0.0, top, int(np.ceil(top * _BATCH_KNOTS_PER_OCTAVE)) + 1))
    cap_grid, log2_grid = (a.reshape(-1) for a in np.meshgrid(caps, batches, indexing="ij"))
    batch_grid = np.exp2(log2_grid)
    throughput, power, shape = posterior.mean_logs(cap_grid, batch_grid)
    throughput_std, power_std = posterior.predictive_std_logs(cap_grid, batch_grid)
    grid = (len(caps), len(batches))
    monotone_throughput, monotone_power = _monotone(throughput.reshape(grid)), _monotone(power.reshape(grid))
    latencies = _Latencies(posterior, latency_prior)
    logs = latencies.at(cap_grid, log2_grid, monotone_throughput.reshape(-1), shape.log_depth, shape.log_slowdown)
    fields = np.stack(
        [
            monotone_throughput,
            monotone_power + np.log(table.num_gpus),
            *(values.reshape(grid) for values in logs),
            throughput_std.reshape(grid),
            power_std.reshape(grid),
        ],
        axis=-1,
    )
    outliers = tuple((float(table.cap_w[i]), int(table.batch[i])) for i in posterior.outliers())
    report = FitReport(len(table), posterior.values(), posterior.undetermined(), outliers)
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


class _Latencies:
    """Logs of the four latencies: a formula each, corrected smoothly by what was measured.

    ITL p50 starts from batch / throughput (Little's law of a full batch), TTFT p50 from the slowdown of compute
    (prefill) or from `prior`, tails from the median. A measured ITL p50 is also a step time; where there are
    enough of them, the answer is the mean of the formula and the two estimates of `StepTimes`.
    """

    def __init__(self, posterior: Posterior, prior: PowerModel | None) -> None:
        self._prior = prior
        table = posterior.table
        self._ttft_measured = "ttft_p50_s" in table.latency
        fitted, _, shape = posterior.mean_logs(table.cap_w, table.batch)
        log2 = np.log2(table.batch)
        # Measured throughput, because a row's own ratio of latency to step time is free of the fit's error; fitted
        # where all other rows contradict the measurement.
        believed = posterior.throughput_believed()
        measured = np.where(believed, np.log(table.throughput_tokens_per_s), fitted)
        self._corrections: dict[str, LogRatio] = {}
        self._steps = StepTimes.of(posterior)
        base = self._formulas(table.cap_w, log2, measured, shape.log_slowdown)
        known = {name: np.log(table.latency[name]) for name in LATENCY_COLUMNS if name in table.latency}
        for name in LATENCY_COLUMNS:
            start = base[name]
            if name.endswith("p99_s"):
                median = name.replace("p99", "p50")
                seen = known.get(median, base[median])
                start = start + np.where(np.isfinite(seen), seen, base[median])
            if name in known:
                self._corrections[name] = LogRatio(known[name] - start, log2, shape.log_depth)

    def _formulas(
        self, cap: FloatArray, log2: FloatArray, log_throughput: FloatArray, log_slowdown: FloatArray
    ) -> dict[str, FloatArray]:
        itl = log2 * np.log(2.0) - log_throughput
        tail = np.full_like(itl, np.log(_TAIL))
        if self._prior is None:
            # Measured TTFTs give the level; with the cap they change as prefill does, which follows compute.
            ttft = log_slowdown if self._ttft_measured else np.log(_TTFT_STEPS) + itl
            return {"itl_p50_s": itl, "itl_p99_s": tail, "ttft_p50_s": ttft, "ttft_p99_s": tail}
        said = self._prior.predict(cap, np.exp2(log2))
        return {
            "itl_p50_s": itl,
            "itl_p99_s": np.log(said.itl_p99_s / said.itl_p50_s),
            "ttft_p50_s": np.log(said.ttft_p50_s),
            "ttft_p99_s": np.log(said.ttft_p99_s / said.ttft_p50_s),
        }

    def at(
        self, cap: FloatArray, log2: FloatArray, log_throughput: FloatArray, depth: FloatArray, log_slowdown: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Logs of ITL p50, ITL p99, TTFT p50, TTFT p99 at 1-d points."""
        base = self._formulas(cap, log2, log_throughput, log_slowdown)
        out = {
            name: base[name] + (self._corrections[name].at(log2, depth) if name in self._corrections else 0.0)
            for name in LATENCY_COLUMNS
        }
        if self._steps is not None:
            fitted, near = self._steps.logs(cap, log2)
            both = (out["itl_p50_s"] + fitted) / 2.0
            out["itl_p50_s"] = both + np.clip(near - both, -_NEAR, _NEAR) / 3.0
        # A tail is a ratio to its median, and never below it.
        itl99 = out["itl_p50_s"] + np.maximum(out["itl_p99_s"], 0.0)
        ttft99 = out["ttft_p50_s"] + np.maximum(out["ttft_p99_s"], 0.0)
        return out["itl_p50_s"], itl99, out["ttft_p50_s"], ttft99
