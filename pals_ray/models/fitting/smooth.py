"""Gaussian processes in the few lines that the fits need: kernels over log2(batch) and over the depth of the cap."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from pals_ray.models.power_model import FloatArray


def matern52(a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """Matérn-5/2 correlation between two lists of points on a line (shape len(a) x len(b))."""
    r = np.sqrt(5.0) * np.abs(a[:, None] - b[None, :]) / length
    return np.asarray((1.0 + r + r * r / 3.0) * np.exp(-r))


def gaussian(a: FloatArray, b: FloatArray, length: float) -> FloatArray:
    """Squared-exponential correlation between two lists of points on a line (shape len(a) x len(b))."""
    r = (a[:, None] - b[None, :]) / length
    return np.asarray(np.exp(-0.5 * r * r))


class LogRatio:
    """A smooth correction, in logs, of a formula over (log2 batch, depth of cap).

    Used for latencies: log(measured / formula) = constant + smooth function of batch + a little with the cap.
    """

    _CONSTANT_STD = 1.0
    _SMOOTH_STD = 0.15
    _CAP_STD = 0.05
    _NOISE_STD = 0.02
    #: A ratio further than this from what all others predict is taken as a bad sample; its weight falls with distance.
    _OUTLIER_STDS = 6.5
    _BATCH_LENGTH = 3.0
    _DEPTH_LENGTH = 0.7

    def __init__(self, log_ratio: FloatArray, log2_batch: FloatArray, log_depth: FloatArray) -> None:
        known = np.isfinite(log_ratio)
        self._log2_batch = log2_batch[known]
        self._log_depth = log_depth[known]
        self._centre = float(np.median(log_ratio[known]))
        kernel, gap = self._kernel(self._log2_batch, self._log_depth), log_ratio[known] - self._centre
        noise = np.full(len(gap), self._NOISE_STD)
        inverse = np.linalg.inv(kernel + np.diag(noise**2))
        # Leave-one-out residuals in closed form (Rasmussen and Williams, eq. 5.12), in standard deviations.
        left_out = np.abs(inverse @ gap) / np.sqrt(np.diag(inverse))
        noise *= np.maximum(left_out / self._OUTLIER_STDS, 1.0) ** 2
        self._weights = np.asarray(cho_solve(cho_factor(kernel + np.diag(noise**2), lower=True), gap))

    def _kernel(self, log2_batch: FloatArray, log_depth: FloatArray) -> FloatArray:
        batch = matern52(log2_batch, self._log2_batch, self._BATCH_LENGTH)
        depth = gaussian(log_depth, self._log_depth, self._DEPTH_LENGTH)
        return np.asarray(self._CONSTANT_STD**2 + batch * (self._SMOOTH_STD**2 + self._CAP_STD**2 * depth))

    def at(self, log2_batch: FloatArray, log_depth: FloatArray) -> FloatArray:
        """The correction in logs at these points (1-d arrays)."""
        return np.asarray(self._centre + self._kernel(log2_batch, log_depth) @ self._weights)
