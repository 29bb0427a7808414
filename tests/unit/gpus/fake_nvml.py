"""Builds the fake libnvidia-ml.so.1 of `fake_nvml.c` and holds the state of its GPUs.

fake = FakeNvml.build(tmp_path, num_gpus=4)
subprocess.run([...], env={**os.environ, **fake.environment()})    # any process: an agent, a manager, a Ray node
fake.gpus[0].permission = 0                                        # at once in all of them
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"
SOURCE = Path(__file__).with_suffix(".c")
MAX_GPUS = 64
MAX_PIDS = 8


class FakeGpu(ctypes.Structure):
    """`struct gpu` of fake_nvml.c: fields in shared memory, read and written by every process at once."""

    _fields_ = (
        ("uuid", ctypes.c_char * 80),
        ("name", ctypes.c_char * 96),
        ("min_mw", ctypes.c_uint32),
        ("max_mw", ctypes.c_uint32),
        ("limit_mw", ctypes.c_uint32),
        ("out_of_band_mw", ctypes.c_uint32),
        ("natural_mw", ctypes.c_uint32),
        ("idle_mw", ctypes.c_uint32),
        ("permission", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("mig", ctypes.c_uint32),
        ("energy_counter", ctypes.c_uint32),
        ("instant_field", ctypes.c_uint32),
        ("average_usage", ctypes.c_uint32),
        ("num_pids", ctypes.c_uint32),
        ("pids", ctypes.c_uint32 * MAX_PIDS),
        ("set_calls", ctypes.c_uint32),
        ("energy_uj", ctypes.c_uint64),
        ("energy_at_ns", ctypes.c_uint64),
        ("mw_before", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("ordered_at_ns", ctypes.c_uint64),
    )


class _State(ctypes.Structure):
    _fields_ = (("num_gpus", ctypes.c_uint32), ("delay_ms", ctypes.c_uint32), ("gpus", FakeGpu * MAX_GPUS))


def compile_library(folder: Path) -> Path:
    """Compile the fake into `folder` with gcc and return the library's path; one that is there and newer is kept."""
    library = folder / LIBRARY
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        # Under another name first: a process must never load half a library.
        made = folder / f"{LIBRARY}.{os.getpid()}"
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
        subprocess.run(["gcc", *flags, f"-Wl,-soname,{LIBRARY}", "-o", str(made), str(SOURCE)], check=True)
        made.replace(library)
    return library


class FakeNvml:
    """A set of fake GPUs shared between processes. `gpus` are live views of the shared state."""

    def __init__(self, library: Path, state_path: Path, num_gpus: int) -> None:
        self.library = library
        self.state_path = state_path
        state_path.write_bytes(bytes(ctypes.sizeof(_State)))
        with state_path.open("r+b") as file:
            self._state = _State.from_buffer(mmap.mmap(file.fileno(), 0))
        self._state.num_gpus = num_gpus
        self.gpus: Sequence[FakeGpu] = [self._state.gpus[i] for i in range(num_gpus)]
        for index, gpu in enumerate(self.gpus):
            self._make_h100(gpu, index)

    @classmethod
    def build(cls, folder: Path, num_gpus: int = 1) -> FakeNvml:
        """Compile the library in `folder` and make `num_gpus` H100s beside it that draw 600 W uncapped."""
        return cls(compile_library(folder), folder / "fake-nvml-state", num_gpus)

    @staticmethod
    def _make_h100(gpu: FakeGpu, index: int) -> None:
        gpu.uuid = f"GPU-fa4e0000-0000-4000-8000-{index:012d}".encode()
        gpu.name = b"NVIDIA H100 80GB HBM3"
        gpu.min_mw, gpu.max_mw, gpu.limit_mw = 200_000, 700_000, 700_000
        gpu.natural_mw, gpu.idle_mw = 600_000, 72_000
        gpu.permission = gpu.energy_counter = gpu.instant_field = gpu.average_usage = 1
        # The library counts on CLOCK_MONOTONIC from here.
        gpu.energy_at_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    @property
    def delay_ms(self) -> int:
        """How long every call takes, ms."""
        return int(self._state.delay_ms)

    @delay_ms.setter
    def delay_ms(self, value: int) -> None:
        self._state.delay_ms = value

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment, from its start on, to find these GPUs."""
        folders = [str(self.library.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {"LD_LIBRARY_PATH": ":".join(folders), "FAKE_NVML_STATE": str(self.state_path)}
