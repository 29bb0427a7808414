"""Which GPUs a node's agent and guardian open: a value that travels between processes."""

from __future__ import annotations

from dataclasses import dataclass

from pals_ray.gpus.driver_choice import HardwareKind, open_driver
from pals_ray.gpus.gpu_protocol import GpuDriver


@dataclass(frozen=True, slots=True)
class HardwareSpec:
    """NVML, or `count` virtual GPUs of type `product`; a virtual node's GPUs are named by the node's key."""

    kind: HardwareKind
    product: str = ""
    count: int = 0

    def open(self, node_key: str) -> GpuDriver:
        """Open this hardware on the node with this key. Raises `GpuError` where it isn't there."""
        return open_driver(self.kind, virtual_key=node_key, virtual_product=self.product, virtual_count=self.count)
