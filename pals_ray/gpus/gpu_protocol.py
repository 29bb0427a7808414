"""The hardware seam: one protocol and one set of errors, for NVML and for virtual GPUs alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pals_ray.errors import PalsError
from pals_ray.types import GpuInfo, GpuState


class GpuError(PalsError):
    """Base of all hardware errors; the vendor's own error is the `__cause__`."""


class GpuDriverMissingError(GpuError):
    """There is no such driver on this machine (no NVIDIA library, or its kernel driver is not loaded)."""


class GpuPermissionError(GpuError):
    """We may read this GPU but not set its limit."""


class GpuRangeError(GpuError):
    """The limit asked for is outside the device's range."""


class GpuLostError(GpuError):
    """The device no longer answers (fell off the bus, was reset, or does not exist)."""


class GpuUnsupportedError(GpuError):
    """The device cannot do what was asked (no power limit, no energy counter, a MIG slice)."""


class Gpu(Protocol):
    """One GPU. Every call may raise `GpuError` and may block for tens of ms: keep them off an event loop."""

    @property
    def uuid(self) -> str:
        """Its stable name; known without asking the device."""

    @property
    def info(self) -> GpuInfo:
        """Identity and limit range; read once. Raises `GpuUnsupportedError` where it has no power limit of its own."""

    def limit_w(self) -> float:
        """The power limit in force, W: the lower of in-band and out-of-band."""

    def ordered_limit_w(self) -> float:
        """The in-band limit last ordered by anyone, W: the one to note at first and to restore at the end."""

    def set_limit_w(self, limit_w: float) -> float:
        """Order a power limit, W, and read back the one in force, W.

        Raises `GpuRangeError` outside the range and `GpuPermissionError` without the right. After any `GpuError` the
        order may have been taken all the same: only `limit_w` tells.
        """

    def may_set_limit(self) -> bool:
        """Whether `set_limit_w` would be allowed, found by ordering once more the limit that is ordered already."""

    def power_w(self) -> float:
        """Draw now, W (instantaneous also on parts whose default reading is a 1 s average)."""

    def energy_j(self) -> float:
        """Energy since some start, J; its differences are the best power reading there is."""

    def cap_binding(self) -> bool:
        """Whether the software power cap holds the clocks down at this instant."""

    def state(self) -> GpuState:
        """Limit in force, draw and energy in one value."""

    def process_ids(self) -> Sequence[int]:
        """Processes that hold a context on the device, ascending."""


class GpuDriver(Protocol):
    """All GPUs of a node."""

    def gpus(self) -> Sequence[Gpu]:
        """Every GPU of the node, in the driver's order; those without a limit of their own too (see `Gpu.info`)."""

    def gpu(self, uuid: str) -> Gpu:
        """The GPU with this UUID. Raises `GpuLostError` where there is none, `GpuUnsupportedError` for a slice."""

    def close(self) -> None:
        """Let go of the library; its GPUs no longer answer."""


def checked_limit_mw(limit_w: float, info: GpuInfo) -> int:
    """An order in W as the whole mW that a device takes. Raises `GpuRangeError` outside its range, NaN included."""
    if not info.min_limit_w <= limit_w <= info.max_limit_w:
        raise GpuRangeError(
            f"GPU {info.uuid} ({info.product}): a limit of {limit_w:g} W was asked, but it takes "
            f"{info.min_limit_w:g} to {info.max_limit_w:g} W. Ask for a limit within that range."
        )
    return round(limit_w * 1000)


def permission_help(action: str, uuid: str) -> str:
    """What to tell an operator whose process may not set limits: the ways out."""
    return (
        f"GPU {uuid}: no permission to {action}. Ways out: run as root; give the process CAP_SYS_ADMIN; let the site's "
        "administrator set the limit or run Zeus's privileged daemon `zeusd`; or start with `allow_unenforced: true`, "
        "which leaves the limits alone, charges the limits in force and steers by batch only (status says UNENFORCED)."
    )
