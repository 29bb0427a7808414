"""A worker that holds a virtual GPU but is not paced: the engine runs at the speed of this machine."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from pals_ray.engine.virtual.paced_worker import PacedWorker


class UnpacedWorker(PacedWorker):
    """Holds its GPU as a paced worker does, and computes as vLLM's own: for `pals bench overhead`."""

    execute_model = CPUWorker.execute_model
    sample_tokens = CPUWorker.sample_tokens
