"""NvmlGpu through nvidia-ml-py's real ctypes path, against fake_nvml.c."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pals_ray.gpus.gpu_protocol import (
    GpuDriverMissingError,
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuRangeError,
    GpuUnsupportedError,
)
from pals_ray.gpus.nvml import NvmlDriver, NvmlGpu
from pals_ray.types import Provenance

from .fake_nvml import FakeNvml

READ_AND_CAP = """
import json
from pals_ray.gpus.nvml import NvmlDriver
driver = NvmlDriver()
gpu = driver.gpus()[1]
print(json.dumps([gpu.uuid, gpu.info.product, gpu.set_limit_w(350.0), gpu.power_w()]))
"""


@pytest.fixture
def driver(fake_nvml: FakeNvml) -> Iterator[NvmlDriver]:
    driver = NvmlDriver()
    yield driver
    driver.close()


@pytest.fixture
def gpu(driver: NvmlDriver) -> NvmlGpu:
    return driver.gpus()[0]


def mean_power_bounds_w(gpu: NvmlGpu, at_least_j: float, deadline_s: float = 10.0) -> tuple[float, float]:
    """Mean draw while the counter grows by so much, by the clock inside and the clock outside of the two readings."""
    outer_s, start_j = time.monotonic(), gpu.energy_j()
    inner_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        grown_j = gpu.energy_j() - start_j
        if grown_j >= at_least_j:
            return grown_j / (time.monotonic() - outer_s), grown_j / (now_s - inner_s)
        assert now_s < inner_s + deadline_s, "the energy counter stands still"
        time.sleep(0.005)


def test_lists_every_gpu_by_uuid_with_its_range(driver: NvmlDriver, fake_nvml: FakeNvml) -> None:
    first, second = driver.gpus()
    assert (first.uuid, second.uuid) == tuple(g.uuid.decode() for g in fake_nvml.gpus)
    assert first.info.product == "NVIDIA H100 80GB HBM3"
    assert (first.info.min_limit_w, first.info.max_limit_w) == (200.0, 700.0)
    assert first.info.provenance is Provenance.MEASURED
    assert driver.gpu(second.uuid).info.uuid == second.uuid


def test_a_limit_is_read_back_and_outlives_the_driver_that_set_it(fake_nvml: FakeNvml) -> None:
    driver = NvmlDriver()
    assert driver.gpus()[0].set_limit_w(312.5) == 312.5
    driver.close()
    reopened = NvmlDriver()
    assert reopened.gpus()[0].limit_w() == 312.5
    assert reopened.gpus()[1].limit_w() == 700.0
    reopened.close()


@pytest.mark.parametrize("asked_w", [199.9, 700.1, -1.0, 0.0, math.nan, math.inf])
def test_a_limit_outside_the_range_is_refused_with_the_range_and_changes_nothing(gpu: NvmlGpu, asked_w: float) -> None:
    with pytest.raises(GpuRangeError, match="200 to 700 W"):
        gpu.set_limit_w(asked_w)
    assert gpu.limit_w() == 700.0


def test_a_range_that_the_device_has_narrowed_since_is_a_range_error_too(gpu: NvmlGpu, fake_nvml: FakeNvml) -> None:
    assert gpu.info.min_limit_w == 200.0
    fake_nvml.gpus[0].min_mw = 300_000
    with pytest.raises(GpuRangeError, match="set its power limit"):
        gpu.set_limit_w(250.0)


def test_without_permission_the_error_names_every_way_out(gpu: NvmlGpu, fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus[0].permission = 0
    with pytest.raises(GpuPermissionError) as caught:
        gpu.set_limit_w(300.0)
    for way_out in ("root", "CAP_SYS_ADMIN", "zeusd", "allow_unenforced: true"):
        assert way_out in str(caught.value)
    assert gpu.uuid in str(caught.value)
    assert type(caught.value.__cause__).__name__ == "NVMLError_NoPermission"
    assert gpu.limit_w() == 700.0


def test_trying_the_permission_changes_no_limit_even_under_an_out_of_band_one(
    gpu: NvmlGpu, fake_nvml: FakeNvml
) -> None:
    fake_nvml.gpus[0].out_of_band_mw = 400_000
    assert gpu.may_set_limit()
    assert (gpu.limit_w(), gpu.ordered_limit_w()) == (400.0, 700.0)
    fake_nvml.gpus[0].permission = 0
    assert not gpu.may_set_limit()


def test_the_limit_in_force_is_the_lower_of_in_band_and_out_of_band(gpu: NvmlGpu, fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus[0].out_of_band_mw = 400_000
    assert gpu.set_limit_w(600.0) == 400.0
    assert gpu.ordered_limit_w() == 600.0
    assert gpu.set_limit_w(300.0) == 300.0


def test_a_lost_device_says_so_on_every_call_and_the_others_go_on(driver: NvmlDriver, fake_nvml: FakeNvml) -> None:
    lost, other = driver.gpus()
    assert lost.info.max_limit_w == 700.0
    fake_nvml.gpus[0].lost = 1
    for call in (lost.limit_w, lost.power_w, lost.energy_j, lost.cap_binding, lost.process_ids, lost.state):
        with pytest.raises(GpuLostError, match=lost.uuid):
            call()
    with pytest.raises(GpuLostError):
        lost.set_limit_w(300.0)
    assert other.set_limit_w(300.0) == 300.0
    assert [gpu.uuid for gpu in driver.gpus()] == [other.uuid]


def test_an_unknown_uuid_is_a_lost_gpu(driver: NvmlDriver) -> None:
    with pytest.raises(GpuLostError, match="GPU-nowhere"):
        driver.gpu("GPU-nowhere")


def test_a_mig_slice_is_unsupported(driver: NvmlDriver) -> None:
    with pytest.raises(GpuUnsupportedError, match="slice has no power limit"):
        driver.gpu("MIG-4f2e8f6c-0000-4000-8000-000000000000")


def test_a_gpu_divided_into_slices_is_unsupported(driver: NvmlDriver, fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus[0].mig = 1
    with pytest.raises(GpuUnsupportedError, match="MIG"):
        driver.gpu(fake_nvml.gpus[0].uuid.decode())


def test_a_gpu_without_a_power_limit_is_unsupported_and_hides_no_other(driver: NvmlDriver, fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus[0].max_mw = 0
    without, other = driver.gpus()
    with pytest.raises(GpuUnsupportedError, match="range of its power limit"):
        _ = without.info
    assert other.info.max_limit_w == 700.0


def test_power_is_instantaneous_where_the_usage_reading_is_a_one_second_average(
    gpu: NvmlGpu, fake_nvml: FakeNvml
) -> None:
    gpu.set_limit_w(300.0)
    assert gpu.power_w() == 300.0
    fake_nvml.gpus[0].instant_field = 0
    lagging_w = gpu.power_w()
    assert 300.0 < lagging_w <= 600.0


def test_power_falls_back_to_the_usage_reading_on_parts_without_the_instant_field(
    gpu: NvmlGpu, fake_nvml: FakeNvml
) -> None:
    fake_nvml.gpus[0].instant_field = fake_nvml.gpus[0].average_usage = 0
    gpu.set_limit_w(300.0)
    assert gpu.power_w() == 300.0


@pytest.mark.parametrize(("limit_w", "drawn_w"), [(200.0, 200.0), (450.0, 450.0), (700.0, 600.0)])
def test_the_energy_counter_grows_as_fast_as_the_limit_lets_it(gpu: NvmlGpu, limit_w: float, drawn_w: float) -> None:
    gpu.set_limit_w(limit_w)
    least_w, most_w = mean_power_bounds_w(gpu, at_least_j=30.0)
    assert least_w - 0.1 <= drawn_w <= most_w + 0.1  # the counter is in whole mJ


def test_a_part_without_an_energy_counter_says_so(gpu: NvmlGpu, fake_nvml: FakeNvml) -> None:
    fake_nvml.gpus[0].energy_counter = 0
    with pytest.raises(GpuUnsupportedError, match="energy counter"):
        gpu.energy_j()
    with pytest.raises(GpuUnsupportedError, match="energy counter"):
        gpu.state()


def test_the_cap_binds_only_below_the_natural_draw(gpu: NvmlGpu) -> None:
    assert not gpu.cap_binding()
    gpu.set_limit_w(500.0)
    assert gpu.cap_binding()


def test_state_is_limit_draw_and_energy(gpu: NvmlGpu) -> None:
    gpu.set_limit_w(500.0)
    before_j = gpu.energy_j()
    state = gpu.state()
    assert (state.uuid, state.limit_w, state.power_w, state.floor_w) == (gpu.uuid, 500.0, 500.0, 0.0)
    assert state.energy_j >= before_j


def test_processes_are_listed_once_each_in_order(gpu: NvmlGpu, fake_nvml: FakeNvml) -> None:
    assert gpu.process_ids() == ()
    fake_nvml.gpus[0].pids[:3] = [4242, 17, 4242]
    fake_nvml.gpus[0].num_pids = 3
    assert gpu.process_ids() == (17, 4242)


def test_after_close_calls_say_that_nvml_is_not_open(fake_nvml: FakeNvml) -> None:
    driver = NvmlDriver()
    gpu = driver.gpus()[0]
    gpu.limit_w()
    driver.close()
    driver.close()
    with pytest.raises(GpuError, match="not open"):
        gpu.limit_w()


def test_slow_calls_on_several_gpus_overlap_in_threads(driver: NvmlDriver, fake_nvml: FakeNvml) -> None:
    gpus = driver.gpus()
    assert [gpu.info.max_limit_w for gpu in gpus] == [700.0, 700.0]
    fake_nvml.delay_ms = 300
    threads = [threading.Thread(target=gpu.set_limit_w, args=(300.0,)) for gpu in gpus]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.monotonic() - begin
    fake_nvml.delay_ms = 0
    assert [gpu.limit_w() for gpu in gpus] == [300.0, 300.0]
    assert 0.6 <= took_s < 1.2  # set and read back are 0.6 s on one GPU, 1.2 s one after another


def test_another_process_finds_the_library_by_its_path_and_shares_the_gpus(
    driver: NvmlDriver, fake_nvml: FakeNvml
) -> None:
    environment = {**os.environ, **fake_nvml.environment()}
    done = subprocess.run(
        [sys.executable, "-c", READ_AND_CAP], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == [driver.gpus()[1].uuid, "NVIDIA H100 80GB HBM3", 350.0, 350.0]
    assert driver.gpus()[1].limit_w() == 350.0


def test_a_library_without_a_kernel_driver_is_a_missing_driver(
    fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAKE_NVML_STATE")
    with pytest.raises(GpuDriverMissingError, match="hardware: virtual"):
        NvmlDriver()
