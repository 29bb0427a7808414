"""What a virtual GPU says and does, on a clock that the test sets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock

import pals_ray.gpus.virtual_block as virtual_block
from pals_ray.gpus.gpu_protocol import (
    GpuDriverMissingError,
    GpuError,
    GpuLostError,
    GpuPermissionError,
    GpuRangeError,
)
from pals_ray.gpus.virtual import NoFreeGpuError, VirtualDriver, VirtualGpu, effective_caps_w
from pals_ray.gpus.virtual_block import gpu_block_path, lock_path
from pals_ray.models.physics.cap_settling import settled_cap_w
from pals_ray.models.specs import GPUS, UnknownSpecError
from pals_ray.processes import identify
from pals_ray.types import Provenance

from .conftest import Clock


@pytest.fixture
def driver(node_key: str, clock: Clock) -> VirtualDriver:
    return VirtualDriver.open(node_key, "A100-SXM", 2, clock=clock)


@pytest.fixture
def gpu(driver: VirtualDriver) -> VirtualGpu:
    return driver.gpus()[0]


@pytest.fixture
def held(driver: VirtualDriver) -> VirtualGpu:
    return driver.claim_lowest_free()


# -- identity and life


@pytest.mark.parametrize("product", sorted(GPUS))
def test_every_type_has_the_limits_and_idle_draw_of_its_spec(node_key: str, product: str) -> None:
    gpu = VirtualDriver.open(node_key, product, 1).gpus()[0]
    spec = GPUS[product]
    assert (gpu.info.min_limit_w, gpu.info.max_limit_w) == (spec.min_limit_w, spec.max_limit_w)
    assert gpu.limit_w() == spec.default_limit_w
    assert gpu.power_w() == spec.idle_bare_w
    assert gpu.info.provenance is Provenance.MODELLED
    assert gpu.info.product == f"virtual {product}"


def test_uuids_are_those_of_key_and_place(driver: VirtualDriver, node_key: str) -> None:
    assert [gpu.uuid for gpu in driver.gpus()] == [f"GPU-virtual-{node_key}-0", f"GPU-virtual-{node_key}-1"]
    assert driver.gpu(f"GPU-virtual-{node_key}-1").index == 1
    with pytest.raises(GpuLostError, match="GPU-virtual-elsewhere"):
        driver.gpu("GPU-virtual-elsewhere")


def test_limit_and_energy_outlive_the_driver(driver: VirtualDriver, node_key: str, clock: Clock) -> None:
    driver.gpus()[1].set_limit_w(222.0)
    clock.now_s += 100.0
    driver.close()
    again = VirtualDriver.open(node_key, "A100-SXM", 2, clock=clock).gpus()[1]
    assert again.limit_w() == 222.0
    assert again.energy_j() == pytest.approx(100.0 * GPUS["A100-SXM"].idle_bare_w)


def test_a_closed_driver_no_longer_answers(driver: VirtualDriver, gpu: VirtualGpu) -> None:
    driver.close()
    with pytest.raises(GpuError, match="closed"):
        gpu.limit_w()


def test_other_gpus_under_the_same_key_are_refused_with_what_is_there(driver: VirtualDriver, node_key: str) -> None:
    with pytest.raises(GpuError, match="holds 2 A100-SXM"):
        VirtualDriver.open(node_key, "A100-SXM", 4)
    with pytest.raises(GpuError, match="holds 2 A100-SXM"):
        VirtualDriver.open(node_key, "H100-SXM", 2)


def test_attaching_needs_gpus_that_are_there(node_key: str) -> None:
    with pytest.raises(GpuDriverMissingError, match=node_key):
        VirtualDriver.attach(node_key)


@pytest.mark.parametrize("content", [b"", b"short", bytes(4096)])
def test_a_damaged_block_is_refused(node_key: str, content: bytes) -> None:
    gpu_block_path(node_key).write_bytes(content)
    with pytest.raises(GpuError, match="make clean"):
        VirtualDriver.attach(node_key)


def test_a_truncated_block_is_refused(driver: VirtualDriver, node_key: str) -> None:
    whole = gpu_block_path(node_key).read_bytes()
    gpu_block_path(node_key).unlink()
    gpu_block_path(node_key).write_bytes(whole[:-8])
    with pytest.raises(GpuError, match="damaged"):
        VirtualDriver.attach(node_key)


@pytest.mark.parametrize("key", ["", "../x", "a/b", "a b", "x" * 101])
def test_a_key_that_is_no_file_name_is_refused(key: str) -> None:
    with pytest.raises(GpuError, match="node key"):
        VirtualDriver.open(key, "A100-SXM", 1)


def test_an_unknown_product_and_an_empty_node_are_refused(node_key: str) -> None:
    with pytest.raises(UnknownSpecError, match="B200"):
        VirtualDriver.open(node_key, "TPU", 1)
    with pytest.raises(GpuError, match="at least 1"):
        VirtualDriver.open(node_key, "B200", 0)
    assert not gpu_block_path(node_key).exists()


def test_a_lock_that_is_never_free_is_an_error_with_the_file(
    gpu: VirtualGpu, node_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_block, "_LOCK_TIMEOUT_S", 0.05)
    with FileLock(lock_path(node_key)), pytest.raises(GpuError, match="fuser"):
        gpu.set_limit_w(200.0)
    assert gpu.set_limit_w(200.0) == 200.0


# -- limits


@pytest.mark.parametrize("asked_w", [99.9, 400.1, -5.0, math.nan, math.inf])
def test_a_limit_outside_the_range_is_refused_and_changes_nothing(gpu: VirtualGpu, asked_w: float) -> None:
    with pytest.raises(GpuRangeError, match="100 to 400 W"):
        gpu.set_limit_w(asked_w)
    assert gpu.limit_w() == 400.0


def test_without_permission_nothing_is_set_and_the_error_names_the_ways_out(gpu: VirtualGpu) -> None:
    gpu.permitted = False
    assert not gpu.may_set_limit()
    with pytest.raises(GpuPermissionError, match="allow_unenforced"):
        gpu.set_limit_w(200.0)
    assert gpu.limit_w() == 400.0
    gpu.permitted = True
    assert gpu.may_set_limit()
    assert gpu.set_limit_w(200.0) == 200.0


def test_an_out_of_band_limit_holds_below_the_ordered_one(gpu: VirtualGpu, clock: Clock) -> None:
    gpu.out_of_band_limit_w = 180.0
    assert gpu.set_limit_w(300.0) == 180.0
    assert gpu.ordered_limit_w() == 300.0
    assert gpu.set_limit_w(150.0) == 150.0
    gpu.out_of_band_limit_w = math.inf
    gpu.set_limit_w(300.0)
    clock.now_s += 10.0
    assert gpu.limit_w() == gpu.effective_cap_w(clock.now_s) == 300.0


def test_trying_the_permission_disturbs_neither_limit_nor_settling(gpu: VirtualGpu, clock: Clock) -> None:
    gpu.set_limit_w(200.0)
    clock.now_s += 0.01
    assert gpu.may_set_limit()
    assert (gpu.limit_w(), gpu.ordered_limit_w()) == (200.0, 200.0)
    assert gpu.effective_cap_w(clock.now_s + 0.01) == pytest.approx(settled_cap_w(400.0, 200.0, 0.02))
    assert 200.0 < settled_cap_w(400.0, 200.0, 0.02) < 400.0


def test_the_cap_settles_as_the_physics_says(gpu: VirtualGpu, clock: Clock) -> None:
    for start_w, ordered_w in ((400.0, 150.0), (150.0, 350.0)):
        gpu.set_limit_w(ordered_w)
        for since_s in (0.0, 0.01, 0.03, 0.12, 0.33, 1.0):
            expected_w = settled_cap_w(start_w, ordered_w, since_s)
            assert gpu.effective_cap_w(clock.now_s + since_s) == pytest.approx(expected_w)
        clock.now_s += 5.0


def test_an_order_on_the_way_starts_from_where_the_cap_is(gpu: VirtualGpu, clock: Clock) -> None:
    gpu.set_limit_w(100.0)
    clock.now_s += 5.0
    gpu.set_limit_w(400.0)
    clock.now_s += 0.2
    on_the_way_w = gpu.effective_cap_w(clock.now_s)
    gpu.set_limit_w(120.0)
    assert 120.0 < on_the_way_w < 400.0
    assert gpu.effective_cap_w(clock.now_s) == pytest.approx(on_the_way_w)
    assert gpu.effective_cap_w(clock.now_s + 1.0) == 120.0


def test_the_caps_of_a_group_come_in_its_order(driver: VirtualDriver, clock: Clock) -> None:
    first, second = driver.gpus()
    second.set_limit_w(200.0)
    assert effective_caps_w([second, first], clock.now_s + 1.0) == [200.0, 400.0]


def test_failing_orders_fail_as_often_as_told_and_change_nothing(gpu: VirtualGpu) -> None:
    gpu.failing_sets = 2
    for _ in range(2):
        with pytest.raises(GpuError, match="could not set"):
            gpu.set_limit_w(200.0)
        assert gpu.limit_w() == 400.0
    assert gpu.set_limit_w(200.0) == 200.0


def test_a_lost_gpu_answers_nothing_and_the_others_go_on(driver: VirtualDriver) -> None:
    lost, other = driver.gpus()
    lost.lost = True
    for call in (lost.limit_w, lost.power_w, lost.energy_j, lost.cap_binding, lost.process_ids, lost.may_set_limit):
        with pytest.raises(GpuLostError, match=lost.uuid):
            call()
    with pytest.raises(GpuLostError):
        lost.set_limit_w(200.0)
    assert other.set_limit_w(200.0) == 200.0
    lost.lost = False
    assert lost.limit_w() == 400.0


def test_every_call_takes_the_delay_told_and_the_workers_side_takes_none(
    driver: VirtualDriver, held: VirtualGpu
) -> None:
    held.call_delay_s = 0.05
    for call, calls in ((held.limit_w, 1), (held.energy_j, 1), (held.state, 3), (lambda: held.set_limit_w(200.0), 2)):
        begin_s = time.monotonic()
        call()
        assert time.monotonic() - begin_s >= calls * 0.05
    held.call_delay_s = 1.0
    begin_s = time.monotonic()
    held.record_step(begin_s, begin_s + 1.0, 300.0, binding=False)
    held.effective_cap_w(begin_s)
    assert time.monotonic() - begin_s < 1.0


# -- claims


def test_ranks_take_the_lowest_free_gpu_until_none_is_left(driver: VirtualDriver) -> None:
    assert [driver.claim_lowest_free().index for _ in range(2)] == [0, 1]
    with pytest.raises(NoFreeGpuError, match=str(os.getpid())):
        driver.claim_lowest_free()
    driver.gpus()[0].release()
    assert driver.claim_lowest_free().index == 0


def test_a_holder_is_a_process_on_the_gpu(driver: VirtualDriver, held: VirtualGpu) -> None:
    assert held.holder() == identify()
    assert held.process_ids() == (os.getpid(),)
    assert driver.gpus()[1].process_ids() == ()
    held.release()
    assert held.process_ids() == ()


def test_a_lost_gpu_is_not_given_out(driver: VirtualDriver) -> None:
    driver.gpus()[0].lost = True
    assert driver.claim_lowest_free().index == 1


def test_the_claim_of_a_dead_process_is_free(driver: VirtualDriver) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        held = driver.claim_lowest_free(process.pid)
        assert held.process_ids() == (process.pid,)
    assert held.process_ids() == ()
    assert driver.claim_lowest_free().index == held.index


def test_a_pid_in_use_again_does_not_keep_the_claim(driver: VirtualDriver) -> None:
    held = driver.claim_lowest_free()
    held._claim.write((os.getpid(), identify().start_ticks - 1))  # an earlier process of the same pid
    assert held.holder() is None


def test_only_the_holder_releases(driver: VirtualDriver, held: VirtualGpu) -> None:
    held.release(os.getppid())
    assert held.holder() == identify()


def test_a_dead_process_cannot_claim(driver: VirtualDriver) -> None:
    with pytest.raises(GpuError, match="is gone"):
        driver.claim_lowest_free(2**22 + 1)


# -- draw and energy


def test_a_context_draws_more_than_a_bare_gpu_until_it_is_released(gpu: VirtualGpu, driver: VirtualDriver) -> None:
    spec = GPUS["A100-SXM"]
    assert gpu.power_w() == spec.idle_bare_w
    driver.claim_lowest_free()
    assert gpu.power_w() == spec.idle_context_w
    gpu.release()
    assert gpu.power_w() == spec.idle_bare_w


def test_draw_is_the_steps_while_it_runs_and_idle_after_it(held: VirtualGpu, clock: Clock) -> None:
    start_s = clock.now_s
    held.record_step(start_s, start_s + 0.1, 310.0, binding=True)
    assert (held.power_w(), held.cap_binding()) == (310.0, True)
    clock.now_s = start_s + 0.11
    assert (held.power_w(), held.cap_binding()) == (GPUS["A100-SXM"].idle_context_w, False)


def test_a_step_whose_cap_does_not_bind_says_so(held: VirtualGpu, clock: Clock) -> None:
    held.record_step(clock.now_s, clock.now_s + 0.1, 310.0, binding=False)
    assert not held.cap_binding()


def test_energy_is_the_sum_of_steps_and_gaps_in_whole_millijoules(held: VirtualGpu, clock: Clock) -> None:
    begin_j = held.energy_j()
    start_s = clock.now_s
    for k in range(10):
        clock.now_s = start_s + k * 0.050
        held.record_step(clock.now_s, clock.now_s + 0.048, 300.0, binding=False)
    clock.now_s = start_s + 0.5
    expected_j = 10 * (0.048 * 300.0 + 0.002 * GPUS["A100-SXM"].idle_context_w)
    assert held.energy_j() - begin_j == pytest.approx(expected_j, abs=0.002)
    assert held.energy_j() * 1000 == pytest.approx(round(held.energy_j() * 1000), abs=1e-6)


def test_energy_is_continuous_through_a_step_booked_ahead(held: VirtualGpu, clock: Clock) -> None:
    start_s, start_j = clock.now_s, held.energy_j()
    held.record_step(start_s, start_s + 1.0, 300.0, binding=False)
    assert held.energy_j() == pytest.approx(start_j, abs=0.002)
    clock.now_s = start_s + 0.5
    assert held.energy_j() == pytest.approx(start_j + 150.0, abs=0.002)


def test_a_step_booked_late_is_counted_whole(held: VirtualGpu, clock: Clock) -> None:
    start_s, start_j = clock.now_s, held.energy_j()
    clock.now_s = start_s + 1.0
    held.record_step(start_s, start_s + 1.0, 300.0, binding=False)
    assert held.energy_j() - start_j == pytest.approx(300.0, abs=0.002)


def test_a_process_that_does_not_hold_the_gpu_cannot_book(driver: VirtualDriver, gpu: VirtualGpu) -> None:
    with pytest.raises(GpuError, match="does not hold"):
        gpu.record_step(0.0, 1.0, 300.0, binding=False)
    driver.claim_lowest_free(os.getppid())
    with pytest.raises(GpuError, match="does not hold"):
        gpu.record_step(0.0, 1.0, 300.0, binding=False)


def test_newer_parts_report_a_mean_over_one_second_as_their_usage(node_key: str, clock: Clock) -> None:
    driver = VirtualDriver.open(node_key, "H100-SXM", 1, clock=clock)
    gpu = driver.claim_lowest_free()
    idle_w = gpu.spec.idle_context_w
    clock.now_s += 5.0
    gpu.record_step(clock.now_s, clock.now_s + 10.0, 600.0, binding=False)
    assert gpu.power_w() == 600.0
    assert gpu.power_usage_w() == pytest.approx(idle_w)
    clock.now_s += 0.25
    assert gpu.power_usage_w() == pytest.approx(0.25 * 600.0 + 0.75 * idle_w)
    clock.now_s += 1.0
    assert gpu.power_usage_w() == pytest.approx(600.0)


def test_the_one_second_mean_spans_many_short_steps(node_key: str, clock: Clock) -> None:
    driver = VirtualDriver.open(node_key, "H100-SXM", 1, clock=clock)
    gpu = driver.claim_lowest_free()
    for k in range(2000):
        gpu.record_step(clock.now_s, clock.now_s + 0.003, 300.0 if k < 1500 else 600.0, binding=False)
        clock.now_s += 0.003
    assert gpu.power_usage_w() == pytest.approx(600.0, rel=0.01)
    gpu.record_step(clock.now_s, clock.now_s + 0.5, 300.0, binding=False)
    clock.now_s += 0.5
    assert gpu.power_usage_w() == pytest.approx(450.0, rel=0.01)


def test_older_parts_report_the_draw_of_the_instant_as_their_usage(held: VirtualGpu, clock: Clock) -> None:
    held.record_step(clock.now_s, clock.now_s + 1.0, 300.0, binding=False)
    assert held.power_usage_w() == 300.0


def test_a_b200_with_a_context_cannot_be_capped_down_to_its_lowest_limit(node_key: str) -> None:
    driver = VirtualDriver.open(node_key, "B200", 1)
    assert driver.gpus()[0].state().floor_w == 0.0
    gpu = driver.claim_lowest_free()
    assert gpu.state().floor_w == gpu.power_w() > gpu.info.min_limit_w
    gpu.release()
    assert gpu.state().floor_w == 0.0


def test_a_context_at_rest_draws_less_than_an_a100s_lowest_limit(held: VirtualGpu) -> None:
    assert held.state().floor_w == 0.0


def test_dies_differ_by_a_few_per_cent_and_stay_the_same(node_key: str) -> None:
    dies = np.array([gpu.die for gpu in VirtualDriver.open(node_key, "A100-SXM", 8).gpus()])
    assert len(set(dies)) == 8
    assert np.all(np.abs(dies - 1.0) <= 0.05)
    assert [gpu.die for gpu in VirtualDriver.attach(node_key).gpus()] == dies.tolist()
