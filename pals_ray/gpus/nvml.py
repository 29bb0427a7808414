"""NVIDIA GPUs through NVML (package nvidia-ml-py): here its units and errors are turned into ours."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pynvml
from pynvml import NVMLError

from pals_ray.gpus.gpu_protocol import (
    GpuDriverMissingError,
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuRangeError,
    GpuUnsupportedError,
    checked_limit_mw,
    permission_help,
)
from pals_ray.types import GpuInfo, GpuState, Provenance

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_Method = Callable[Concatenate["NvmlGpu", P], T]

_LOST = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
)
_UNSUPPORTED = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)


def _translated(error: NVMLError, action: str, uuid: str, invalid: type[GpuError] = GpuError) -> GpuError:
    """Our error for NVML's, with what was tried and what to do; for an invalid argument it is of type `invalid`."""
    if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
        return GpuPermissionError(permission_help(action, uuid))
    if error.value in _LOST:
        return GpuLostError(
            f"GPU {uuid} does not answer (tried to {action}): {error}. "
            "See `nvidia-smi -L` and `dmesg | grep -i xid`; a device that fell off the bus needs a reset or a reboot."
        )
    if error.value in _UNSUPPORTED:
        return GpuUnsupportedError(
            f"GPU {uuid}: this device or its driver cannot {action} ({error}). "
            "pals-ray manages whole data-centre GPUs of the Volta generation or newer."
        )
    if error.value == pynvml.NVML_ERROR_UNINITIALIZED:
        return GpuError(f"GPU {uuid}: could not {action}: NVML is not open in this process (any more).")
    kind = invalid if error.value == pynvml.NVML_ERROR_INVALID_ARGUMENT else GpuError
    return kind(f"GPU {uuid}: could not {action}: {error} (NVML code {error.value}). `nvidia-smi -q` may say more.")


def _maps_errors(action: str, *, invalid: type[GpuError] = GpuError) -> Callable[[_Method[P, T]], _Method[P, T]]:
    """Decorate a method of `NvmlGpu` so that NVML's errors leave it as ours; `action` completes "could not ..."."""

    def decorate(method: _Method[P, T]) -> _Method[P, T]:
        @wraps(method)
        def wrapper(self: NvmlGpu, /, *args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(self, *args, **kwargs)
            except NVMLError as error:
                raise _translated(error, action, self.uuid, invalid) from error

        return wrapper

    return decorate


class NvmlGpu:
    """One whole NVIDIA GPU, addressed by UUID (NVML's indices ignore CUDA_VISIBLE_DEVICES). Thread-safe, as NVML is."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self._has_instant_power = True

    @cached_property
    @_maps_errors("find it", invalid=GpuLostError)
    def _handle(self) -> Any:
        if self.uuid.startswith("MIG-"):
            raise GpuUnsupportedError(_mig_message(self.uuid, "is a MIG slice"))
        return pynvml.nvmlDeviceGetHandleByUUID(self.uuid)

    @cached_property
    @_maps_errors("read what it is and the range of its power limit")
    def info(self) -> GpuInfo:
        """Identity and range, read once."""
        if self._mig_enabled():
            raise GpuUnsupportedError(_mig_message(self.uuid, "is divided into MIG slices"))
        min_mw, max_mw = pynvml.nvmlDeviceGetPowerManagementLimitConstraints(self._handle)
        return GpuInfo(
            uuid=self.uuid,
            product=pynvml.nvmlDeviceGetName(self._handle),
            min_limit_w=min_mw / 1000,
            max_limit_w=max_mw / 1000,
            provenance=Provenance.MEASURED,
        )

    def _mig_enabled(self) -> bool:
        try:
            current, _pending = pynvml.nvmlDeviceGetMigMode(self._handle)
        except NVMLError as error:
            if error.value in _UNSUPPORTED:
                return False
            raise
        return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)

    @_maps_errors("read the power limit in force")
    def limit_w(self) -> float:
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000)

    @_maps_errors("read the power limit ordered last")
    def ordered_limit_w(self) -> float:
        return float(pynvml.nvmlDeviceGetPowerManagementLimit(self._handle) / 1000)

    @_maps_errors("set its power limit", invalid=GpuRangeError)
    def set_limit_w(self, limit_w: float) -> float:
        limit_mw = checked_limit_mw(limit_w, self.info)
        pynvml.nvmlDeviceSetPowerManagementLimit(self._handle, limit_mw)
        return self.limit_w()

    @_maps_errors("try whether its power limit may be set")
    def may_set_limit(self) -> bool:
        # Not the limit in force: where an out-of-band limit is lower, ordering it would change the in-band limit.
        ordered_mw = pynvml.nvmlDeviceGetPowerManagementLimit(self._handle)
        try:
            pynvml.nvmlDeviceSetPowerManagementLimit(self._handle, ordered_mw)
        except NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                return False
            raise
        return True

    @_maps_errors("read its power draw")
    def power_w(self) -> float:
        """Draw now, W: field 186 where the part has it. On parts without it the power usage is instantaneous.

        NVML's `nvmlDeviceGetPowerUsage` is a 1 s mean on Ampere (GA100 aside) and newer; those parts have the field.
        """
        if self._has_instant_power:
            try:
                return self._instant_power_w()
            except NVMLError as error:
                # A driver older than the field answers that its number is an invalid argument.
                if error.value not in (*_UNSUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise
                self._has_instant_power = False
        return float(pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)

    def _instant_power_w(self) -> float:
        (field,) = pynvml.nvmlDeviceGetFieldValues(self._handle, [pynvml.NVML_FI_DEV_POWER_INSTANT])
        if field.nvmlReturn != pynvml.NVML_SUCCESS:
            raise NVMLError(field.nvmlReturn)
        return float(field.value.uiVal / 1000)

    @_maps_errors("read its energy counter (there is none before the Volta generation)")
    def energy_j(self) -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000)

    @_maps_errors("read why its clocks are held down")
    def cap_binding(self) -> bool:
        reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        return bool(reasons & pynvml.nvmlClocksEventReasonSwPowerCap)

    def state(self) -> GpuState:
        """Three calls, one after another. `floor_w` is 0, since NVML does not know it."""
        return GpuState(uuid=self.uuid, limit_w=self.limit_w(), power_w=self.power_w(), energy_j=self.energy_j())

    @_maps_errors("list the processes on it")
    def process_ids(self) -> Sequence[int]:
        """Compute processes, by the host's pids (a container with its own pid namespace sees other numbers)."""
        return tuple(sorted({p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}))


def _mig_message(uuid: str, what: str) -> str:
    return (
        f"GPU {uuid} {what}: a slice has no power limit of its own, so its watts cannot be granted. "
        "Use whole GPUs (`nvidia-smi -mig 0`), or leave this one out of the cluster's resources."
    )


class NvmlDriver:
    """The NVIDIA GPUs of this node. Open it after a fork, not before: NVML's state does not survive a fork."""

    def __init__(self) -> None:
        """Load NVML. Raises `GpuDriverMissingError` without an NVIDIA driver, `GpuError` where it doesn't work."""
        try:
            pynvml.nvmlInit()
        except NVMLError as error:
            if error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED):
                raise GpuDriverMissingError(
                    f"No NVIDIA driver on this machine ({error}). Install one (`nvidia-smi` must list the GPUs), mount "
                    "it into the container, or use `hardware: virtual`."
                ) from error
            raise GpuError(
                f"The NVIDIA driver is there but does not work: {error} (NVML code {error.value}). `nvidia-smi` should "
                "show the same; after an update of the driver the machine needs a reboot."
            ) from error
        self._open = True

    def gpus(self) -> Sequence[NvmlGpu]:
        """Every physical GPU of the node that answers, in NVML's order (by PCI bus); the others are logged."""
        try:
            count = pynvml.nvmlDeviceGetCount()
        except NVMLError as error:
            raise _translated(error, "count the GPUs", "?") from error
        found = []
        for index in range(count):
            try:
                found.append(NvmlGpu(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))))
            except NVMLError as error:
                # A broken device, or one that this container may not open, must not hide the others.
                logger.warning("GPU %d of this node is left out, it does not say its UUID: %s", index, error)
        return tuple(found)

    def gpu(self, uuid: str) -> NvmlGpu:
        """The GPU with this UUID; asks the device at once, so that an error shows here."""
        gpu = NvmlGpu(uuid)
        _ = gpu.info
        return gpu

    def close(self) -> None:
        if self._open:
            self._open = False
            pynvml.nvmlShutdown()
