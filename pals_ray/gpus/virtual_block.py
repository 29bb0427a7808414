"""The shared memory behind a node's virtual GPUs: its layout, its creation, and records that are only read whole.

It is a memory-mapped file under /dev/shm, one for each node key, made under a file lock. It stands for hardware, so it
outlives every process; `make clean` removes it. All fields are aligned 8-byte words, each written by one store.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from pals_ray.gpus.gpu_protocol import GpuDriverMissingError, GpuError
from pals_ray.models.physics.die_spread import die_factor
from pals_ray.models.specs import GpuSpec, find_gpu

_FOLDER = Path("/dev/shm")
_PREFIX = "pals-virtual-gpus-"
_MAGIC = 0x50414C5347505532  # "PALSGPU2": change it with the layout
_LOCK_TIMEOUT_S = 10.0

#: Anchors of the energy trail, for the 1 s average; at least 10 ms apart, so they span more than 1 s.
TRAIL_LENGTH = 128


def _latch(fields: int) -> np.dtype[Any]:
    return np.dtype([("count", np.int64), ("slots", np.float64, (2, fields))])


_HEADER = np.dtype([("magic", np.int64), ("num_gpus", np.int64), ("spec", "S48")])
_GPU = np.dtype(
    [
        ("die", np.float64),
        # What tests (and `pals bench`) may switch.
        ("permitted", np.int64),
        ("lost", np.int64),
        ("failing_sets", np.int64),
        ("call_delay_s", np.float64),
        ("cap", _latch(4)),  # ordered, out-of-band (inf: none), cap in effect before the last change, time of it
        ("claim", _latch(2)),  # pid, start ticks; 0, 0: free
        ("load", _latch(7)),  # fields of virtual_load.Load
        ("trail", np.float64, (TRAIL_LENGTH, 2)),  # s, J
    ]
)


class Latch:
    """A record of float64 with one writer at a time and any number of readers, none of whom ever waits.

    There are two slots and a counter. A writer fills the slot that is not current, then publishes it by one store to
    the counter. A reader that finds the counter unchanged after reading has read one whole record. A sequence lock
    would block all readers if its writer were killed half-way. This relies on stores staying in order, as on x86-64.
    """

    __slots__ = ("_count", "_slots")

    def __init__(self, record: NDArray[Any]) -> None:
        """`record`: one-element structured view made by `_latch`."""
        self._count: NDArray[np.int64] = record["count"]
        self._slots: NDArray[np.float64] = record["slots"][0]

    def read(self) -> list[float]:
        """The record as it was published."""
        while True:
            count = self.version()
            values: list[float] = self._slots[count & 1].tolist()
            if self.version() == count:
                return values

    def write(self, values: Sequence[float]) -> None:
        """Publish a record. Writers exclude each other by the block's lock, or by there being only one."""
        count = self.version()
        self._slots[(count + 1) & 1] = values
        self._count[0] = count + 1

    def version(self) -> int:
        """How often the record was published."""
        return self._count.item()


class VirtualBlock:
    """The mapped block of one node. `gpus` is a structured array, one record per GPU (see `_GPU`)."""

    def __init__(self, key: str, spec: GpuSpec, gpus: NDArray[Any]) -> None:
        self.key = key
        self.spec = spec
        self.gpus = gpus
        self.is_open = True
        self._lock = FileLock(lock_path(key))

    @classmethod
    def open(cls, key: str, spec: GpuSpec, count: int, now_s: float) -> VirtualBlock:
        """The block of this key, made first if there is none. Raises `GpuError` if it holds other GPUs than asked."""
        with _held(FileLock(lock_path(key))):
            if not gpu_block_path(key).exists():
                _create(key, spec, count, now_s)
            block = cls.attach(key)
        if (block.spec.name, len(block.gpus)) != (spec.name, count):
            raise GpuError(
                f"{count} virtual {spec.name} were asked for node {key}, but its block {gpu_block_path(key)} holds "
                f"{len(block.gpus)} {block.spec.name} that others may be using. Stop them and run `make clean`, or ask "
                "for the GPUs it has."
            )
        return block

    @classmethod
    def attach(cls, key: str) -> VirtualBlock:
        """The block of this key. Raises `GpuDriverMissingError` if there is none, `GpuError` if it is damaged."""
        path = gpu_block_path(key)
        try:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), 0)
        except FileNotFoundError:
            raise GpuDriverMissingError(
                f"Node {key} has no virtual GPUs: {path} is not there. The first agent of a node makes it."
            ) from None
        except ValueError:  # mmap of an empty file
            memory = None
        header = np.ndarray((1,), _HEADER, memory) if memory and len(memory) >= _HEADER.itemsize else None
        if header is None or header["magic"][0] != _MAGIC or len(memory or b"") != _size(int(header["num_gpus"][0])):
            raise GpuError(f"{path} is damaged, or from another version of pals-ray. Remove it (`make clean`).")
        gpus: NDArray[Any] = np.ndarray((int(header["num_gpus"][0]),), _GPU, memory, offset=_HEADER.itemsize)
        return cls(key, find_gpu(header["spec"][0].decode()), gpus)

    def locked(self) -> AbstractContextManager[Any]:
        """Exclude all other writers of the node; a thread may enter again. Raises `GpuError` if it takes too long."""
        return _held(self._lock)

    def latch(self, field: str, index: int) -> Latch:
        """The latched record `field` of one GPU."""
        return Latch(self.gpus[field][index : index + 1])


def gpu_block_path(key: str) -> Path:
    """The file behind a node's virtual GPUs. Raises `GpuError` for a key that can't be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", key):
        raise GpuError(f"node key {key!r}: up to 100 letters, digits, '_', '.' and '-' are possible.")
    return _FOLDER / (_PREFIX + key)


def _held(lock: FileLock) -> AbstractContextManager[Any]:
    """The lock, taken now, to be released at the end of the `with` that it is used in."""
    try:
        return lock.acquire(timeout=_LOCK_TIMEOUT_S)
    except Timeout as error:
        raise GpuError(
            f"{lock.lock_file} was not free within {_LOCK_TIMEOUT_S:g} s, though it is held for microseconds: the "
            f"process that holds it must be stopped (`fuser {lock.lock_file}` names it)."
        ) from error


def lock_path(key: str) -> Path:
    """The lock that writers of the block hold."""
    return gpu_block_path(key).with_name(gpu_block_path(key).name + ".lock")


def remove_block(key: str) -> None:
    """Remove a node's virtual GPUs for good. Processes that have them mapped keep their own mapping."""
    gpu_block_path(key).unlink(missing_ok=True)
    lock_path(key).unlink(missing_ok=True)


def _size(num_gpus: int) -> int:
    return _HEADER.itemsize + num_gpus * _GPU.itemsize


def _create(key: str, spec: GpuSpec, count: int, now_s: float) -> None:
    """Build the block under another name, then rename it, so that nobody maps a half-written one."""
    header = np.array([(_MAGIC, count, spec.name.encode())], _HEADER)
    gpus = np.zeros(count, _GPU)
    gpus["die"] = [die_factor(i) for i in range(count)]
    gpus["permitted"] = 1
    limit_w = spec.default_limit_w
    gpus["cap"]["slots"][:, 0] = (limit_w, np.inf, limit_w, now_s)
    # No step has run yet, and no process holds a context.
    gpus["load"]["slots"][:, 0] = (0.0, now_s, now_s, spec.idle_bare_w, spec.idle_bare_w, 0.0, 1.0)
    gpus["trail"][:] = (now_s, 0.0)
    made = gpu_block_path(key).with_name(f"{gpu_block_path(key).name}.{os.getpid()}")
    made.write_bytes(header.tobytes() + gpus.tobytes())
    made.replace(gpu_block_path(key))
