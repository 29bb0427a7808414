"""Fitting the form to measurements: maximum a posteriori, with a smooth residual and its uncertainty.

logs of throughput and draw = physical form(theta) + Gaussian process + noise. Inside the form the natural draw may
also deviate smoothly from its sigmoid in the batch, so that a cap acts on the draw that was measured. The unknowns are
found by least squares whitened by the residual's covariance; a measurement that all others contradict loses weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import least_squares

from pals_ray.models.fitting.form import Form, Shape
from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.fitting.smooth import gaussian, matern52
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import ModelSpec

# How far measurements may lie from the form, as shares (std of logs), and over which distances: octaves of batch, and
# e-foldings of the cap's depth. Generic, of the order that repeated runs of the same job show in Zeus's files (noise)
# and that different networks show there (deviations).
THROUGHPUT_NOISE = 0.015
POWER_NOISE = 0.010
_THROUGHPUT_BY_BATCH = 0.15
_THROUGHPUT_BY_CAP = 0.10
_POWER_BY_CAP = 0.02
_DRAW_BY_BATCH = 0.18
_BATCH_LENGTH = 4.0
_DEPTH_LENGTH = 0.7

_PASSES = 3
_MAX_EVALUATIONS = 30
# A row further than this many standard deviations from what all others predict is taken as a bad sample. Throughput is
# allowed more, since it has true bends that no other row shows (another kernel or graph size).
_THROUGHPUT_OUTLIER_STDS = 6.5
_POWER_OUTLIER_STDS = 4.0
# If rows disagree by more than the scales allow, uncertainty grows in proportion, up to this factor.
_EXCESS_LIMIT = 4.0
# Difference between runs of one job, throughput and power: Zeus's optimizers differ by 2.3 % and 1.3 % on average.
_RUN_TO_RUN_STDS = (0.029, 0.016)
# A parameter whose uncertainty the data reduced by less than this share stays undetermined.
_DETERMINED_SHARE = 0.9
_DERIVATIVE_STEP = 1e-4


class Posterior:
    """The form fitted to a table: means, standard deviations and joint covariance of logs anywhere.

    Throughput is tokens/s of the replica, power one GPU's W. It accepts a table of one point and then answers mostly
    from the prior; `fit_surface` refuses tables with too few points.
    """

    def __init__(self, table: SampleTable, model: ModelSpec | None = None) -> None:
        self.table = table = table.merged()
        self.model = model
        self._count = len(table)
        self._cap = table.cap_w
        self._log2 = np.log2(table.batch)
        power = table.power_w / table.num_gpus
        self._measured = np.concatenate([np.log(table.throughput_tokens_per_s), np.log(power)])
        low, high = float(self._log2.min()), float(self._log2.max())
        self.form = Form(
            (low + high) / 2.0,
            (high - low) / 2.0,
            float(np.log(table.throughput_tokens_per_s.max())),
            float(np.log(power.max())),
            1.0 - model.active_experts / model.experts if model is not None and model.is_moe else None,
        )
        self._parameters = self.form.parameters()
        self._knots = np.unique(self._log2)
        knots = matern52(self._knots, self._knots, _BATCH_LENGTH) + 1e-6 * np.eye(len(self._knots))
        self._knot_factor = np.asarray(cholesky(_DRAW_BY_BATCH**2 * knots, lower=True))
        self._own = len(self._parameters)
        self._mean = np.concatenate([[p.mean for p in self._parameters], np.zeros(len(self._knots))])
        self._std = np.concatenate([[p.std for p in self._parameters], np.ones(len(self._knots))])
        self._solve()

    # -- the form with its smooth draw

    def _design(self, log2_batch: FloatArray) -> FloatArray:
        """How the whitened draw deviations at the knots act at these batches."""
        across = _DRAW_BY_BATCH**2 * matern52(log2_batch, self._knots, _BATCH_LENGTH)
        return np.asarray(solve_triangular(self._knot_factor, across.T, lower=True).T)

    def _shape(self, theta: FloatArray, cap: FloatArray, log2_batch: FloatArray, design: FloatArray) -> Shape:
        return self.form.evaluate(theta[: self._own], cap, log2_batch, design @ theta[self._own :])

    def _kernel(self, depth: FloatArray, log2_batch: FloatArray, depth_b: FloatArray, log2_b: FloatArray) -> FloatArray:
        """Covariance of the residuals of (log throughput, log power) between two lists of points."""
        batch = matern52(log2_batch, log2_b, _BATCH_LENGTH)
        both = batch * gaussian(depth, depth_b, _DEPTH_LENGTH)
        n, m = both.shape
        out = np.zeros((2 * n, 2 * m))
        out[:n, :m] = _THROUGHPUT_BY_BATCH**2 * batch + _THROUGHPUT_BY_CAP**2 * both
        out[n:, m:] = _POWER_BY_CAP**2 * both
        return out

    def _solve(self) -> None:
        n = self._count
        theta = self._mean.copy()
        noise = np.repeat([THROUGHPUT_NOISE, POWER_NOISE], n)
        inflation = np.ones(2 * n)
        limit = np.repeat([_THROUGHPUT_OUTLIER_STDS, _POWER_OUTLIER_STDS], n)
        design = self._design(self._log2)
        factor = self._covariance_factor(theta, noise, design)
        for last in [False] * (_PASSES - 1) + [True]:

            def residuals(t: FloatArray, factor: FloatArray = factor) -> FloatArray:
                gap = self._measured - self._shape(t, self._cap, self._log2, design).logs
                return np.concatenate([solve_triangular(factor, gap, lower=True), (t - self._mean) / self._std])

            found = least_squares(residuals, theta, x_scale=self._std, max_nfev=_MAX_EVALUATIONS)
            theta = found.x
            slopes = -(factor @ np.asarray(found.jac)[: 2 * n])
            # The residual is smooth over the depths that this fit has found, no longer over those that it began with.
            factor = self._covariance_factor(theta, noise * inflation, design)
            gap = self._measured - self._shape(theta, self._cap, self._log2, design).logs
            weights = np.asarray(cho_solve((factor, True), gap))
            # Leave-one-out residuals in closed form (Rasmussen and Williams, eq. 5.12), in standard deviations.
            inverse_diagonal = np.sum(np.asarray(solve_triangular(factor, np.eye(2 * n), lower=True)) ** 2, axis=0)
            left_out = np.abs(weights) / np.sqrt(inverse_diagonal)
            if not last:
                inflation = np.maximum(inflation, np.maximum(left_out / limit, 1.0) ** 2)
                factor = self._covariance_factor(theta, noise * inflation, design)
        self.theta, self.inflation = theta, inflation
        self._depth = self._shape(theta, self._cap, self._log2, design).log_depth
        self._factor, self._weights, self._slopes = factor, weights, slopes
        whitened = np.asarray(solve_triangular(factor, slopes, lower=True))
        self._theta_covariance = np.linalg.inv(whitened.T @ whitened + np.diag(self._std**-2.0))
        self._excess = tuple(
            float(np.clip(np.sqrt(np.mean(np.minimum(half, _EXCESS_LIMIT) ** 2)), 1.0, _EXCESS_LIMIT))
            for half in (left_out[:n], left_out[n:])
        )

    def _covariance_factor(self, theta: FloatArray, noise: FloatArray, design: FloatArray) -> FloatArray:
        """The Cholesky factor of the measured logs' covariance around the form."""
        depth = self._shape(theta, self._cap, self._log2, design).log_depth
        covariance = self._kernel(depth, self._log2, depth, self._log2)
        covariance[np.diag_indices(2 * self._count)] += noise**2
        return np.asarray(cholesky(covariance, lower=True))

    def mean_logs(self, cap_w: ArrayLike, batch: ArrayLike) -> tuple[FloatArray, FloatArray, Shape]:
        """Mean of log throughput and of log power of one GPU at 1-d points, and the form's shape there."""
        cap, log2 = np.asarray(cap_w, dtype=np.float64), np.log2(np.asarray(batch, dtype=np.float64))
        shape = self._shape(self.theta, cap, log2, self._design(log2))
        logs = shape.logs + self._kernel(shape.log_depth, log2, self._depth, self._log2) @ self._weights
        return logs[: len(cap)], logs[len(cap) :], shape

    def _linear(
        self, cap: FloatArray, log2: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """For the covariance at points: depth, whitened cross-covariance, slopes in theta and in draw, design."""
        design = self._design(log2)
        shape = self._shape(self.theta, cap, log2, design)
        cross = self._kernel(shape.log_depth, log2, self._depth, self._log2)
        slopes = np.empty((len(shape.logs), len(self.theta)))
        for i, std in enumerate(self._std):
            moved = self.theta.copy()
            moved[i] += _DERIVATIVE_STEP * std
            slopes[:, i] = (self._shape(moved, cap, log2, design).logs - shape.logs) / (_DERIVATIVE_STEP * std)
        slopes -= cross @ cho_solve((self._factor, True), self._slopes)
        offset = design @ self.theta[self._own :] + _DERIVATIVE_STEP
        moved_shape = self.form.evaluate(self.theta[: self._own], cap, log2, offset)
        by_draw = (moved_shape.logs - shape.logs) / _DERIVATIVE_STEP
        whitened = np.asarray(solve_triangular(self._factor, cross.T, lower=True))
        return shape.log_depth, whitened, slopes, by_draw, design

    def std_logs(self, cap_w: ArrayLike, batch: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Standard deviation of log throughput and log power at 1-d points (of the mean, without noise)."""
        cap, log2 = np.asarray(cap_w, dtype=np.float64), np.log2(np.asarray(batch, dtype=np.float64))
        m = len(cap)
        _, whitened, slopes, by_draw, design = self._linear(cap, log2)
        prior = np.repeat([_THROUGHPUT_BY_BATCH**2 + _THROUGHPUT_BY_CAP**2, _POWER_BY_CAP**2], m)
        variance = prior - np.sum(whitened**2, axis=0)
        variance += np.einsum("ij,jk,ik->i", slopes, self._theta_covariance, slopes, optimize=True)
        draw_left = np.maximum(_DRAW_BY_BATCH**2 - np.sum(design**2, axis=1), 0.0)
        variance += by_draw**2 * np.tile(draw_left, 2)
        std = np.sqrt(np.maximum(variance, 0.0))
        return std[:m], std[m:]

    def predictive_std_logs(self, cap_w: ArrayLike, batch: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Standard deviation of a new measurement's logs: of the mean plus noise, wider where rows disagree."""
        throughput, power = self.std_logs(cap_w, batch)
        return (
            self._excess[0] * np.hypot(throughput, _RUN_TO_RUN_STDS[0]),
            self._excess[1] * np.hypot(power, _RUN_TO_RUN_STDS[1]),
        )

    def covariance(self, cap_w: FloatArray, batch: FloatArray) -> FloatArray:
        """Joint covariance of (log throughput, log power) at 1-d points, shape 2m x 2m: throughput first."""
        log2 = np.log2(batch)
        depth, whitened, slopes, by_draw, design = self._linear(cap_w, log2)
        out = self._kernel(depth, log2, depth, log2) - whitened.T @ whitened
        out += slopes @ self._theta_covariance @ slopes.T
        left = _DRAW_BY_BATCH**2 * matern52(log2, log2, _BATCH_LENGTH) - design @ design.T
        return np.asarray(out + np.outer(by_draw, by_draw) * np.tile(left, (2, 2)))

    def outliers(self) -> tuple[int, ...]:
        """Rows of the merged table that lost weight because all the others contradict them."""
        bad = (self.inflation[: self._count] > 1.0) | (self.inflation[self._count :] > 1.0)
        return tuple(int(i) for i in np.flatnonzero(bad))

    def throughput_believed(self) -> NDArray[np.bool_]:
        """(n,): False for rows of the merged table whose throughput all the others contradict."""
        return self.inflation[: self._count] <= 1.0

    def undetermined(self) -> tuple[str, ...]:
        """What the data could not determine, in words: parameters that stayed as uncertain as before."""
        std = np.sqrt(np.diag(self._theta_covariance))[: self._own]
        return tuple(
            p.meaning for p, after in zip(self._parameters, std, strict=True) if after > _DETERMINED_SHARE * p.std
        )

    def values(self) -> dict[str, float]:
        """The unknowns found, by name, in their unbounded coordinates."""
        return {p.name: float(v) for p, v in zip(self._parameters, self.theta[: self._own], strict=True)}
