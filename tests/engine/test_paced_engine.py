"""Ranks on virtual GPUs run at the pace and energy of the modelled silicon, in a real tensor-parallel engine."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.specs import Parallelism, find_model

from .harness import wait_until

SCALE = 2.0
MARGIN = 0.06  # What lies between a modelled figure and one that two busy cores let through.


@pytest.fixture
def held(paced_engine):
    """The engine's two GPUs in rank order, back at their full limits."""
    gpus = [paced_engine.driver.gpu(uuid) for uuid in paced_engine.call_ranks("pals_gpu_uuid")]
    set_caps(gpus, 400, 400)
    return gpus


def set_caps(gpus, *caps_w):
    for gpu, cap_w in zip(gpus, caps_w, strict=True):
        gpu.set_limit_w(cap_w)
    wait_until(lambda: [gpu.effective_cap_w(time.monotonic()) for gpu in gpus] == list(caps_w), 5, "settled caps")


@dataclass(frozen=True)
class Window:
    """What was seen over some steps of steady decode."""

    step_s: float
    modelled_over_wall: float
    late_share: float
    energy_w: list[float]
    busy_share: float
    booked_over_drawn: list[float]


def decode_window(engine, gpus, steps=15, batch=12):
    """Let `batch` sequences decode, and look at `steps` steps from outside."""
    block = engine.block
    requests = [engine.generate(max_tokens=steps + 25) for _ in range(batch)]
    # All of them decode once each has given a token: prompts are over.
    wait_until(lambda: block.scheduler().running == batch, 20, "the batch runs")
    tokens = block.telemetry().generation_tokens
    wait_until(lambda: block.telemetry().generation_tokens >= tokens + 2 * batch, 20, "all decode")
    first, start_s, start_j = block.telemetry(), time.monotonic(), [gpu.energy_j() for gpu in gpus]
    samples = []
    while block.telemetry().steps < first.steps + steps:
        samples.append([(time.monotonic(), gpu.power_w(), gpu.energy_j()) for gpu in gpus])
        time.sleep(0.002)
    last, end_s, end_j = block.telemetry(), time.monotonic(), [gpu.energy_j() for gpu in gpus]
    for request in requests:
        request.result(120)
    count, wall_s = last.steps - first.steps, last.wall_s - first.wall_s
    return Window(
        step_s=wall_s / count,
        modelled_over_wall=(last.modelled_s - first.modelled_s) / wall_s,
        late_share=(last.late_steps - first.late_steps) / count,
        energy_w=[(b - a) / (end_s - start_s) for a, b in zip(start_j, end_j, strict=True)],
        busy_share=(last.modelled_s - first.modelled_s) / (end_s - start_s),
        booked_over_drawn=[booked_over_drawn(of_gpu) for of_gpu in np.swapaxes(samples, 0, 1)],
    )


def booked_over_drawn(samples):
    """The energy counter's rise over draw times time, median of neighbours of `samples`: (s, W, J) of one GPU.

    Neighbours count where both show the same draw: a rank that a busy host keeps waiting tells of its step late, and
    until then the step's draw is in the counter's next reading but was not shown.
    """
    first, last = samples[:-1], samples[1:]
    same = first[:, 1] == last[:, 1]
    assert same.sum() >= 50
    rise_j, drawn_j = last[:, 2] - first[:, 2], first[:, 1] * (last[:, 0] - first[:, 0])
    return np.median(rise_j[same] / drawn_j[same])


def group_physics(gpus):
    return GroupPhysics(gpus[0].spec, find_model("Mixtral-8x7B"), Parallelism(2))


def decode_work(batch, tokens=40):
    return StepWork(decode_seqs=batch, kv_tokens=batch * tokens)


def expected_s(gpus, *caps_w, batch=12):
    return SCALE * group_physics(gpus).group_step(decode_work(batch), caps_w, [gpu.die for gpu in gpus]).duration_s


def test_each_rank_holds_a_virtual_gpu_of_its_own(paced_engine, held):
    assert sorted(gpu.index for gpu in held) == [0, 1]
    holders = [gpu.holder() for gpu in paced_engine.driver.gpus()]
    assert len({holders[0], holders[1]}) == 2
    assert holders[2:] == [None, None]


def test_what_the_ranks_all_reduce_shares_has_no_name_left_to_leak(paced_engine):
    ranks = [gpu.holder().pid for gpu in paced_engine.driver.gpus()[:2]]
    mapped = [
        line for pid in ranks for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "-cpushm_" in line
    ]
    assert mapped
    assert all(line.endswith("(deleted)") for line in mapped)


def test_steps_keep_the_modelled_pace_and_hardly_any_is_late(paced_engine, held):
    window = decode_window(paced_engine, held, steps=60)
    assert window.step_s == pytest.approx(expected_s(held, 400, 400), rel=MARGIN)
    assert window.late_share <= 0.05
    assert window.modelled_over_wall >= 0.95


def test_both_ranks_step_at_the_slower_gpus_pace(paced_engine, held):
    both_full_s = decode_window(paced_engine, held).step_s
    slow_s = []
    for caps_w in ((120, 400), (400, 120)):
        set_caps(held, *caps_w)
        slow_s.append(decode_window(paced_engine, held).step_s)
        assert slow_s[-1] == pytest.approx(expected_s(held, *caps_w), rel=MARGIN)
    assert min(slow_s) > 1.2 * both_full_s


def test_a_lower_cap_lengthens_steps_and_lowers_the_draw_to_just_under_it(paced_engine, held):
    windows = []
    for cap_w in (400, 200, 150):
        set_caps(held, cap_w, cap_w)
        windows.append(decode_window(paced_engine, held))
    assert windows[0].step_s < windows[1].step_s < windows[2].step_s
    for window, cap_w in zip(windows[1:], (200, 150), strict=True):
        assert all(0.9 * cap_w < draw_w <= cap_w for draw_w in window.energy_w)


def test_at_the_lowest_cap_an_a100_keeps_it_and_its_steps_are_long(paced_engine, held):
    set_caps(held, 100, 100)
    window = decode_window(paced_engine, held, steps=5)
    assert window.step_s > 2 * expected_s(held, 150, 150)
    assert max(window.energy_w) <= 100
    expected_w = group_physics(held).group_step(decode_work(batch=12), (100, 100), [gpu.die for gpu in held]).power_w
    assert window.energy_w == pytest.approx(expected_w, rel=MARGIN)


def test_the_energy_booked_is_the_draw_times_wall_time(paced_engine, held):
    set_caps(held, 200, 200)
    window = decode_window(paced_engine, held, steps=40)
    assert window.booked_over_drawn == pytest.approx([1, 1], rel=0.01)
    # And over the whole window, with what lies between steps: modelled steps at their draw, and the rest at idle.
    step_w = group_physics(held).group_step(decode_work(batch=12), (200, 200), [gpu.die for gpu in held]).power_w
    idle_w = held[0].spec.idle_context_w
    mean_w = [window.busy_share * drawn_w + (1 - window.busy_share) * idle_w for drawn_w in step_w]
    assert window.energy_w == pytest.approx(mean_w, rel=0.03)


def test_gpus_rest_at_idle_while_nothing_is_asked(paced_engine, held):
    wait_until(lambda: paced_engine.block.scheduler().running == 0, 20, "an idle engine")
    idle = paced_engine.driver.spec
    wait_until(lambda: [gpu.power_w() for gpu in held] == [idle.idle_context_w] * 2, 5, "idle draw with a context")
    assert [gpu.power_w() for gpu in paced_engine.driver.gpus()[2:]] == [idle.idle_bare_w] * 2


def test_a_cap_cut_within_a_long_prefill_is_obeyed_at_once(paced_engine, held):
    gpu, block = held[0], paced_engine.block
    wait_until(lambda: block.scheduler().running == 0, 20, "an idle engine")
    requests = [paced_engine.generate(4, prompt=f"{i}" + "x" * 900) for i in range(10)]
    wait_until(lambda: gpu.power_w() > 250, 10, "a prefill's draw")
    set_at_s = time.monotonic()
    for each in held:
        each.set_limit_w(150)
    wait_until(lambda: gpu.power_w() <= 150, 5, "a draw within the cap")
    took_s = time.monotonic() - set_at_s
    for request in requests:
        request.result(60)
    # 35 ms until the device obeys, and a rank that looks every 10 ms.
    assert took_s < 0.1
