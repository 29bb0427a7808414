"""Whatever telemetry, grants and clocks do, the controller's point stays where it must."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.control.replica.controller_state import ControllerState, Decision, Situation
from pals_ray.control.replica.operating_point import decide
from pals_ray.control.snapshot import Overhead
from pals_ray.types import Latency, ReplicaTelemetry, Slo, Target, Verdicts
from tests.support.builders import charge_terms

from .plant import Decode

MODEL = Decode()
LOW_W, HIGH_W, MAX_BATCH = 200.0, 700.0, 100

latency_s = st.none() | st.floats(1e-4, 100.0)
rates = st.floats(0.0, 1e5)
counts = st.integers(0, 2000)


def numbers_in(value):
    """Every number that a state holds; fails on anything that could grow."""
    if is_dataclass(value):
        return [n for f in fields(value) for n in numbers_in(getattr(value, f.name))]
    assert value is None or isinstance(value, int | float)
    return [] if value is None else [value]


class Controlled(RuleBasedStateMachine):
    """Time runs, jumps and goes back; loads, ceilings, pins, targets and models come and go."""

    def __init__(self):
        super().__init__()
        self.state = ControllerState()
        self.now_s = 1000.0
        self.ceiling_w = HIGH_W
        self.in_force_w = None
        self.pins = (None, None)
        self.target = Target()
        self.model = MODEL
        self.telemetry = ReplicaTelemetry()
        self.last: Decision | None = None
        self.asked: Situation | None = None

    @rule(
        running=counts,
        waiting=counts,
        rate=rates,
        power_w=st.floats(0, 800),
        binding=st.floats(0, 1),
        kv_use=st.floats(0, 1),
        ttft=latency_s,
        tpot=latency_s,
        arriving=st.floats(0.0, 1e4),
        output=st.floats(0.0, 1e4),
        good=counts,
        late=counts,
        beats=st.integers(1, 12),
    )
    def serve(self, running, waiting, rate, power_w, binding, kv_use, ttft, tpot, arriving, output, good, late, beats):
        self.telemetry = ReplicaTelemetry(
            running=running,
            waiting=waiting,
            kv_use=kv_use,
            throughput_tokens_per_s=rate,
            power_w=power_w,
            running_mean=running,
            arriving_per_s=arriving,
            output_tokens=output,
            verdicts=self.telemetry.verdicts + Verdicts(good=good, late_ttft=late),
            ttft=Latency(ttft, ttft),
            tpot=Latency(tpot, tpot),
            binding_share=binding,
        )
        for _ in range(beats):
            self.now_s += 0.5
            self.decide()

    @rule(ceiling_w=st.floats(LOW_W, HIGH_W))
    def granted(self, ceiling_w):
        self.ceiling_w = ceiling_w
        self.decide()

    @rule(cap=st.booleans(), batch=st.none() | st.integers(1, 200))
    def pinned(self, cap, batch):
        self.pins = (self.ceiling_w if cap else None, batch)
        self.decide()

    @rule(in_force_w=st.none() | st.floats(LOW_W, HIGH_W))
    def read_back(self, in_force_w):
        self.in_force_w = in_force_w
        self.decide()

    @rule(
        throughput=st.none() | st.floats(1.0, 1e5),
        ttft=latency_s,
        tpot=latency_s,
        itl=latency_s,
        attainment=st.floats(0.01, 0.9999),
        window_s=st.floats(10.0, 1e5),
    )
    def aim(self, throughput, ttft, tpot, itl, attainment, window_s):
        self.target = Target(Slo(ttft, tpot, attainment, window_s, itl), throughput)

    @rule()
    def engine_begins_anew(self):
        self.telemetry = replace(self.telemetry, verdicts=Verdicts())

    @rule(known=st.booleans())
    def learn(self, known):
        self.model = MODEL if known else None

    @rule(jump_s=st.floats(-2000.0, 1e6))
    def clock_jumps(self, jump_s):
        self.now_s += jump_s
        self.decide()

    def decide(self):
        self.asked = Situation(
            now_s=self.now_s,
            ceiling_w=self.ceiling_w,
            in_force_w=self.in_force_w,
            terms=charge_terms(overhead=Overhead(50.0, 0.1), min_limit_w=LOW_W, max_limit_w=HIGH_W),
            max_batch=MAX_BATCH,
            target=self.target,
            telemetry=self.telemetry,
            model=self.model,
            pin_cap_w=self.pins[0],
            pin_batch_limit=self.pins[1],
        )
        self.last = decide(self.state, self.asked)
        self.state = self.last.state

    @invariant()
    def the_point_is_inside_its_bounds(self):
        if self.last is not None:
            assert LOW_W <= self.last.point.cap_w <= self.asked.ceiling_w
            assert self.last.point.batch_limit in graph_sizes(MAX_BATCH)

    @invariant()
    def a_pin_is_obeyed(self):
        if self.last is not None and self.asked.pin_cap_w is not None:
            assert self.last.point.cap_w == self.asked.ceiling_w
        if self.last is not None and self.asked.pin_batch_limit is not None:
            assert self.last.point.batch_limit <= self.asked.pin_batch_limit

    @invariant()
    def every_decision_has_a_reason(self):
        assert self.last is None or self.last.reason.strip()

    @invariant()
    def the_state_is_of_fixed_size_and_finite(self):
        assert all(math.isfinite(n) for n in numbers_in(self.state))
        assert 0.5 <= self.state.need <= 2.0


Controlled.TestCase.settings = settings(max_examples=50, stateful_step_count=40)
TestControlled = Controlled.TestCase
