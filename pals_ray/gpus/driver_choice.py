"""Which GPUs a node has, and the driver for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pals_ray.gpus.gpu_protocol import GpuDriver, GpuDriverMissingError
from pals_ray.gpus.nvml import NvmlDriver
from pals_ray.gpus.virtual import VirtualDriver

HardwareKind = Literal["nvml", "virtual"]


def choose_kind(asked: Literal["nvml", "virtual", "auto"]) -> tuple[HardwareKind, str]:
    """The kind of hardware to use on this node, and why. `auto` means NVML where it shows a GPU, else virtual GPUs.

    Raises `GpuError` where an NVIDIA driver is there but broken, rather than use modelled GPUs in place of real ones.
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


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """Which GPUs a node's agent and guardian open, as a value that is sent between processes.

    NVML, or `count` virtual GPUs of type `product`; a virtual node's GPUs are found by the node's key.
    """

    kind: HardwareKind
    product: str = ""
    count: int = 0

    def open(self, node_key: str) -> GpuDriver:
        """Open the driver of the node with this key. Virtual GPUs are made if there are none yet.

        Raises `GpuDriverMissingError` for `nvml` without an NVIDIA driver, and `GpuError` for what does not work.
        """
        if self.kind == "nvml":
            return NvmlDriver()
        return VirtualDriver.open(node_key, self.product, self.count)
