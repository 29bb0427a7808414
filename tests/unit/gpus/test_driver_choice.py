"""Which driver a node gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pals_ray
from pals_ray.gpus.driver_choice import HardwareSpec, choose_kind
from pals_ray.gpus.gpu_protocol import GpuDriverMissingError, GpuError
from pals_ray.gpus.nvml import NvmlDriver
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.types import Provenance

from .fake_nvml import FakeNvml


def test_auto_is_nvml_where_it_shows_a_gpu(fake_nvml: FakeNvml) -> None:
    assert choose_kind("auto") == ("nvml", "NVML shows 2 GPUs")


def test_auto_is_virtual_where_nvml_shows_none(fake_nvml: FakeNvml) -> None:
    fake_nvml._state.num_gpus = 0
    kind, why = choose_kind("auto")
    assert kind == "virtual"
    assert "no GPU" in why


def test_auto_is_virtual_without_a_driver(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAKE_NVML_STATE")
    assert choose_kind("auto") == ("virtual", "this node has no NVIDIA driver")
    with pytest.raises(GpuDriverMissingError):
        HardwareSpec("nvml").open("any")


def test_auto_does_not_hide_a_broken_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: NvmlDriver) -> None:
        raise GpuError("version mismatch")

    monkeypatch.setattr(NvmlDriver, "__init__", broken)
    with pytest.raises(GpuError, match="version mismatch"):
        choose_kind("auto")


@pytest.mark.parametrize("asked", ["nvml", "virtual"])
def test_what_the_operator_says_is_not_questioned(asked: str) -> None:
    assert choose_kind(asked)[0] == asked


def test_opens_the_gpus_of_either_kind(fake_nvml: FakeNvml, node_key: str) -> None:
    real = HardwareSpec("nvml").open(node_key)
    virtual = HardwareSpec("virtual", "B200", 3).open(node_key)
    assert isinstance(real, NvmlDriver)
    assert isinstance(virtual, VirtualDriver)
    assert {gpu.info.provenance for gpu in real.gpus()} == {Provenance.MEASURED}
    assert [gpu.info.product for gpu in virtual.gpus()] == ["virtual B200"] * 3
    real.close()
    virtual.close()


def test_the_hardware_seam_stays_light_and_apart_from_ray_and_vllm() -> None:
    # The package's own __init__, which has the public face, is left out: this is about what the seam imports.
    code = (
        "import sys, types\n"
        "package = sys.modules['pals_ray'] = types.ModuleType('pals_ray')\n"
        f"package.__path__ = [{str(Path(pals_ray.__file__).parent)!r}]\n"
        "import pals_ray.gpus.driver_choice\n"
        "heavy = {'ray', 'vllm', 'torch', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "assert int(status['VmRSS'].split()[0]) < 60 * 1024, status['VmRSS']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
