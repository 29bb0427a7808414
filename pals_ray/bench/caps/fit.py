"""Damped least squares over constants, with priors: what `calibrate` and `caps.serving` fit with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np

from pals_ray.models.physics.constants import SiliconConstants
from pals_ray.models.power_model import FloatArray

#: How far each fitted constant may plausibly lie from where its fit starts: standard deviation of its log.
SPREAD = {c.name: c.metadata["spread"] for c in fields(SiliconConstants) if c.metadata["spread"] is not None}
#: What a chip draws, and how that follows its clock.
POWER_LAW = (*(name for name in SPREAD if name.endswith("_power")), "fabric_knee", "clock_exponent")
_ITERATIONS = 20
_STEP = 1e-3


def robust(standardised: FloatArray) -> FloatArray:
    """Pseudo-Huber loss as a residual: squares near zero, magnitudes far out."""
    return np.asarray(np.sign(standardised) * np.sqrt(2.0 * (np.sqrt(1.0 + standardised**2) - 1.0)))


def moved(start: SiliconConstants, spread: dict[str, float], names: Sequence[str], x: FloatArray) -> SiliconConstants:
    """Constants with the named ones moved by `x` spreads of their logs."""
    return replace(
        start, **{n: getattr(start, n) * float(np.exp(v * spread[n])) for n, v in zip(names, x, strict=True)}
    )


def slopes(f: Callable[[FloatArray], FloatArray], x: FloatArray, at_x: FloatArray, step: float = _STEP) -> FloatArray:
    """Jacobian of `f` by forward differences."""
    return np.stack([(f(x + step * e) - at_x) / step for e in np.eye(len(x))], axis=1)


def gauss_newton(
    f: Callable[[FloatArray], FloatArray], size: int, step: float = _STEP, halvings: int = 0
) -> FloatArray:
    """Least squares of `f` from the origin, moves limited to one spread.

    Where `f` looks for clocks, whose bisection ends at a finite width, `step` of the differences has to be long, and a
    move that raises the sum is halved up to `halvings` times.
    """
    x = np.zeros(size)
    r = f(x)
    for _ in range(_ITERATIONS):
        jacobian = slopes(f, x, r, step)
        move = -np.linalg.solve(jacobian.T @ jacobian, jacobian.T @ r)
        move *= min(1.0, 1.0 / float(np.abs(move).max()))
        there = f(x + move)
        for _ in range(halvings):
            if there @ there <= r @ r:
                break
            move = 0.5 * move
            there = f(x + move)
        x, r = x + move, there
    return x
