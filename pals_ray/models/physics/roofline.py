"""The prior for a replica that nobody has measured: a roofline of its model on its GPUs, under any cap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pals_ray.models.physics.step_cost import GroupPhysics, Step
from pals_ray.models.power_model import FloatArray, Prediction
from pals_ray.models.specs import Parallelism, find_gpu, find_model

# Relative errors of throughput and power on model families that the constants were not fitted to (docs/models.md).
_THROUGHPUT_REL_STD = 0.18
_POWER_REL_STD = 0.16
# vLLM's default budget of tokens in one step (`max_num_batched_tokens`).
_STEP_TOKENS = 8192.0
_P99_SIGMA = 2.33


@dataclass(frozen=True, slots=True)
class Workload:
    """What requests look like on average: prompt and output tokens."""

    prompt_tokens: float = 256.0
    output_tokens: float = 600.0


class RooflineModel:
    """A `PowerModel` from `GroupPhysics` alone: a full batch, some of whose steps carry prompts of new requests.

    `time_scale` makes everything that many times slower (virtual GPUs); watts stay. `step_tokens` is the engine's
    `max_num_batched_tokens`.
    """

    def __init__(
        self,
        physics: GroupPhysics,
        workload: Workload | None = None,
        time_scale: float = 1.0,
        step_tokens: float = _STEP_TOKENS,
    ) -> None:
        self.physics = physics
        self.workload = workload if workload is not None else Workload()
        self.time_scale = time_scale
        self.step_tokens = step_tokens
        self.num_gpus = physics.parallelism.num_gpus

    def _step(
        self, cap_w: FloatArray, batch: FloatArray, prompts: FloatArray | float
    ) -> Step[FloatArray, NDArray[np.bool_]]:
        """A decode step that also prefills this many prompts on average."""
        w = self.workload
        kv_tokens = batch * (w.prompt_tokens + w.output_tokens / 2.0)
        prefill = np.minimum(prompts * w.prompt_tokens, self.step_tokens)
        return self.physics.sweep(cap_w, batch, kv_tokens, prefill, w.prompt_tokens / 2.0)

    def predict(self, cap_w: ArrayLike, batch: ArrayLike) -> Prediction:
        """Saturated throughput, draw of all GPUs and latencies at (cap per GPU, batch limit)."""
        cap, seqs = (np.array(a, dtype=np.float64) for a in np.broadcast_arrays(np.asarray(cap_w), np.asarray(batch)))
        # A sequence ends after `output_tokens` steps and a new prompt takes its place, so prompts per step are Poisson.
        rate = seqs / self.workload.output_tokens
        share = 1.0 - np.exp(-rate)
        decode = self._step(cap, seqs, 0.0)
        mixed = self._step(cap, seqs, rate / share)
        mean_s = (1.0 - share) * decode.duration_s + share * mixed.duration_s
        energy_j = (1.0 - share) * decode.duration_s * decode.power_w + share * mixed.duration_s * mixed.power_w
        # The median step carries a prompt once more than half of all steps do.
        often = 1.0 / (1.0 + np.exp(-(share - 0.5) / 0.1))
        itl_p50_s = decode.duration_s ** (1.0 - often) * mixed.duration_s**often
        crowd = rate + _P99_SIGMA * np.sqrt(rate)
        itl_p99_s = self._step(cap, seqs, crowd).duration_s
        # A new request waits for the current step and is prefilled in the next, at the tail with many others.
        ttft_p50_s = 0.5 * mean_s + self._step(cap, seqs, 1.0 + rate).duration_s
        ttft_p99_s = itl_p99_s + self._step(cap, seqs, 1.0 + crowd).duration_s
        s = self.time_scale
        return Prediction(
            throughput_tokens_per_s=seqs / mean_s / s,
            power_w=energy_j / mean_s * self.num_gpus,
            itl_p50_s=itl_p50_s * s,
            itl_p99_s=np.maximum(itl_p99_s, itl_p50_s) * s,
            ttft_p50_s=ttft_p50_s * s,
            ttft_p99_s=np.maximum(ttft_p99_s, ttft_p50_s) * s,
            throughput_rel_std=np.full_like(cap, _THROUGHPUT_REL_STD),
            power_rel_std=np.full_like(cap, _POWER_REL_STD),
            honours_cap=np.asarray(decode.honours_cap & mixed.honours_cap),
        )


def known_prior(model: str, gpu: str, parallelism: Parallelism, time_scale: float = 1.0) -> RooflineModel:
    """The prior of a model on a GPU, both by any name that they go by. Raises `UnknownSpecError`."""
    return RooflineModel(GroupPhysics(find_gpu(gpu), find_model(model), parallelism), time_scale=time_scale)
