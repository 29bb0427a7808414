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


_CONSTANT_STD = 1.0
_SMOOTH_STD = 0.15
_CAP_STD = 0.05
_NOISE_STD = 0.02
# A ratio further than this from what all others predict is taken as a bad sample; its weight falls with distance.
_OUTLIER_STDS = 6.5
_BATCH_LENGTH = 3.0
_DEPTH_LENGTH = 0.7

Points = tuple[FloatArray, FloatArray]


def smooth_log_ratio(log_ratio: FloatArray, measured: Points, asked: Points) -> FloatArray:
    """A smooth correction, in logs, of a formula: from its ratio at measured points to what it is at others.

    Points are (log2 batch, log depth of cap), 1-d arrays; a ratio that is not known is NaN. Used for latencies:
    log(measured / formula) = constant + smooth function of batch + a little with the cap.
    """
    known = np.isfinite(log_ratio)
    log2_batch, log_depth = (values[known] for values in measured)

    def kernel(log2: FloatArray, depth: FloatArray) -> FloatArray:
        by_batch = matern52(log2, log2_batch, _BATCH_LENGTH)
        by_depth = gaussian(depth, log_depth, _DEPTH_LENGTH)
        return np.asarray(_CONSTANT_STD**2 + by_batch * (_SMOOTH_STD**2 + _CAP_STD**2 * by_depth))

    centre = float(np.median(log_ratio[known]))
    covariance, gap = kernel(log2_batch, log_depth), log_ratio[known] - centre
    noise = np.full(len(gap), _NOISE_STD)
    inverse = np.linalg.inv(covariance + np.diag(noise**2))
    # Leave-one-out residuals in closed form (Rasmussen and Williams, eq. 5.12), in standard deviations.
    left_out = np.abs(inverse @ gap) / np.sqrt(np.diag(inverse))
    noise *= np.maximum(left_out / _OUTLIER_STDS, 1.0) ** 2
    weights = np.asarray(cho_solve(cho_factor(covariance + np.diag(noise**2), lower=True), gap))
    return np.asarray(centre + kernel(*asked) @ weights)
