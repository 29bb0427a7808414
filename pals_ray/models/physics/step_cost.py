"""What an engine step costs on a GPU type: how long it takes and what a GPU draws, under a power cap or without.

Used by the roofline prior, the virtual GPUs' paced worker and the simulator. A step is a roofline: weights, KV cache
and activations through memory, FLOPs through the tensor cores, all-reduces over NVLink, and launch overhead. Power is
idle draw plus parts that follow the clock and the load; a cap admits the highest clock whose draw lies within it. A
lower clock slows compute in proportion, but memory only below a knee, where the on-chip fabric can no longer keep DRAM
busy. So lowering the cap leaves decode alone down to some cap and then slows it steeply, while prefill slows from the
start (FACTS, "Physics of a capped GPU"). Where even the lowest clock draws more than the cap, some parts draw more than
it, and others keep it by pulsing that clock (`GpuSpec.pulses_clock`).

Throughout, a *clock* is a share of the GPU's highest SM clock, in (0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pals_ray.models.physics.constants import SiliconConstants, constants_for
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import GpuSpec, ModelSpec, Parallelism

# The same formulas serve one step in a worker's hot loop (floats: no numpy overhead) and grids (arrays).
_N = TypeVar("_N", float, FloatArray)
_B = TypeVar("_B", bool, NDArray[np.bool_])

_BISECTIONS = 16
_TINY = 1e-12
#: The least share of time for which a pulsed clock runs.
LEAST_DUTY = 0.02

# More tokens in a step keep more SMs at work, which draws more than their FLOPs and bytes explain. In the ML.ENERGY
# file every doubling of tokens adds about as many watts; a small exponent follows that. The factor is 1 at vLLM's full
# chunk of prompt tokens.
_FULL_CHUNK_TOKENS = 8192.0
_OCCUPANCY_EXPONENT = 0.2
_E = math.e

#: What a step needs (see `GroupPhysics._needs`).
_Needs = tuple[_N, _N, _N, _N, _N, _N]


class StepWork(NamedTuple):
    """What one engine step has to do, over the whole replica.

    `prefill_tokens` prompt tokens are computed, each attending to `prefill_context_tokens` tokens on average;
    `decode_seqs` sequences get one token each and read `kv_tokens` cached tokens together.
    """

    prefill_tokens: float = 0.0
    prefill_context_tokens: float = 0.0
    decode_seqs: float = 0.0
    kv_tokens: float = 0.0


def mean_prefill_context(chunks: Sequence[tuple[float, float]]) -> float:
    """Mean tokens that a prefill token attends to, for chunks of (new tokens, tokens already computed)."""
    new = sum(n for n, _ in chunks)
    return sum(n * (done + n / 2.0) for n, done in chunks) / new if new > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Step(Generic[_N, _B]):
    """One GPU's step, or arrays of many: duration, mean draw, clock share, and what it would draw uncapped.

    `binding` says that the cap holds the clock down, `honours_cap` is False where even the clock floor draws more. A
    pulsed clock counts with its mean.
    """

    duration_s: _N
    power_w: _N
    clock: _N
    natural_w: _N
    binding: _B
    honours_cap: _B


@dataclass(frozen=True, slots=True)
class GroupStep:
    """A step of a whole replica, set by its slowest GPU; in rank order each GPU's mean W and its own step."""

    duration_s: float
    power_w: tuple[float, ...]
    ranks: tuple[Step[float, bool], ...]


def distinct_expert_share(tokens: _N, experts: int, active: int) -> _N:
    """Expected share of the experts that `tokens` tokens touch, 1 - (1 - k/N)^B (FACTS; uniform routing)."""
    untouched: _N = (1.0 - active / experts) ** tokens
    return 1.0 - untouched


class GroupPhysics:
    """The physics of one model on one group of equal GPUs.

    `constants` default to those of the GPU type. All methods are pure. A scalar step takes a few tens of us.
    """

    def __init__(
        self,
        gpu: GpuSpec,
        model: ModelSpec,
        parallelism: Parallelism,
        constants: SiliconConstants | None = None,
    ) -> None:
        self.gpu = gpu
        self.model = model
        self.parallelism = parallelism
        self.constants = c = constants if constants is not None else constants_for(gpu.name)
        n = parallelism.num_gpus
        bandwidth = gpu.bandwidth_bytes_per_s
        # A GPU without FP8 units reads FP8 weights and computes in 16 bits; its `dense_fp8_flops_per_s` is that rate.
        # Weights of fewer bits are unpacked to 16.
        flops = gpu.dense_fp8_flops_per_s if model.weight_bytes == 1.0 else gpu.dense_bf16_flops_per_s
        self._shared_read_s = model.shared_params * model.weight_bytes / n / bandwidth
        self._expert_read_s = model.expert_params * model.weight_bytes / n / bandwidth
        # More ranks than KV heads replicate them; a latent cache is whole on every rank.
        kv_ranks = 1 if model.latent_kv_values else min(n, model.kv_heads)
        self._kv_read_s = model.kv_values_per_token * 2.0 / kv_ranks / bandwidth
        # Read and written each step, in fp32 as Nemotron's model card has vLLM keep it.
        self._state_s = 2.0 * 4.0 * model.state_values / n / bandwidth
        self._activation_s = c.activation_passes * model.layers * model.hidden * 2.0 / n / bandwidth
        self._token_compute_s = 2.0 * model.active_params / n / flops
        # With whole experts on a rank, the most loaded rank has more tokens and touches more experts than the mean one.
        spread = parallelism.expert > 1 and model.is_moe
        active_expert = model.active_params - model.shared_params
        self._token_excess_s = 2.0 * active_expert * (c.expert_imbalance - 1.0) / n / flops if spread else 0.0
        # Of n binomial counts of N/n experts the highest lies about sqrt(2 ln n) deviations above the mean.
        self._rank_luck = math.sqrt(2.0 * math.log(n) * n / model.experts) if spread else 0.0
        self._pair_compute_s = (
            4.0 * model.attending_layers * model.attention_heads * model.head_dim / n / gpu.dense_bf16_flops_per_s
        )
        latency_s = c.layer_overhead_s * model.layers
        if model.is_moe:
            latency_s += c.expert_layer_overhead_s * model.layers
        self._token_link_s = 0.0
        if n > 1:
            latency_s += 2.0 * model.layers * c.all_reduce_latency_s
            # Ring all-reduce, twice a layer: 2 (n - 1) / n of the activations, over half the duplex NVLink rate.
            link = gpu.nvlink_bytes_per_s / 2.0 * c.link_efficiency
            self._token_link_s = 2.0 * model.layers * 2.0 * (n - 1) / n * model.hidden * 2.0 / link
        # What a layer takes at any load is partly the host's and partly runs in SM cycles; launches outside the CUDA
        # graph are the host's.
        self._latency_s = c.latency_clock_share * latency_s
        self._fixed_s = c.step_overhead_s + latency_s - self._latency_s
        self._prefill_fixed_s = c.prefill_layer_overhead_s * model.layers
        span_w = gpu.max_limit_w - gpu.idle_context_w
        self._active_w = c.active_power * span_w
        self._busy_w = c.busy_power * span_w
        self._compute_w = c.compute_power * span_w
        self._fabric_w = c.fabric_power * span_w
        self._occupancy_w = c.occupancy_power * span_w
        self._dram_w = c.dram_power * span_w
        self.clock_floor = gpu.min_sm_clock_mhz / gpu.max_sm_clock_mhz
        # Memory efficiency was fitted at the highest clock, so the fabric's slowdown is taken relative to it.
        self._fabric_norm = (1.0 + c.fabric_knee**c.fabric_sharpness) ** (1.0 / c.fabric_sharpness)

    def _needs(self, prefill: _N, context: _N, seqs: _N, kv: _N) -> _Needs[_N]:
        """What a step needs, in seconds at the datasheet's rates.

        Memory and compute of the most loaded rank (they set the time), fixed time, memory and compute of the mean rank
        (they set the draw), and the share of the chip that so many tokens keep at work.
        """
        tokens = prefill + seqs
        memory = self._shared_read_s + kv * self._kv_read_s + seqs * self._state_s + tokens * self._activation_s
        peak_memory = memory
        if self.model.is_moe:
            share = distinct_expert_share(tokens, self.model.experts, self.model.active_experts)
            # To first order share + luck x sqrt(share (1 - share)), in a form that never exceeds 1.
            missed = 1.0 - share
            odds: _N = (share / (missed + _TINY)) ** 0.5
            peak_share = 1.0 - missed * _E ** (-self._rank_luck * odds)
            memory = memory + self._expert_read_s * share
            peak_memory = peak_memory + self._expert_read_s * peak_share
        attention = (prefill * context + kv) * self._pair_compute_s
        compute = tokens * self._token_compute_s + attention
        peak_compute = compute + tokens * self._token_excess_s
        fixed = self._fixed_s + seqs * self.constants.sequence_overhead_s + tokens * self._token_link_s
        fixed = fixed + (prefill > 0.0) * self._prefill_fixed_s
        occupancy: _N = (tokens / _FULL_CHUNK_TOKENS) ** _OCCUPANCY_EXPONENT
        return peak_memory, peak_compute, fixed, memory, compute, occupancy

    def _duration(self, needs: _Needs[_N], clock: _N) -> _N:
        """Seconds of a step: p-norm of memory and compute time (partial overlap), plus what takes time at any load."""
        memory, compute, fixed, _, _, _ = needs
        c = self.constants
        fabric = (1.0 + (c.fabric_knee / clock) ** c.fabric_sharpness) ** (1.0 / c.fabric_sharpness)
        memory_s = memory / c.memory_efficiency * fabric / self._fabric_norm
        compute_s = compute / c.compute_efficiency / clock
        busy: _N = (memory_s**c.overlap + compute_s**c.overlap) ** (1.0 / c.overlap)
        return fixed + self._latency_s / clock + busy

    def _power(self, needs: _Needs[_N], clock: _N, die: float) -> _N:
        """Mean W of one GPU: energy per FLOP and on-chip byte falls with the clock to a floor, DRAM's does not."""
        _, _, _, memory, compute, occupancy = needs
        duration = self._duration(needs, clock)
        floor = self.constants.voltage_floor
        per_cycle: _N = floor + (1.0 - floor) * clock ** (self.constants.clock_exponent - 1.0)
        on_chip = (compute * self._compute_w + memory * self._fabric_w) / duration
        dynamic = (
            self._active_w
            + per_cycle * ((self._busy_w + occupancy * self._occupancy_w) * clock + on_chip)
            + memory * self._dram_w / duration
        )
        power: _N = self.gpu.idle_context_w + die * dynamic
        return power

    def step(self, work: StepWork, cap_w: float, die: float = 1.0) -> Step[float, bool]:
        """One GPU's step under an effective cap, W. `die` is its factor on dynamic power (see `die_factor`)."""
        needs = self._needs(*work)
        natural_w = self._power(needs, 1.0, die)
        goal_w = cap_w * (1.0 - self.constants.cap_margin)
        if natural_w <= goal_w:
            return Step(self._duration(needs, 1.0), natural_w, 1.0, natural_w, False, True)
        low, high = self.clock_floor, 1.0
        floor_w = self._power(needs, low, die)
        if floor_w >= goal_w:
            duty = self._duty(goal_w, floor_w)
            idle_w = self.gpu.idle_context_w
            power_w = idle_w + duty * (floor_w - idle_w)
            return Step(self._duration(needs, low) / duty, power_w, duty * low, natural_w, True, power_w <= cap_w)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            if self._power(needs, middle, die) <= goal_w:
                low = middle
            else:
                high = middle
        return Step(self._duration(needs, low), self._power(needs, low, die), low, natural_w, True, True)

    def _duty(self, goal_w: float, floor_w: float) -> float:
        """Share of time for which the lowest clock runs under a goal that its draw, `floor_w`, exceeds."""
        if not self.gpu.pulses_clock:
            return 1.0
        idle_w = self.gpu.idle_context_w
        return max((goal_w - idle_w) / (floor_w - idle_w), LEAST_DUTY)

    def group_step(self, work: StepWork, caps_w: Sequence[float], dies: Sequence[float]) -> GroupStep:
        """A step of the replica: the slowest rank's time; faster ranks wait for it at their idle draw."""
        steps = tuple(self.step(work, cap_w, die) for cap_w, die in zip(caps_w, dies, strict=True))
        duration_s = max(step.duration_s for step in steps)
        idle_w = self.gpu.idle_context_w
        power_w = tuple(idle_w + (step.power_w - idle_w) * step.duration_s / duration_s for step in steps)
        return GroupStep(duration_s, power_w, steps)

    def locked_step(self, work: StepWork, clock: float) -> tuple[float, float]:
        """Duration, s, and one GPU's mean draw, W, with the SM clock locked at this share of its highest."""
        needs = self._needs(*work)
        return self._duration(needs, clock), self._power(needs, clock, 1.0)

    def natural_draw_w(self, work: StepWork, die: float = 1.0) -> float:
        """One GPU's mean draw in this step if nothing capped it, W."""
        return self._power(self._needs(*work), 1.0, die)

    def sweep(
        self,
        cap_w: ArrayLike,
        decode_seqs: ArrayLike,
        kv_tokens: ArrayLike = 0.0,
        prefill_tokens: ArrayLike = 0.0,
        prefill_context_tokens: ArrayLike = 0.0,
    ) -> Step[FloatArray, NDArray[np.bool_]]:
        """`step` for arrays, broadcast against each other: the same formulas, on a die of factor 1."""
        cap, seqs, kv, prefill, context = (
            np.array(a, dtype=np.float64)
            for a in np.broadcast_arrays(cap_w, decode_seqs, kv_tokens, prefill_tokens, prefill_context_tokens)
        )
        needs = self._needs(prefill, context, seqs, kv)
        ones = np.ones_like(cap)
        natural_w = self._power(needs, ones, 1.0)
        goal_w = cap * (1.0 - self.constants.cap_margin)
        low, high = self.clock_floor * ones, ones
        floor_w = self._power(needs, low, 1.0)
        free = natural_w <= goal_w
        if not free.all():
            for _ in range(_BISECTIONS):
                middle = 0.5 * (low + high)
                within = self._power(needs, middle, 1.0) <= goal_w
                low, high = np.where(within, middle, low), np.where(within, high, middle)
        clock = np.where(free, 1.0, low)
        power_w, duration_s = self._power(needs, clock, 1.0), self._duration(needs, clock)
        if self.gpu.pulses_clock:
            idle_w = self.gpu.idle_context_w
            duty = np.clip((goal_w - idle_w) / (floor_w - idle_w), LEAST_DUTY, 1.0)
            clock, duration_s, power_w = clock * duty, duration_s / duty, idle_w + duty * (power_w - idle_w)
            floor_w = idle_w + duty * (floor_w - idle_w)
        return Step(duration_s, power_w, clock, natural_w, ~free, floor_w <= cap)
