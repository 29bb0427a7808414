"""Virtual GPUs, which answer as NVML would. Limits, claims and energy are kept in shared memory.

Two sides use them. Agents call the protocol of `pals_ray.gpus.gpu_protocol`, as they do for NVML. The paced worker of
each rank claims a GPU, reads the caps in effect and records the steps that the physics of `pals_ray.models` says it has
run. Everything they report is modelled. Time is CLOCK_MONOTONIC, the same in all processes of a machine.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence

from pals_ray.gpus.gpu_protocol import (
    GpuError,
    GpuLostError,
    GpuPermissionError,
    checked_limit_mw,
    permission_help,
)
from pals_ray.gpus.virtual_block import VirtualBlock
from pals_ray.gpus.virtual_load import LoadRecord
from pals_ray.models.physics.cap_settling import settled_cap_w
from pals_ray.models.specs import GpuSpec, find_gpu
from pals_ray.processes import ProcessId, identify, is_alive
from pals_ray.types import GpuInfo, GpuState, Provenance


class NoFreeGpuError(GpuError):
    """Every virtual GPU of the node is held by a living process."""


class _Switch:
    """A number (or 0 and 1) of a GPU's shared record as an attribute, which tests set and every process sees at once.

    It has the name of its field.
    """

    def __set_name__(self, _: type[VirtualGpu], field: str) -> None:
        self._field = field

    def __get__(self, gpu: VirtualGpu, _: type[VirtualGpu] | None = None) -> float:
        return float(gpu._record[self._field][0])

    def __set__(self, gpu: VirtualGpu, value: float) -> None:
        gpu._record[self._field] = value


class VirtualGpu:
    """One virtual GPU: the protocol `Gpu`, the paced worker's side, and the switches of tests."""

    def __init__(self, block: VirtualBlock, index: int, clock: Callable[[], float]) -> None:
        self.index = index
        self.uuid = f"GPU-virtual-{block.key}-{index}"
        self.spec = spec = block.spec
        self.info = GpuInfo(
            uuid=self.uuid,
            product=f"virtual {spec.name}",
            min_limit_w=spec.min_limit_w,
            max_limit_w=spec.max_limit_w,
            provenance=Provenance.MODELLED,
        )
        self._block = block
        self._record = block.gpus[index : index + 1]
        self._cap = block.latch("cap", index)
        self._claim = block.latch("claim", index)
        self._load = LoadRecord(block.latch("load", index), block.gpus["trail"][index])
        #: This die's factor on dynamic power (`pals_ray.models.physics.die_spread.die_factor`).
        self.die = float(self._record["die"][0])
        self._clock = clock
        self._energy_shown_j = 0.0

    # -- the protocol

    def limit_w(self) -> float:
        """The lower of in-band and out-of-band limit, W."""
        self._call()
        ordered_w, out_of_band_w, _, _ = self._cap.read()
        return min(ordered_w, out_of_band_w)

    def ordered_limit_w(self) -> float:
        self._call()
        return self._cap.read()[0]

    def set_limit_w(self, limit_w: float) -> float:
        """Order a limit; the cap in effect moves to it as `settled_cap_w` describes. Raises as the protocol does."""
        self._order(checked_limit_mw(limit_w, self.info) / 1000)
        return self.limit_w()

    def may_set_limit(self) -> bool:
        try:
            self._order(self.ordered_limit_w())
        except GpuPermissionError:
            return False
        return True

    def power_w(self) -> float:
        """Draw now, W: that of the running step, else idle draw, which is higher while a process holds the GPU."""
        self._call()
        self._free_if_dead()
        return self._load.read().power_at(self._clock())

    def power_usage_w(self) -> float:
        """What NVML's plain power reading gives on this part, W: a 1 s average on newer parts."""
        if not self.spec.power_is_one_second_average:
            return self.power_w()
        self._call()
        self._free_if_dead()
        return self._load.mean_power_w(self._clock(), window_s=1.0)

    def energy_j(self) -> float:
        """The energy counter, J in whole mJ: continuous between steps, and never falling."""
        self._call()
        self._free_if_dead()
        energy_mj = math.floor(self._load.read().energy_at(self._clock()) * 1000)
        # A step recorded between reading the clock and reading the load can put the counter a few us behind.
        self._energy_shown_j = max(self._energy_shown_j, energy_mj / 1000)
        return self._energy_shown_j

    def cap_binding(self) -> bool:
        """Whether a step runs now whose clock the cap holds down."""
        self._call()
        load = self._load.read()
        return load.binding > 0.0 and load.start_s <= self._clock() < load.end_s

    def state(self) -> GpuState:
        """One call after another, as with NVML. `floor_w` is the idle draw while held, if above the lowest cap.

        What a step draws at the lowest clock depends on its work (`GroupPhysics`), and shows in the measured draw.
        """
        floor_w = self.spec.idle_context_w if self._holder() is not None else 0.0
        floor_w = floor_w if floor_w > self.spec.min_limit_w else 0.0
        return GpuState(self.uuid, self.limit_w(), self.power_w(), self.energy_j(), floor_w)

    def process_ids(self) -> Sequence[int]:
        self._call()
        holder = self.holder()
        return () if holder is None else (holder.pid,)

    # -- the paced worker's side: no driver call and no delay; what runs at every step takes no lock

    def effective_cap_w(self, now_s: float) -> float:
        """The cap that the clocks obey at this instant, W; it becomes the limit in force once it has settled."""
        ordered_w, out_of_band_w, before_w, changed_s = self._cap.read()
        return settled_cap_w(before_w, min(ordered_w, out_of_band_w), now_s - changed_s)

    def record_step(self, start_s: float, end_s: float, power_w: float, *, binding: bool) -> None:
        """Record a step of the process that holds this GPU: mean draw `power_w` from `start_s` to `end_s` (monotonic).

        Call it as soon as the end is known, even if that is still to come, so that the draw reads right while the step
        runs. A step that starts before the end of the last one ends that one early. Between steps the GPU draws its
        idle power with a context. Raises `GpuError` in a process that does not hold the GPU: only the holder may write,
        because there is no lock.
        """
        if self._claim.read()[0] != os.getpid():
            raise GpuError(f"GPU {self.uuid}: process {os.getpid()} books a step on a GPU that it does not hold.")
        self._load.record(start_s, end_s, power_w, self._clock(), rest_w=self.spec.idle_context_w, binding=binding)

    def holder(self) -> ProcessId | None:
        """The living process that holds this GPU. The claim of a dead process is removed here."""
        self._free_if_dead()
        return self._holder()

    def release(self, pid: int | None = None) -> None:
        """Give up the claim of a process, this one by default; nothing happens if it isn't the holder."""
        with self._block.locked():
            holder = self._holder()
            if holder is not None and holder == identify(pid):
                self._give_to(None)

    def _give_to(self, process: ProcessId | None) -> None:
        """Under the lock."""
        self._claim.write(process or (0, 0))
        rest_w = self.spec.idle_context_w if process else self.spec.idle_bare_w
        now_s = self._clock()
        self._load.record(now_s, now_s, rest_w, now_s, rest_w=rest_w)

    def _holder(self) -> ProcessId | None:
        pid, start_ticks = self._claim.read()
        return ProcessId(int(pid), int(start_ticks)) if pid else None

    def _free_if_dead(self) -> None:
        holder = self._holder()
        if holder is None or is_alive(holder):
            return
        with self._block.locked():
            if self._holder() == holder:
                self._give_to(None)

    # -- what tests switch; seen by every process at once

    #: Whether limits may be set.
    permitted = _Switch()
    #: Whether the device has fallen off the bus.
    lost = _Switch()
    #: How many of the next orders fail with a plain `GpuError`.
    failing_sets = _Switch()
    #: How long each call of the protocol takes, s (an NVML call takes 0.01 to 0.03).
    call_delay_s = _Switch()

    @property
    def out_of_band_limit_w(self) -> float:
        """The limit that was set past the driver, as by a BMC, W; infinite where there is none."""
        return self._cap.read()[1]

    @out_of_band_limit_w.setter
    def out_of_band_limit_w(self, limit_w: float) -> None:
        with self._block.locked():
            self._change_cap(self._cap.read()[0], limit_w)

    # -- inside

    def _call(self) -> None:
        """The checks and the delay that every call to a driver has."""
        if not self._block.is_open:
            raise GpuError(f"GPU {self.uuid}: the virtual driver of this process was closed.")
        if delay_s := self.call_delay_s:
            time.sleep(delay_s)
        if self.lost:
            raise GpuLostError(f"GPU {self.uuid} does not answer: a test has taken this virtual device off the bus.")

    def _order(self, limit_w: float) -> None:
        self._call()
        if not self.permitted:
            raise GpuPermissionError(permission_help("set its power limit", self.uuid))
        with self._block.locked():
            if self.failing_sets > 0:
                self.failing_sets -= 1
                raise GpuError(f"GPU {self.uuid}: could not set its power limit: a test makes this order fail.")
            self._change_cap(limit_w, self._cap.read()[1])

    def _change_cap(self, ordered_w: float, out_of_band_w: float) -> None:
        """Under the lock. An order that does not change the limit in force does not restart the settling."""
        was_ordered_w, was_out_of_band_w, before_w, changed_s = self._cap.read()
        if min(ordered_w, out_of_band_w) != min(was_ordered_w, was_out_of_band_w):
            now_s = self._clock()
            before_w, changed_s = self.effective_cap_w(now_s), now_s
        self._cap.write((ordered_w, out_of_band_w, before_w, changed_s))


class VirtualDriver:
    """The virtual GPUs of one node, shared by every process that opens the same key."""

    def __init__(self, block: VirtualBlock, clock: Callable[[], float] = time.monotonic) -> None:
        self._block = block
        self._gpus = tuple(VirtualGpu(block, i, clock) for i in range(len(block.gpus)))

    @classmethod
    def open(cls, key: str, product: str, count: int, *, clock: Callable[[], float] = time.monotonic) -> VirtualDriver:
        """Virtual GPUs of node `key`, made at their default limits if there are none yet.

        Raises `UnknownSpecError` for a product without a spec, `GpuError` if the node has other virtual GPUs already.
        """
        if count < 1:
            raise GpuError(f"{count} virtual GPUs were asked for node {key}; at least 1 is possible.")
        return cls(VirtualBlock.open(key, find_gpu(product), count, clock()), clock)

    @classmethod
    def attach(cls, key: str, *, clock: Callable[[], float] = time.monotonic) -> VirtualDriver:
        """The virtual GPUs that node `key` has. Raises `GpuDriverMissingError` if it has none."""
        return cls(VirtualBlock.attach(key), clock)

    @property
    def spec(self) -> GpuSpec:
        """The type of all GPUs of the node."""
        return self._block.spec

    def gpus(self) -> Sequence[VirtualGpu]:
        return self._gpus

    def gpu(self, uuid: str) -> VirtualGpu:
        for gpu in self._gpus:
            if gpu.uuid == uuid:
                return gpu
        raise GpuLostError(
            f"There is no virtual GPU {uuid} on this node; it has {', '.join(g.uuid for g in self._gpus)}."
        )

    def close(self) -> None:
        self._block.is_open = False

    def claim_lowest_free(self, pid: int | None = None) -> VirtualGpu:
        """Claim the lowest GPU that no living process holds and that isn't lost, for a process (this one by default).

        Each call claims one more. The claim ends with `release`, or with the process. Raises `NoFreeGpuError`.
        """
        process = identify(pid)
        if not is_alive(process):
            raise GpuError(f"process {process.pid} is gone: it cannot claim a GPU.")
        with self._block.locked():
            for gpu in self._gpus:
                if not gpu.lost and gpu.holder() is None:
                    gpu._give_to(process)
                    return gpu
            held = ", ".join(f"{gpu.uuid} by {gpu.holder() or 'nobody (lost)'}" for gpu in self._gpus)
        raise NoFreeGpuError(f"No virtual GPU is free on this node: {held}. Stop a replica, or ask for more GPUs.")


def effective_caps_w(gpus: Sequence[VirtualGpu], now_s: float) -> list[float]:
    """The caps in effect on a replica's GPUs at one instant, W, in their order. Takes a few us each and no lock."""
    return [gpu.effective_cap_w(now_s) for gpu in gpus]
