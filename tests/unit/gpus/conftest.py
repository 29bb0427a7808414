"""Fixtures of the hardware seam: a fake NVML library, compiled once, and virtual nodes."""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pals_ray.gpus.virtual_block import remove_block

from .fake_nvml import FakeNvml, compile_library


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled fake library."""
    return compile_library(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def fake_nvml(fake_nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Two fake H100s that pynvml in this process finds when it is initialised, by its own ctypes path."""
    # dlopen answers "libnvidia-ml.so.1" with a library of that soname that is loaded already.
    ctypes.CDLL(str(fake_nvml_library))
    fake = FakeNvml(fake_nvml_library, tmp_path / "state", num_gpus=2)
    monkeypatch.setenv("FAKE_NVML_STATE", str(fake.state_path))
    return fake


@pytest.fixture
def node_key() -> Iterator[str]:
    """A node key of its own, whose virtual GPUs are removed afterwards."""
    key = f"test-{uuid.uuid4().hex[:12]}"
    yield key
    remove_block(key)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()
