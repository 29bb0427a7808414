"""A paced rank's steps take what the modelled silicon would need, on a clock of the test's own."""

from types import SimpleNamespace
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.virtual.pacing import (
    PACING_VARIABLE,
    SHORT_PAUSE_S,
    PaceCounters,
    Pacer,
    PacingConfig,
    PacingError,
    step_work,
)
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.specs import Parallelism, find_model

DECODE = StepWork(decode_seqs=16, kv_tokens=16 * 500)
PREFILL = StepWork(prefill_tokens=2048, prefill_context_tokens=1024)
SCALE = 2.0


class Clock:
    """A clock that moves when somebody sleeps or computes, and lets a test act while they do."""

    def __init__(self):
        self.now_s = 1000.0
        self.at = []

    def __call__(self):
        return self.now_s

    def pass_(self, seconds):
        until_s = self.now_s + seconds
        while self.at and self.at[0][0] <= until_s:
            self.now_s, act = self.at.pop(0)
            act()
        self.now_s = until_s


class Rig:
    """Two virtual A100s and the pacer of rank 0, a Mixtral of tensor parallel 2."""

    def __init__(self, tmp_path):
        self.key = f"pacing{uuid4().hex[:8]}"
        self.clock = Clock()
        self.driver = VirtualDriver.open(self.key, "A100-SXM", 2, clock=self.clock)
        self.gpus = [self.driver.claim_lowest_free(), self.driver.claim_lowest_free()]
        self.physics = GroupPhysics(self.driver.spec, find_model("Mixtral-8x7B"), Parallelism(2))
        self.block = ControlBlock.create(tmp_path / "block")
        self.pacer = Pacer(
            self.physics, self.gpus, 0, SCALE, PaceCounters(self.block), clock=self.clock, sleep=self.clock.pass_
        )
        self.idle(10.0)

    def idle(self, seconds):
        self.clock.pass_(seconds)

    def step(self, work, compute_s=0.001):
        """Run one step; returns how long it took."""
        before_s = self.clock.now_s
        self.pacer.begin(work)
        self.clock.pass_(compute_s)
        self.pacer.end()
        return self.clock.now_s - before_s

    def set_caps(self, *caps_w):
        """Set the caps and let them settle."""
        for gpu, cap_w in zip(self.gpus, caps_w, strict=True):
            gpu.set_limit_w(cap_w)
        self.idle(10.0)

    def expected_s(self, work, *caps_w):
        return SCALE * self.physics.group_step(work, caps_w, [gpu.die for gpu in self.gpus]).duration_s


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    remove_block(rig.key)


@pytest.mark.parametrize("work", [DECODE, PREFILL])
@pytest.mark.parametrize("caps_w", [(400, 400), (150, 150), (400, 130), (130, 400)])
def test_a_step_takes_the_slowest_gpus_time_stretched(rig, work, caps_w):
    rig.set_caps(*caps_w)
    assert rig.step(work) == pytest.approx(rig.expected_s(work, *caps_w), rel=1e-9)


def test_both_ranks_keep_the_same_pace(rig):
    rig.set_caps(400, 130)
    other = Pacer(rig.physics, rig.gpus, 1, SCALE, clock=rig.clock, sleep=rig.clock.pass_)
    before_s = rig.clock.now_s
    other.begin(DECODE)
    other.end()
    assert rig.clock.now_s - before_s == pytest.approx(rig.expected_s(DECODE, 400, 130), rel=1e-9)


@pytest.mark.parametrize("work", [DECODE, PREFILL])
def test_a_cap_slows_a_step_only_below_its_natural_draw(rig, work):
    natural_w = max(rig.physics.natural_draw_w(work, gpu.die) for gpu in rig.gpus)
    uncapped_s = rig.step(work)
    rig.set_caps(*[min(natural_w * 1.1, 400)] * 2)
    assert rig.step(work) == pytest.approx(uncapped_s, rel=0.02)
    rig.set_caps(*[natural_w * 0.45] * 2)
    assert rig.step(work) > 1.2 * uncapped_s


def test_a_cap_lowered_within_a_step_slows_its_rest(rig):
    full_s, capped_s = rig.expected_s(PREFILL, 400, 400), rig.expected_s(PREFILL, 150, 150)
    half_s = full_s / 2

    def cut():
        for gpu in rig.gpus:
            gpu.set_limit_w(150)

    rig.clock.at.append((rig.clock.now_s + half_s, cut))
    took_s = rig.step(PREFILL)
    # 35 ms of settling and one look every 10 ms stand between this and an instant change: at most at full speed.
    head_start_s = 0.045 * (capped_s / full_s - 1.0)
    assert half_s + capped_s / 2 - head_start_s <= took_s <= half_s + capped_s / 2 + 0.01
    assert took_s > full_s + (capped_s - full_s) / 4


def test_the_draw_follows_a_cap_lowered_within_a_step(rig):
    draws_w = []
    start_s = rig.clock.now_s
    rig.clock.at.append((start_s + 0.1, lambda: [gpu.set_limit_w(150) for gpu in rig.gpus]))
    for offset_s in (0.09, 0.16):
        rig.clock.at.append((start_s + offset_s, lambda: draws_w.append(rig.gpus[0].power_w())))
    rig.step(PREFILL)
    assert draws_w[0] > 200
    assert draws_w[1] <= 150


def test_energy_is_power_times_the_stretched_time(rig):
    rig.set_caps(200, 200)
    step = rig.physics.group_step(DECODE, (200, 200), [gpu.die for gpu in rig.gpus])
    before_j = rig.gpus[0].energy_j()
    wall_s = sum(rig.step(DECODE) for _ in range(20))
    assert rig.gpus[0].energy_j() - before_j == pytest.approx(step.power_w[0] * wall_s, rel=1e-4)
    assert wall_s == pytest.approx(20 * SCALE * step.duration_s, rel=1e-9)


def test_a_gpu_rests_between_requests(rig):
    rig.step(DECODE)
    rig.idle(1.0)
    assert rig.gpus[0].power_w() == rig.driver.spec.idle_context_w


def test_the_engines_own_pause_between_steps_is_hidden(rig):
    step_s = rig.expected_s(DECODE, 400, 400)
    start_s = rig.clock.now_s
    for _ in range(10):
        rig.step(DECODE)
        rig.idle(0.003)
    assert rig.clock.now_s - 0.003 - start_s == pytest.approx(10 * step_s, rel=1e-9)
    telemetry = rig.block.telemetry()
    assert (telemetry.steps, telemetry.late_steps) == (10, 0)
    assert telemetry.modelled_s == pytest.approx(telemetry.wall_s)


def test_a_step_after_idling_takes_its_full_time(rig):
    rig.step(PREFILL)
    rig.idle(SHORT_PAUSE_S * 2)
    assert rig.step(PREFILL) == pytest.approx(rig.expected_s(PREFILL, 400, 400), rel=1e-9)
    assert rig.block.telemetry().modelled_s == pytest.approx(rig.block.telemetry().wall_s)


def test_a_step_computed_too_slowly_is_counted_late_and_its_delay_shown(rig):
    step_s = rig.expected_s(DECODE, 400, 400)
    rig.step(DECODE, compute_s=step_s + 0.2)
    telemetry = rig.block.telemetry()
    assert (telemetry.steps, telemetry.late_steps) == (1, 1)
    assert telemetry.modelled_s == pytest.approx(step_s)
    assert telemetry.wall_s == pytest.approx(step_s + 0.2)


def test_a_delay_is_caught_up_with_by_no_more_than_a_pause(rig):
    step_s = rig.expected_s(DECODE, 400, 400)
    rig.step(DECODE, compute_s=step_s + 0.2)
    assert rig.step(DECODE) == pytest.approx(step_s - SHORT_PAUSE_S)
    assert rig.step(DECODE) == pytest.approx(step_s)


@given(
    steps=st.lists(st.tuples(st.floats(0, 0.2), st.floats(0, 0.05), st.booleans()), min_size=1, max_size=15),
)
@settings(max_examples=40)
def test_modelled_time_never_exceeds_wall_time_and_energy_never_falls(tmp_path_factory, steps):
    rig = Rig(tmp_path_factory.mktemp("pacing"))
    try:
        start_s, energy_j = rig.clock.now_s, rig.gpus[0].energy_j()
        for compute_s, pause_s, low in steps:
            rig.gpus[0].set_limit_w(120 if low else 400)
            rig.step(DECODE, compute_s)
            rig.idle(pause_s)
            assert rig.gpus[0].energy_j() >= energy_j
            energy_j = rig.gpus[0].energy_j()
        telemetry = rig.block.telemetry()
        assert telemetry.modelled_s <= telemetry.wall_s + 1e-6
        assert telemetry.wall_s <= rig.clock.now_s - start_s + 1e-6
    finally:
        remove_block(rig.key)


def scheduler_output(new=(), cached=()):
    """`new`: (tokens, computed); `cached`: (tokens, computed, outputs)."""
    return SimpleNamespace(
        num_scheduled_tokens={f"n{i}": n[0] for i, n in enumerate(new)} | {f"c{i}": c[0] for i, c in enumerate(cached)},
        scheduled_new_reqs=[SimpleNamespace(req_id=f"n{i}", num_computed_tokens=n[1]) for i, n in enumerate(new)],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[f"c{i}" for i in range(len(cached))],
            num_computed_tokens=[c[1] for c in cached],
            num_output_tokens=[c[2] for c in cached],
        ),
    )


@pytest.mark.parametrize(
    ("output", "work"),
    [
        (scheduler_output(new=[(100, 0)]), StepWork(100, 50, 0, 0)),
        (scheduler_output(new=[(100, 400)]), StepWork(100, 450, 0, 0)),  # a prefix found in the cache
        (scheduler_output(cached=[(512, 512, 0)]), StepWork(512, 768, 0, 0)),  # the next chunk of a long prompt
        (scheduler_output(cached=[(1, 20, 5), (1, 30, 7)]), StepWork(0, 0, 2, 52)),
        (scheduler_output(cached=[(25, 0, 5)]), StepWork(25, 12.5, 0, 0)),  # recomputed after a preemption
        (scheduler_output(new=[(10, 0)], cached=[(1, 20, 5)]), StepWork(10, 5, 1, 21)),
    ],
)
def test_the_work_of_a_step_is_read_from_vllms_schedule(output, work):
    assert step_work(output) == work


def test_the_configuration_crosses_the_environment(monkeypatch):
    config = PacingConfig(node_key="node", stands_for="Qwen3-32B", time_scale=2)
    monkeypatch.setenv(PACING_VARIABLE, config.model_dump_json())
    assert PacingConfig.from_environment() == config


@pytest.mark.parametrize("text", [None, "{", '{"node_key": "n", "stands_for": "Qwen3-32B", "time_scale": 0.5}'])
def test_a_configuration_that_cannot_be_used_is_a_clear_error(monkeypatch, text):
    if text is None:
        monkeypatch.delenv(PACING_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(PACING_VARIABLE, text)
    with pytest.raises(PacingError, match=PACING_VARIABLE):
        PacingConfig.from_environment()
