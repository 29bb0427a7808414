import asyncio
import threading
import uuid

import pytest

from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.runtime.agent.gpu_access import DrawMeter, GpuAccess
from pals_ray.types import GpuState


@pytest.fixture
def gpus():
    key = f"test-{uuid.uuid4().hex[:12]}"
    yield VirtualDriver.open(key, "A100-SXM", 3).gpus()
    remove_block(key)


@pytest.fixture
async def devices(gpus):
    made = GpuAccess(VirtualDriver.attach(gpus[0].uuid.removeprefix("GPU-virtual-").removesuffix("-0")))
    yield made
    made.close()


def _limits_w(gpus):
    return {gpu.uuid: gpu.limit_w() for gpu in gpus}


async def test_a_group_comes_down_and_goes_up_to_one_cap(devices, gpus):
    for cap_w in (150.0, 300.0, 100.0, 400.0):
        assert await devices.set_group(_limits_w(gpus), cap_w) == {gpu.uuid: cap_w for gpu in gpus}
        assert set(_limits_w(gpus).values()) == {cap_w}
        assert devices.held_by is None


async def test_one_failed_order_is_tried_again_at_once(devices, gpus):
    gpus[1].failing_sets = 1
    assert await devices.set_group(_limits_w(gpus), 200) == {gpu.uuid: 200 for gpu in gpus}
    assert devices.errors == {}


@pytest.mark.parametrize("index", range(3))
async def test_a_gpu_that_cannot_rise_holds_its_group_and_goes_first_the_next_time(devices, gpus, index):
    await devices.set_group(_limits_w(gpus), 150)
    gpus[index].failing_sets = 1_000
    assert await devices.set_group(_limits_w(gpus), 300) == {gpu.uuid: 150 for gpu in gpus}
    assert devices.held_by == gpus[index].uuid
    assert "could not set its power limit" in devices.errors[gpus[index].uuid]
    await devices.limits_w(devices.errors)
    assert gpus[index].uuid in devices.errors, "a reading that worked hides an order that did not"
    others = [gpu for gpu in gpus if gpu is not gpus[index]]
    before = [gpu._cap.version() for gpu in others]
    assert await devices.set_group(_limits_w(gpus), 300) == {gpu.uuid: 150 for gpu in gpus}
    assert [gpu._cap.version() for gpu in others] == before, "the others rose and fell again"
    gpus[index].failing_sets = 0
    assert await devices.set_group(_limits_w(gpus), 300) == {gpu.uuid: 300 for gpu in gpus}
    assert (devices.errors, devices.held_by) == ({}, None)


async def test_a_cut_goes_on_for_the_others_where_one_order_fails(devices, gpus):
    gpus[0].failing_sets = 1_000
    assert list((await devices.set_group(_limits_w(gpus), 120)).values()) == [400, 120, 120]


async def test_a_lost_gpu_is_left_out_and_its_error_kept(devices, gpus):
    gpus[2].lost = True
    assert list(await devices.limits_w([gpu.uuid for gpu in gpus])) == [gpu.uuid for gpu in gpus[:2]]
    assert "does not answer" in devices.errors[gpus[2].uuid]
    assert [gpu.info.uuid for gpu in await devices.inventory()] == [gpu.uuid for gpu in gpus[:2]]
    gpus[2].lost = False
    assert len(await devices.sample([gpu.uuid for gpu in gpus])) == 3
    assert devices.errors == {}


async def test_an_order_under_way_is_waited_for_where_its_caller_is_cancelled(devices, gpus):
    gpus[0].call_delay_s = 0.2
    order = asyncio.create_task(devices.set_each({gpus[0].uuid: 300}))
    await asyncio.sleep(0.05)
    order.cancel()
    with pytest.raises(asyncio.CancelledError):
        await order
    gpus[0].call_delay_s = 0
    assert gpus[0].limit_w() == 300, "whoever goes on now sets another limit while this order is still to come"


async def test_slow_drivers_do_not_hold_up_the_event_loop(devices, gpus):
    for gpu in gpus:
        gpu.call_delay_s = 0.1
    beats = 0
    order = asyncio.create_task(devices.set_group(dict.fromkeys(_limits_w_fast(gpus), 400.0), 200))
    while not order.done():
        await asyncio.sleep(0.01)
        beats += 1
    for gpu in gpus:
        gpu.call_delay_s = 0
    assert beats > 10
    assert threading.active_count() < 30


def _limits_w_fast(gpus):
    return [gpu.uuid for gpu in gpus]


def test_the_draw_between_two_looks_is_that_of_the_energy_counter_not_of_the_instant():
    meter = DrawMeter()

    def look(now_s, energy_j, instant_w):
        return meter.look({"GPU-0": GpuState("GPU-0", 400.0, instant_w, energy_j)}, now_s)["GPU-0"]

    assert look(10.0, 5000.0, 80.0) == 80
    assert look(10.5, 5150.0, 80.0) == 300
    assert look(11.5, 5250.0, 390.0) == 100
    assert look(12.0, 3.0, 90.0) == 90, "the counter began anew"
    assert look(12.5, 53.0, 0.0) == 100
