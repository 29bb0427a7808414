"""What every rank can be asked through vLLM's public `collective_rpc`."""

from __future__ import annotations

from pals_ray.errors import PalsError


class NoGpuError(PalsError):
    """A rank that runs on no GPU, real or virtual, so nothing of it can be capped."""


class PowerWorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`.

    vLLM refuses a name that the worker has already, so every name starts with `pals_`. A paced worker knows its
    virtual GPU and keeps it in `virtual_gpu_uuid`; any other has a real one.
    """

    local_rank: int

    def pals_gpu_uuid(self) -> str:
        """UUID of the GPU that this rank holds, as NVML (or the virtual GPUs' driver) names it."""
        virtual: str | None = getattr(self, "virtual_gpu_uuid", None)
        if virtual is not None:
            return virtual
        # Imported here: vLLM picks its platform in the worker's own process.
        from vllm.platforms import current_platform

        try:
            return str(current_platform.get_device_uuid(self.local_rank))
        except NotImplementedError as error:
            raise NoGpuError(
                f"this rank runs on {current_platform.device_name} and has no GPU, not even a virtual one; on a node "
                "without GPUs engine_kwargs must say worker_cls='pals_ray.engine.virtual.paced_worker.PacedWorker'"
            ) from error
