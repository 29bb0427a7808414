"""The physical form of a replica's surfaces: throughput and draw against (cap, batch), with few unknowns.

Step time grows with the batch from a fixed part to a part per sequence (memory, then compute or KV traffic); the
natural draw rises between two levels. A cap admits the clock whose draw fits under it: dynamic draw goes as
clock^n, compute slows as 1/clock, memory only below a knee. Work may come in two phases of different draw (prefill
and decode, or a bursty kernel), of which a cap binds one before the other. Below the clock floor nothing gets lower.

Every unknown has a Gaussian prior in an unbounded coordinate; what a file cannot determine stays at the prior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.models.power_model import FloatArray

_LN2 = float(np.log(2.0))

# Smoothness of the form's corners, small against the noise of any measurement.
_SOFT_ZERO = 0.02
_FLOOR_POWER = 8.0
# Below this share of the clock memory throughput follows the clock, as suddenly as the power says (FACTS: decode is
# flat to well under the natural draw; GridPilot E1: -17 % at 0.73 of the clock for a memory-bound kernel).
_FABRIC_KNEE = 0.6
_FABRIC_SHARPNESS = 4.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One unknown: its prior in the unbounded coordinate, and what to call it in a message."""

    name: str
    mean: float
    std: float
    meaning: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What the form says at n points: logs of throughput, then of one GPU's draw (2n,), and how deep the cap cuts.

    `log_depth` is ln(dynamic draw / natural dynamic draw), 0 where the cap does not bind; `log_slowdown` of compute.
    """

    logs: FloatArray
    log_depth: FloatArray
    log_slowdown: FloatArray


@dataclass(frozen=True, slots=True)
class Form:
    """The form for one table of measurements: the priors' centres depend on its ranges only.

    `expert_miss_base` is 1 - k/N of a mixture of experts (None: dense, or not known): the part of the weights that
    a batch of B reads grows as 1 - (1 - k/N)^B.
    """

    log2_batch_middle: float
    log2_batch_half_range: float
    log_throughput_scale: float
    log_power_scale: float
    expert_miss_base: float | None = None

    def parameters(self) -> tuple[Parameter, ...]:
        """The unknowns, in the order of the coordinate vector."""
        middle, half = self.log2_batch_middle, max(self.log2_batch_half_range, 2.0)
        known = (
            Parameter("log_capacity", self.log_throughput_scale, 1.5, "throughput at large batch"),
            Parameter("knee", middle, half, "batch at which throughput bends"),
            Parameter("log_bend", 0.0, 0.4, "sharpness of that bend"),
            Parameter("log_high_draw", self.log_power_scale, 0.3, "natural draw at large batch"),
            Parameter("low_draw", 0.4, 1.0, "natural draw at small batch"),
            Parameter("draw_knee", -1.0, 1.5, "batch at which the natural draw rises"),
            Parameter("log_draw_width", 0.5, 0.4, "how gradually it rises"),
            Parameter("static", -0.6, 0.7, "draw that no clock lowers"),
            Parameter("log_exponent", float(np.log(2.2)), 0.25, "exponent of draw in the clock"),
            Parameter("compute_share", 0.5, 1.5, "share of the time that follows the clock"),
            Parameter("compute_slope", 0.0, 0.25, "change of that share with the batch"),
            Parameter("margin", -0.02, 0.015, "how far under a binding cap the draw lies"),
            Parameter("log_corner", float(np.log(16.0)), 0.7, "sharpness of the cap's onset"),
            Parameter("floor", -2.2, 0.8, "draw at the clock floor"),
            Parameter("phase_spread", -2.0, 1.2, "difference of draw between phases"),
            Parameter("phase_slope", 0.0, 0.3, "change of that difference with the batch"),
            Parameter("phase_share", 0.0, 1.0, "share of time in the phase of higher draw"),
        )
        if self.expert_miss_base is None:
            return known
        return (*known, Parameter("expert_weight", 0.0, 1.0, "share of the fixed step time that reads experts"))

    def evaluate(
        self, theta: FloatArray, cap_w: FloatArray, log2_batch: FloatArray, log_draw_offset: FloatArray
    ) -> Shape:
        """The surfaces at coordinates `theta`; `log_draw_offset` multiplies the natural dynamic draw (smooth in batch).

        `cap_w`, `log2_batch` and the offset are arrays of one shape; watts are one GPU's.
        """
        log_capacity, knee, log_bend, log_high, low, draw_knee, log_width, static = theta[:8]
        log_n, share, share_slope, margin, log_corner, floor, spread, spread_slope, phase_share = theta[8:17]
        along = log2_batch - self.log2_batch_middle

        bend = np.exp(log_bend)
        ascent = np.clip((log2_batch - knee) * _LN2, -40.0, 40.0)
        fixed = np.zeros_like(log2_batch)
        if self.expert_miss_base is not None:
            untouched = self.expert_miss_base ** np.exp2(log2_batch)
            fixed = np.log1p(-_sigmoid(theta[17]) * untouched)
        log_uncapped = log_capacity - np.logaddexp(0.0, bend * (fixed - ascent)) / bend

        high_w = np.exp(log_high)
        low_w = high_w * _sigmoid(low)
        static_w = low_w * _sigmoid(static)
        rise = _sigmoid((log2_batch - knee - draw_knee) / np.exp(log_width))
        dynamic_w = (low_w - static_w + (high_w - low_w) * rise) * np.exp(log_draw_offset)

        exponent, corner = np.exp(log_n), np.exp(log_corner)
        room_w = cap_w * np.exp(margin) - static_w
        compute = _sigmoid(share + share_slope * along)
        floor_depth = -_FLOOR_POWER * np.logaddexp(0.0, -floor)

        def phase(draw_w: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
            """Dynamic draw under the cap, slowdown of the step and of its compute alone."""
            depth = np.log(_SOFT_ZERO) + _log_softplus(room_w / draw_w / _SOFT_ZERO)
            depth = -np.logaddexp(0.0, -corner * depth) / corner
            depth = np.logaddexp(_FLOOR_POWER * depth, floor_depth) - np.logaddexp(0.0, floor_depth)
            depth = depth / _FLOOR_POWER
            clock = np.exp(depth / exponent)
            fabric = (1.0 + (_FABRIC_KNEE / clock) ** _FABRIC_SHARPNESS) / (1.0 + _FABRIC_KNEE**_FABRIC_SHARPNESS)
            memory_slow = fabric ** (1.0 / _FABRIC_SHARPNESS)
            return draw_w * np.exp(depth), (1.0 - compute) * memory_slow + compute / clock, 1.0 / clock

        weight = _sigmoid(phase_share)
        apart = _sigmoid(spread + spread_slope * along)
        high_phase_w, high_slow, high_compute = phase(dynamic_w * (1.0 + apart * (1.0 - weight) / weight))
        low_phase_w, low_slow, _ = phase(dynamic_w * (1.0 - apart))
        # Phases' shares of time stretch with their own slowdown.
        high_s, low_s = weight * high_slow, (1.0 - weight) * low_slow
        drawn_w = (high_s * high_phase_w + low_s * low_phase_w) / (high_s + low_s)
        return Shape(
            np.concatenate([log_uncapped - np.log(high_s + low_s), np.log(static_w + drawn_w)]),
            np.log(drawn_w / dynamic_w),
            np.log(high_compute),
        )


def _sigmoid(x: FloatArray | float) -> FloatArray:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(x))))


def _log_softplus(x: FloatArray) -> FloatArray:
    """ln(ln(1 + e^x)), which is x far below zero, where the formula underflows."""
    return np.where(x < -30.0, x, np.log(np.logaddexp(0.0, np.maximum(x, -30.0))))
