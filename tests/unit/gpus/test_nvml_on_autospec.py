"""NvmlGpu against an autospec of pynvml: signatures are checked, and every error code can be had."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from unittest.mock import MagicMock, create_autospec

import pynvml
import pytest

import pals_ray.gpus.nvml as nvml_module
from pals_ray.gpus.gpu_protocol import (
    GpuDriverMissingError,
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuRangeError,
    GpuUnsupportedError,
)
from pals_ray.gpus.nvml import NvmlDriver, NvmlGpu


@pytest.fixture(scope="module")
def autospec() -> MagicMock:
    """Made once: pynvml is large. Numbers are the real ones."""
    fake = create_autospec(pynvml)
    fake.configure_mock(**{name: value for name, value in vars(pynvml).items() if isinstance(value, int)})
    return fake


@pytest.fixture
def nvml(autospec: MagicMock, monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """One A100 that answers: 100 to 400 W, 400 W ordered and in force, 250 W drawn."""
    fake = autospec
    fake.reset_mock(return_value=True, side_effect=True)
    fake.nvmlDeviceGetCount.return_value = 1
    fake.nvmlDeviceGetUUID.return_value = "GPU-a"
    fake.nvmlDeviceGetName.return_value = "NVIDIA A100-SXM4-80GB"
    fake.nvmlDeviceGetMigMode.return_value = [0, 0]
    fake.nvmlDeviceGetPowerManagementLimitConstraints.return_value = [100_000, 400_000]
    fake.nvmlDeviceGetPowerManagementLimit.return_value = 400_000
    fake.nvmlDeviceGetEnforcedPowerLimit.return_value = 400_000
    fake.nvmlDeviceGetPowerUsage.return_value = 250_000
    fake.nvmlDeviceGetTotalEnergyConsumption.return_value = 123_456
    fake.nvmlDeviceGetComputeRunningProcesses.return_value = [SimpleNamespace(pid=7)]
    monkeypatch.setattr(nvml_module, "pynvml", fake)
    return fake


@pytest.fixture
def gpu(nvml: MagicMock) -> NvmlGpu:
    return NvmlDriver().gpus()[0]


def instant_field(code: int, power_mw: int = 0) -> pynvml.c_nvmlFieldValue_t:
    return pynvml.c_nvmlFieldValue_t(nvmlReturn=code, value=pynvml.c_nvmlValue_t(uiVal=ctypes.c_uint(power_mw).value))


def test_orders_in_milliwatts_by_the_handle_of_the_uuid(nvml: MagicMock, gpu: NvmlGpu) -> None:
    gpu.set_limit_w(250.25)
    nvml.nvmlDeviceGetHandleByUUID.assert_called_once_with("GPU-a")
    handle = nvml.nvmlDeviceGetHandleByUUID.return_value
    nvml.nvmlDeviceSetPowerManagementLimit.assert_called_once_with(handle, 250_250)


def test_answers_with_the_limit_in_force_not_with_the_one_asked(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetEnforcedPowerLimit.return_value = 150_000
    assert gpu.set_limit_w(250.0) == 150.0


def test_an_order_outside_the_range_never_reaches_the_driver(nvml: MagicMock, gpu: NvmlGpu) -> None:
    with pytest.raises(GpuRangeError, match="100 to 400 W"):
        gpu.set_limit_w(99.0)
    nvml.nvmlDeviceSetPowerManagementLimit.assert_not_called()


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, GpuPermissionError),
        (pynvml.NVML_ERROR_INVALID_ARGUMENT, GpuRangeError),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, GpuUnsupportedError),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, GpuUnsupportedError),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuLostError),
        (pynvml.NVML_ERROR_RESET_REQUIRED, GpuLostError),
        (pynvml.NVML_ERROR_NOT_FOUND, GpuLostError),
        (pynvml.NVML_ERROR_UNINITIALIZED, GpuError),
        (pynvml.NVML_ERROR_TIMEOUT, GpuError),
        (pynvml.NVML_ERROR_UNKNOWN, GpuError),
    ],
)
def test_every_vendor_error_leaves_as_ours_with_the_cause(
    nvml: MagicMock, gpu: NvmlGpu, code: int, ours: type[GpuError]
) -> None:
    vendor_error = pynvml.NVMLError(code)
    nvml.nvmlDeviceSetPowerManagementLimit.side_effect = vendor_error
    with pytest.raises(GpuError) as caught:
        gpu.set_limit_w(300.0)
    assert type(caught.value) is ours
    assert caught.value.__cause__ is vendor_error
    assert "GPU-a" in str(caught.value)


@pytest.mark.parametrize("code", [c for c in pynvml.NVMLError._valClassMapping if c != pynvml.NVML_SUCCESS])
def test_no_vendor_error_gets_out_of_any_call(nvml: MagicMock, gpu: NvmlGpu, code: int) -> None:
    nvml.nvmlDeviceGetHandleByUUID.side_effect = pynvml.NVMLError(code)
    for call in (
        lambda: gpu.info,
        gpu.limit_w,
        gpu.ordered_limit_w,
        lambda: gpu.set_limit_w(300.0),
        gpu.may_set_limit,
        gpu.power_w,
        gpu.energy_j,
        gpu.cap_binding,
        gpu.state,
        gpu.process_ids,
    ):
        with pytest.raises(GpuError):
            call()


def test_power_prefers_the_instant_field(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetFieldValues.return_value = [instant_field(pynvml.NVML_SUCCESS, 199_500)]
    assert gpu.power_w() == 199.5
    assert nvml.nvmlDeviceGetFieldValues.call_args.args[1] == [186]
    nvml.nvmlDeviceGetPowerUsage.assert_not_called()


def test_a_part_without_the_instant_field_is_asked_for_it_once(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetFieldValues.return_value = [instant_field(pynvml.NVML_ERROR_NOT_SUPPORTED)]
    assert [gpu.power_w(), gpu.power_w()] == [250.0, 250.0]
    nvml.nvmlDeviceGetFieldValues.assert_called_once()


def test_a_driver_without_field_values_falls_back_too(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetFieldValues.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
    assert gpu.power_w() == 250.0


def test_a_lost_device_is_not_taken_for_a_missing_field(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetFieldValues.return_value = [instant_field(pynvml.NVML_ERROR_GPU_IS_LOST)]
    with pytest.raises(GpuLostError):
        gpu.power_w()
    nvml.nvmlDeviceGetFieldValues.return_value = [instant_field(pynvml.NVML_SUCCESS, 180_000)]
    assert gpu.power_w() == 180.0


@pytest.mark.parametrize(("reasons", "binding"), [(0x0, False), (0x1, False), (0x4, True), (0x5, True), (0x68, False)])
def test_only_reason_bit_0x4_means_that_the_cap_binds(
    nvml: MagicMock, gpu: NvmlGpu, reasons: int, binding: bool
) -> None:
    nvml.nvmlDeviceGetCurrentClocksEventReasons.return_value = reasons
    assert gpu.cap_binding() is binding


def test_parts_older_than_mig_are_whole_gpus(nvml: MagicMock, gpu: NvmlGpu) -> None:
    nvml.nvmlDeviceGetMigMode.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert gpu.info.max_limit_w == 400.0


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_no_driver_is_said_to_be_missing(nvml: MagicMock, code: int) -> None:
    nvml.nvmlInit.side_effect = pynvml.NVMLError(code)
    with pytest.raises(GpuDriverMissingError, match="No NVIDIA driver"):
        NvmlDriver()


def test_a_broken_driver_is_not_taken_for_a_missing_one(nvml: MagicMock) -> None:
    nvml.nvmlInit.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    with pytest.raises(GpuError, match="does not work") as caught:
        NvmlDriver()
    assert not isinstance(caught.value, GpuDriverMissingError)


def test_close_shuts_the_library_down_once(nvml: MagicMock) -> None:
    driver = NvmlDriver()
    driver.close()
    driver.close()
    nvml.nvmlShutdown.assert_called_once_with()
