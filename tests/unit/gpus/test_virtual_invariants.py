"""What holds of a virtual GPU whatever is done to it, in whatever order."""

from __future__ import annotations

import math
import os
import uuid

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pals_ray.gpus.gpu_protocol import GpuError
from pals_ray.gpus.virtual import NoFreeGpuError, VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.models.specs import GPUS

from .conftest import Clock

WATTS = st.one_of(st.floats(-50.0, 1200.0), st.just(math.nan))


class OneVirtualGpu(RuleBasedStateMachine):
    """Orders, out-of-band limits, steps, claims, faults and time, on one GPU seen through two drivers."""

    @initialize(product=st.sampled_from(sorted(GPUS)))
    def open(self, product: str) -> None:
        self.key = f"test-{uuid.uuid4().hex[:12]}"
        self.clock = Clock()
        self.spec = GPUS[product]
        self.driver = VirtualDriver.open(self.key, product, 1, clock=self.clock)
        self.gpu = self.driver.gpus()[0]
        self.seen = VirtualDriver.attach(self.key, clock=self.clock).gpus()[0]
        self.ordered_w = self.spec.default_limit_w
        self.out_of_band_w = math.inf
        self.extremes_w = [self.spec.default_limit_w]
        self.last_energy_j = 0.0
        self.steps_j = 0.0

    def teardown(self) -> None:
        remove_block(self.key)

    @rule(dt_s=st.one_of(st.floats(0.0, 0.5), st.floats(0.0, 100.0)))
    def wait(self, dt_s: float) -> None:
        self.clock.now_s += dt_s

    @rule(limit_w=WATTS, permitted=st.booleans(), failing=st.booleans())
    def order(self, limit_w: float, permitted: bool, failing: bool) -> None:
        self.seen.permitted, self.seen.failing_sets = permitted, int(failing)
        try:
            self.gpu.set_limit_w(limit_w)
        except GpuError:
            in_range = self.spec.min_limit_w <= limit_w <= self.spec.max_limit_w
            assert not in_range or not permitted or failing
        else:
            assert permitted
            assert not failing
            self.ordered_w = round(limit_w * 1000) / 1000
            self.extremes_w.append(self.seen.limit_w())
        self.seen.failing_sets = 0

    @rule(limit_w=st.one_of(st.just(math.inf), st.floats(50.0, 1000.0)))
    def limit_out_of_band(self, limit_w: float) -> None:
        self.gpu.out_of_band_limit_w = self.out_of_band_w = limit_w
        self.extremes_w.append(self.seen.limit_w())

    @rule()
    def claim_or_release(self) -> None:
        try:
            self.driver.claim_lowest_free()
        except NoFreeGpuError:
            self.gpu.release()

    @rule(
        early_s=st.floats(-0.2, 0.2),
        duration_s=st.floats(0.0, 2.0),
        share=st.floats(0.0, 1.0),
    )
    def record(self, early_s: float, duration_s: float, share: float) -> None:
        if self.gpu.holder() is None:
            return
        start_s = self.clock.now_s - early_s
        power_w = self.spec.idle_context_w + share * (self.spec.max_limit_w - self.spec.idle_context_w)
        self.gpu.record_step(start_s, start_s + duration_s, power_w, binding=False)
        self.steps_j += 0.2 * self.spec.max_limit_w + duration_s * power_w

    @invariant()
    def the_limit_in_force_is_the_lower_of_the_two_and_was_asked_for(self) -> None:
        assert self.seen.ordered_limit_w() == self.ordered_w
        assert self.seen.limit_w() == min(self.ordered_w, self.out_of_band_w)
        assert self.spec.min_limit_w <= self.seen.ordered_limit_w() <= self.spec.max_limit_w

    @invariant()
    def the_cap_in_effect_is_between_limits_that_were_in_force_and_arrives(self) -> None:
        effective_w = self.seen.effective_cap_w(self.clock.now_s)
        assert min(self.extremes_w) - 1e-9 <= effective_w <= max(self.extremes_w) + 1e-9
        assert self.seen.effective_cap_w(self.clock.now_s + 1.0) == pytest.approx(self.seen.limit_w(), rel=1e-12)

    @invariant()
    def energy_never_falls_and_both_sides_read_the_same(self) -> None:
        # A new reader each time: one that has read before hides a counter that goes back a little.
        energy_j = VirtualDriver.attach(self.key, clock=self.clock).gpus()[0].energy_j()
        assert energy_j >= self.last_energy_j
        assert self.seen.energy_j() == energy_j
        self.last_energy_j = energy_j

    @invariant()
    def energy_is_at_least_bare_idle_and_at_most_idle_and_steps(self) -> None:
        elapsed_s = self.clock.now_s - 1000.0
        energy_j = self.seen.energy_j()
        assert energy_j >= elapsed_s * self.spec.idle_bare_w - 0.002
        assert energy_j <= (elapsed_s + 0.2) * self.spec.idle_context_w + self.steps_j + 0.002

    @invariant()
    def draw_is_within_what_the_part_can_draw(self) -> None:
        for power_w in (self.seen.power_w(), self.seen.power_usage_w()):
            assert self.spec.idle_bare_w - 1e-6 <= power_w
        assert self.seen.power_w() <= self.spec.max_limit_w

    @invariant()
    def the_holder_is_this_process_or_nobody(self) -> None:
        assert self.seen.process_ids() in ((), (os.getpid(),))


OneVirtualGpu.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestOneVirtualGpu = OneVirtualGpu.TestCase
