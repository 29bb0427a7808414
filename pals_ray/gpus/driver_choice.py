"""Which GPUs a node has, and the driver for them."""

from __future__ import annotations

from typing import Literal

from pals_ray.gpus.gpu_protocol import GpuDriver, GpuDriverMissingError
from pals_ray.gpus.nvml import NvmlDriver
from pals_ray.gpus.virtual import VirtualDriver

HardwareKind = Literal["nvml", "virtual"]


def choose_kind(asked: Literal["nvml", "virtual", "auto"]) -> tuple[HardwareKind, str]:
    """What `auto` means on this node, and why: NVML where it shows a GPU, virtual GPUs elsewhere.

    Raises `GpuError` where an NVIDIA driver is there but broken: nobody wants modelled GPUs in place of real ones.
    """
    if asked != "auto":
        return asked, f"the configuration says `{asked}`"
    try:
        driver = NvmlDriver()
    except GpuDriverMissingError:
        return "virtual", "this node has no NVIDIA driver"
    try:
        count = len(driver.gpus())
    finally:
        driver.close()
    if count == 0:
        return "virtual", "this node's NVIDIA driver shows no GPU"
    return "nvml", f"NVML shows {count} GPU{'s' if count > 1 else ''}"


def open_driver(
    kind: HardwareKind, *, virtual_key: str = "", virtual_product: str = "A100-SXM", virtual_count: int = 4
) -> GpuDriver:
    """Open the driver of this node; virtual GPUs are named by their node's key and made if need be.

    Raises `GpuDriverMissingError` for `nvml` without an NVIDIA driver, and `GpuError` for what doesn't work.
    """
    if kind == "nvml":
        return NvmlDriver()
    return VirtualDriver.open(virtual_key, virtual_product, virtual_count)
