"""Two estimates of a step's time from measured median ITLs, with errors in different places.

One fits batch / ITL as if it were a throughput, with the form and residual of `fit`. The other uses that fit only for
the slowdown by a cap: at the highest cap it takes a fixed time plus a time per sequence, and interpolates what the
measured batches deviate from that.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import nnls

from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.sample_checks import MIN_CELLS, SampleTable
from pals_ray.models.power_model import FloatArray


class StepTimes:
    """Fitted to the rows of a posterior's table that have a median ITL; see `of`."""

    def __init__(self, posterior: Posterior, known: SampleTable) -> None:
        steps_s = known.latency["itl_p50_s"]
        self._fit = Posterior(replace(known, throughput_tokens_per_s=known.batch / steps_s), posterior.model)
        self._top_cap_w = float(known.cap_w.max())
        log2 = np.log2(known.batch)
        logs = np.log(steps_s) - self._log_slowdown(known.cap_w, log2)
        at = np.unique(log2)
        logs = np.array([np.median(logs[log2 == x]) for x in at])
        # Least squares of relative errors, neither part below zero.
        parts = np.stack([np.ones(len(at)), np.exp2(at)], axis=1) / np.exp(logs)[:, None]
        self._fixed_s, self._per_sequence_s = nnls(parts, np.ones(len(at)))[0]
        self._range = (at[0], at[-1])
        left_over = logs - self._log_affine(at)
        self._left_over = PchipInterpolator(at, left_over) if len(at) > 1 else lambda x: np.full(len(x), left_over[0])

    @classmethod
    def of(cls, posterior: Posterior) -> StepTimes | None:
        """The step times behind a fit; None where too few of its rows have a median ITL."""
        itl_s = posterior.table.latency.get("itl_p50_s")
        if itl_s is None or np.isfinite(itl_s).sum() < MIN_CELLS:
            return None
        return cls(posterior, posterior.table.take(np.flatnonzero(np.isfinite(itl_s))))

    def logs(self, cap_w: FloatArray, log2_batch: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Logs of a step's time, s, at 1-d points: from the fit, and interpolated between measured batches."""
        rate, _, _ = self._fit.mean_logs(cap_w, np.exp2(log2_batch))
        near = self._log_affine(log2_batch) + self._left_over(np.clip(log2_batch, *self._range))
        return log2_batch * np.log(2.0) - rate, near + self._log_slowdown(cap_w, log2_batch)

    def _log_affine(self, log2_batch: FloatArray) -> FloatArray:
        return np.asarray(np.log(self._fixed_s + self._per_sequence_s * np.exp2(log2_batch)))

    def _log_slowdown(self, cap_w: FloatArray, log2_batch: FloatArray) -> FloatArray:
        """Log of a step's time over that at the highest measured cap, by the fit."""
        batch = np.exp2(log2_batch)
        top, _, _ = self._fit.mean_logs(np.full_like(cap_w, self._top_cap_w), batch)
        capped, _, _ = self._fit.mean_logs(cap_w, batch)
        return top - capped
