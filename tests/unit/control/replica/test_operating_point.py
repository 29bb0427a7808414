"""The replica's controller, mostly in a closed loop with the silicon's physics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pals_ray.control.replica.batch_choice import graph_sizes, snap
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Gains, PidState, Situation
from pals_ray.control.replica.demand import DemandState
from pals_ray.control.replica.operating_point import decide
from pals_ray.control.replica.throughput_feedback import pid_step
from pals_ray.types import OperatingPoint, ReplicaTelemetry, Slo, Target
from tests.support.builders import charge_terms

from .plant import Decode, make_loop

TERMS = charge_terms()
OUTPUT = 20.0


def situation(**changes):
    plain = Situation(
        now_s=100.0,
        ceiling_w=400.0,
        in_force_w=None,
        terms=TERMS,
        max_batch=64,
        target=Target(),
        telemetry=ReplicaTelemetry(),
        model=Decode(),
    )
    return replace(plain, **changes)


def serving(running, waiting=0, throughput=0.0, power_w=390.0, binding=1.0, **more):
    """A replica at work, to which as much comes as it serves unless said otherwise."""
    return ReplicaTelemetry(
        running=running,
        waiting=waiting,
        running_mean=running,
        throughput_tokens_per_s=throughput,
        output_tokens=OUTPUT,
        power_w=power_w,
        binding_share=binding,
        **({"arriving_per_s": throughput / OUTPUT, "arriving_long_per_s": throughput / OUTPUT} | more),
    )


def demand(tokens_per_s):
    return DemandState(tokens_per_s / OUTPUT, seen_s=1000.0)


def watched(tokens_per_s):
    """A controller that knows its demand and has not chosen yet."""
    return ControllerState(demand=demand(tokens_per_s))


def at(cap_w, batch_limit=64, **changes):
    return ControllerState(point=OperatingPoint(cap_w, batch_limit), last_s=99.5, **changes)


def caps(decisions):
    return [d.point.cap_w for d in decisions]


def slo(**limits):
    return Target(slo=Slo(**limits))


# -- one decision ------------------------------------------------------------------------------------------------------


def test_without_a_model_it_takes_all_that_the_grant_allows():
    decision = decide(ControllerState(), situation(model=None, ceiling_w=313.0))
    assert decision.point == OperatingPoint(313.0, 64)
    assert decision.state.expected is None
    assert "no model" in decision.reason


def test_without_demand_it_rests_at_the_lowest_cap_and_the_full_batch():
    decision = decide(ControllerState(), situation())
    assert decision.point == OperatingPoint(100.0, 64)
    assert "lowest cap" in decision.reason
    assert "no demand" in decision.reason


def test_a_grant_may_pin_cap_and_batch():
    decision = decide(at(150.0), situation(pin_cap_w=260.0, ceiling_w=260.0, pin_batch_limit=27))
    assert decision.point == OperatingPoint(260.0, 24)


def test_a_ceiling_below_the_cap_is_obeyed_at_once_whatever_dwell_says_and_the_batch_follows():
    limited = slo(tpot_s=0.25)
    busy = serving(running=60, throughput=200.0)
    state = at(390.0, cap_changed_s=99.9, batch_changed_s=90.0, demand=demand(200.0))
    first = decide(state, situation(ceiling_w=150.0, target=limited, telemetry=busy))
    assert first.point == OperatingPoint(150.0, 64)
    second = decide(first.state, situation(now_s=101.5, ceiling_w=150.0, target=limited, telemetry=busy))
    assert second.point.cap_w == 150.0
    assert second.point.batch_limit < 64


def test_after_a_cut_the_cap_comes_back_only_when_the_batch_has_drained():
    state = at(150.0, 16, ceiling_cut_s=98.0, demand=demand(200.0))
    still = decide(state, situation(telemetry=serving(running=40, throughput=200.0, power_w=150.0)))
    assert still.point.cap_w == 150.0
    assert "drained" in still.reason
    drained = decide(state, situation(telemetry=serving(running=16, throughput=200.0, power_w=150.0)))
    assert drained.point.cap_w > 150.0


def test_dwell_and_slew_bound_a_voluntary_move():
    config = ControllerConfig()
    low = serving(running=20, throughput=110.0)
    dwelling = decide(at(390.0, cap_changed_s=98.0, demand=demand(110.0)), situation(telemetry=low), config)
    assert dwelling.point.cap_w == 390.0
    moved = decide(at(390.0, cap_changed_s=96.0, demand=demand(110.0)), situation(telemetry=low), config)
    assert 390.0 - config.cut_slew_per_s * 4.0 * 300.0 <= moved.point.cap_w < 390.0


def test_a_cap_that_does_not_bind_is_not_raised():
    wanting = at(200.0, demand=demand(210.0))
    idle = serving(running=10, throughput=210.0, power_w=120.0, binding=0.0)
    held = decide(wanting, situation(telemetry=idle))
    assert held.point.cap_w == 200.0
    assert "does not bind" in held.reason
    bound = decide(wanting, situation(telemetry=replace(idle, power_w=199.0, binding_share=1.0)))
    assert bound.point.cap_w > 200.0


def test_the_batch_limit_is_as_large_as_tpot_and_itl_allow_at_the_cap():
    busy = serving(running=20, throughput=120.0)
    assert decide(watched(120.0), situation(telemetry=busy)).point.batch_limit == 64
    assert decide(watched(120.0), situation(telemetry=busy, target=slo(tpot_s=0.25))).point.batch_limit == 64
    much = at(400.0, demand=demand(600.0))
    assert decide(much, situation(telemetry=busy, target=slo(tpot_s=0.25))).point.batch_limit < 64
    assert decide(watched(120.0), situation(telemetry=busy, target=slo(itl_p99_s=0.25))).point.batch_limit < 64
    lost = decide(watched(120.0), situation(telemetry=busy, target=slo(tpot_s=0.01)))
    assert lost.point.batch_limit == 64, "nobody keeps it: then as many as can be served"


def test_of_the_points_that_attain_what_is_asked_it_takes_the_least_watts():
    busy = serving(running=12, throughput=80.0)
    strict = decide(watched(80.0), situation(telemetry=busy, target=slo(ttft_s=0.3, tpot_s=0.2))).state.expected
    loose = decide(watched(80.0), situation(telemetry=busy, target=slo(ttft_s=5.0, tpot_s=2.0))).state.expected
    assert strict.attainment >= 0.99
    assert loose.attainment >= 0.99
    assert loose.node_w < strict.node_w


def test_where_none_attains_it_takes_the_most_good_tokens():
    flood = serving(running=64, waiting=30, throughput=200.0, arriving_per_s=20.0, arriving_long_per_s=20.0)
    decision = decide(watched(400.0), situation(telemetry=flood, target=slo(ttft_s=2.0, tpot_s=1.0)))
    assert decision.point.cap_w > 300.0
    assert not decision.state.servable


def test_a_ttft_that_a_cap_seldom_slows_raises_it_all_the_same():
    sparse = serving(running=1, throughput=20.0, power_w=90.0, binding=0.01)
    decision = decide(at(150.0, demand=demand(20.0)), situation(target=slo(ttft_s=0.1), telemetry=sparse))
    assert decision.point.cap_w > 150.0


def test_requests_that_wait_longer_than_their_ttft_allows_raise_the_cap_at_once():
    queue = serving(running=16, waiting=18, throughput=60.0)
    calm = at(150.0, demand=demand(60.0), queue_since_s=99.0)
    target = slo(ttft_s=4.0, tpot_s=1.0)
    assert decide(calm, situation(target=target, telemetry=queue)).point.cap_w > 150.0
    none = replace(queue, waiting=0)
    assert decide(calm, situation(target=target, telemetry=none)).point.cap_w <= 150.0


def test_between_sparse_requests_the_cap_waits_for_the_next_prompt_and_in_silence_it_rests():
    state = at(200.0, demand=demand(50.0))
    found = []
    for beat in range(1400):
        nothing = serving(0, arriving_per_s=0.0, arriving_long_per_s=0.0, binding=0.0)
        decision = decide(state, situation(now_s=100 + beat / 2, target=slo(ttft_s=0.15), telemetry=nothing))
        state = decision.state
        found.append(decision.point.cap_w)
    assert min(found[:60]) >= 20 / 0.15
    assert found[-1] == 100.0


def test_a_burst_on_a_resting_replica_is_served_as_fast_as_the_grant_allows_until_its_demand_is_known():
    burst = replace(serving(running=40, power_w=100.0, arriving_per_s=8.0), output_tokens=0.0)
    decision = decide(at(100.0, cap_changed_s=90.0), situation(telemetry=burst))
    assert decision.point.cap_w == 400.0


def test_the_batch_limit_stops_where_the_curve_falls():
    decision = decide(watched(100.0), situation(model=Decode(falls_from=32), telemetry=serving(32, 9, 100.0)))
    assert decision.point.batch_limit == 32


def test_a_full_kv_cache_lowers_the_batch_limit_and_room_gives_it_back():
    full = serving(running=50, waiting=5, throughput=200.0, kv_use=0.99)
    pressed = decide(at(400.0, demand=demand(200.0)), situation(telemetry=full))
    assert pressed.point.batch_limit == 40
    room = replace(full, running=30, waiting=0, kv_use=0.5)
    state, limits = pressed.state, []
    for beat in range(200):
        decision = decide(state, situation(now_s=100.5 + beat / 2, telemetry=room))
        state = decision.state
        limits.append(decision.point.batch_limit)
    assert limits[-1] == 64
    assert limits == sorted(limits)


def test_a_decision_remembers_what_it_expects_until_the_next_one():
    first = decide(watched(90.0), situation(telemetry=serving(10, 0, 90.0)))
    assert first.state.expected.demand_tokens_per_s == pytest.approx(90.0, rel=0.1)
    second = decide(first.state, situation(now_s=100.5, telemetry=serving(12, 0, 95.0, power_w=130.0)))
    assert second.state.expected is not first.state.expected


def test_a_decision_asks_the_model_twice_at_most_and_for_few_points():
    class Counted:
        asked = 0

        def predict(self, cap_w, batch):
            self.asked += 1
            answer = Decode().predict(cap_w, batch)
            assert answer.power_w.size < 5000
            return answer

    model, state = Counted(), watched(200.0)
    for beat in range(30):
        model.asked = 0
        seen = situation(now_s=beat / 2, model=model, max_batch=512, telemetry=serving(40, 3, 200.0))
        state = decide(state, seen).state
        assert 1 <= model.asked <= 2


# -- in a closed loop with the physics ---------------------------------------------------------------------------------


def test_far_below_capacity_it_settles_at_the_lowest_watts_that_serve():
    loop = make_loop()
    loop.offer(300.0, 110)
    decisions = loop.run(110)
    assert max(caps(decisions[160:])) <= 230.0, (
        "the lowest, or a little more so that no step is slower than at full load"
    )
    assert {d.point.batch_limit for d in decisions} == {128}
    assert loop.window.summary().waiting == 0


@pytest.mark.parametrize(("spec", "tensor", "low_w"), [("Qwen3-32B", 1, 150.0), ("Mixtral-8x7B", 2, 115.0)])
def test_clients_that_wait_for_their_answers_are_not_taken_for_less_and_less_demand(spec, tensor, low_w):
    full = make_loop(spec, "A100-SXM", 32, tensor=tensor, output=600.0)
    full.keep(16, prompt=64, output=96)
    full.plant.run_closed(30.0, full.clients)
    uncapped_tokens_per_s = full.plant.generated / 30.0

    loop = make_loop(spec, "A100-SXM", 32, tensor=tensor, output=600.0)
    loop.keep(16, prompt=64, output=96)
    loop.run(110)
    before = loop.window.summary().throughput_tokens_per_s
    assert before > 0.85 * uncapped_tokens_per_s
    assert max(caps(loop.decisions[160:])) < 400.0, "watts that buy nothing are not taken"
    loop.ceiling_w = low_w
    loop.run(30)
    assert loop.window.summary().throughput_tokens_per_s < 0.8 * before
    loop.ceiling_w = 400.0
    loop.run(30)
    assert loop.window.summary().throughput_tokens_per_s > 0.9 * before, "they do not come back"
    assert {d.point.batch_limit for d in loop.decisions} == {32}


def test_without_limits_no_watts_are_spent_on_a_crowd_that_a_fixed_number_of_clients_never_makes():
    full = make_loop("Qwen3-32B", "A100-SXM", 32, output=600.0)
    full.keep(16, prompt=64, output=96)
    full.plant.run_closed(30.0, full.clients)

    loop = make_loop("Qwen3-32B", "A100-SXM", 32, output=600.0)
    loop.keep(16, prompt=64, output=96)
    loop.run(170)
    tokens, joules, since_s = loop.plant.generated, loop.plant.energy_j, loop.plant.now_s
    loop.run(30)
    passed_s = loop.plant.now_s - since_s
    assert (loop.plant.generated - tokens) / passed_s > 0.9 * full.plant.generated / 30.0
    # It settles at 0.99 of their speed at full power, with 0.86 of the draw.
    assert (loop.plant.energy_j - joules) / passed_s < 0.88 * full.plant.energy_j / 30.0


def test_at_a_steady_load_it_serves_nearly_all_and_does_not_cycle():
    loop = make_loop()
    loop.offer(3600.0, 150)
    loop.run(60)
    before = loop.plant.generated
    arriving = sum(request.left for request in loop.arrivals)
    settled = loop.run(90)
    assert loop.plant.generated - before == pytest.approx(arriving, rel=0.05)
    assert max(caps(settled)) < 560
    turns = np.diff(np.sign([d for d in np.diff(caps(settled)) if d]))
    assert np.count_nonzero(turns) <= 18


@pytest.mark.parametrize("bias", [0.8, 1.0, 1.25])
def test_a_target_is_kept_where_tokens_cost_least_whatever_the_bias_of_the_model(bias):
    loop = make_loop(bias=bias, target=Target(throughput_tokens_per_s=3000.0))
    loop.offer(7000.0, 150)
    loop.run(90)
    before = loop.plant.generated
    settled = loop.run(60)
    assert (loop.plant.generated - before) / 60 >= 0.98 * 3000
    assert max(caps(settled)) < 0.8 * 700, "a token costs more at higher caps"
    assert np.ptp(caps(settled)) <= 0.06 * 500


def test_changes_keep_their_dwell_and_slew():
    loop = make_loop()
    for load in (300.0, 4500.0, 300.0):
        loop.offer(load, 30)
        loop.run(30)
    now_s = [0.5 * (k + 1) for k in range(len(loop.decisions))]
    last_s = None
    config, moves = loop.config, 0
    for before, after, at_s in zip(loop.decisions, loop.decisions[1:], now_s[1:], strict=False):
        change_w = after.point.cap_w - before.point.cap_w
        if not change_w:
            continue
        moves += 1
        if last_s is not None:
            dwell_s = config.raise_dwell_s if change_w > 0 else config.cut_dwell_s
            assert at_s - last_s >= dwell_s - 0.1
        if change_w < 0:
            assert -change_w <= config.cut_slew_per_s * 2 * config.cut_dwell_s * 500 + 1
        last_s = at_s
    assert moves > 4


def test_the_integral_does_not_wind_up_at_the_ceiling():
    loop = make_loop(bias=1.3, ceiling_w=250.0, target=Target(throughput_tokens_per_s=5000.0))
    loop.offer(7000.0, 100)
    loop.run(60)
    assert set(caps(loop.decisions[20:])) == {250.0}
    assert loop.state.need < 1.15
    loop.target = Target(throughput_tokens_per_s=2500.0)
    loop.ceiling_w = 700.0
    after = loop.run(40)
    assert loop.window.summary().throughput_tokens_per_s > 2500
    assert max(caps(after)) < 600


@pytest.mark.parametrize("limits", [{"ttft_s": 1.0, "tpot_s": 0.1}, {"ttft_s": 0.5, "tpot_s": 0.04}])
def test_it_keeps_its_slo_with_far_fewer_watts_than_the_highest_cap_takes(limits):
    def run(**changes):
        loop = make_loop(target=slo(**limits))
        loop.model = changes.get("model", loop.model)
        loop.offer(3000.0, 480)
        loop.run(120)
        before, first_j = loop.plant.judge.verdicts, loop.plant.energy_j
        loop.run(360)
        judged = loop.plant.judge.verdicts - before
        return judged.attainment, loop.plant.energy_j - first_j

    attainment, kept_j = run()
    _, uncapped_j = run(model=None)
    assert attainment >= 0.985
    assert kept_j < 0.9 * uncapped_j


def test_long_prompts_are_learnt_from_ttft_and_a_cap_sized_for_decode_does_not_wreck_it():
    loop = make_loop(prompt=2048.0, output=64.0, target=slo(ttft_s=0.3))
    loop.offer(150.0, 400)
    loop.run(100)
    before = loop.plant.judge.verdicts
    loop.run(300)
    assert (loop.plant.judge.verdicts - before).attainment >= 0.985


def test_a_rise_from_idle_is_followed_within_seconds():
    loop = make_loop()
    loop.run(10)
    loop.offer(4800.0, 40)
    rise = loop.run(10)
    assert max(caps(rise)) > 300
    assert loop.window.summary().throughput_tokens_per_s > 0.8 * 4800
    loop.run(25)
    assert loop.window.summary().waiting < 20


def test_ceilings_that_come_and_go_are_never_exceeded():
    loop = make_loop()
    loop.offer(5000.0, 40)
    for ceiling_w in (700.0, 300.0, 555.5, 200.0, 251.25, 700.0):
        loop.ceiling_w = ceiling_w
        assert all(200.0 <= cap_w <= ceiling_w for cap_w in caps(loop.run(6)))


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_graph_sizes_are_those_of_the_engine_and_the_start_value():
    assert graph_sizes(30) == (1, 2, 4, 8, 16, 24, 30)
    assert graph_sizes(288)[-3:] == (256, 272, 288)
    assert (snap(0.3, 64), snap(7.9, 64), snap(63.0, 64), snap(1000, 64), snap(300, 512)) == (1, 4, 56, 64, 288)


def test_an_error_counts_only_beyond_the_dead_band_and_once_it_has_persisted():
    gains, state = Gains(), PidState()
    free = {"at_most": False, "at_least": False, "spare": False}
    for beat in range(20):
        state, factor = pid_step(state, 0.0029, beat / 2, 0.5, gains, **free)
        assert factor == 1.0
    factors = []
    for beat in range(20, 28):
        state, factor = pid_step(state, 0.1, beat / 2, 0.5, gains, **free)
        factors.append(factor)
    assert factors[:3] == [1.0, 1.0, 1.0]
    assert factors[3:] == sorted(factors[3:])
    assert factors[3] > 1.0


def test_the_factor_at_most_doubles_takes_little_off_and_unwinds_with_capacity_to_spare():
    gains = Gains()
    for error, end in ((0.9, 2.0), (-3.0, np.exp(-0.03))):
        state = PidState()
        for beat in range(200):
            state, factor = pid_step(state, error, beat / 2, 0.5, gains, at_most=False, at_least=False, spare=False)
            assert 0.97 <= factor <= 2.0
        assert factor == pytest.approx(end)
        held, _ = pid_step(state, None, 100.0, 0.5, gains, at_most=False, at_least=False, spare=False)
        assert held.integral == state.integral
        for beat in range(1200):
            state, factor = pid_step(state, None, 100 + beat / 2, 0.5, gains, at_most=False, at_least=False, spare=True)
        assert factor == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("error", [0.2, -0.2])
def test_an_actuator_at_its_end_stops_the_integral_that_way_only(error):
    gains, state = Gains(), PidState()
    for beat in range(40):
        state, _ = pid_step(state, error, beat / 2, 0.5, gains, at_most=error > 0, at_least=error < 0, spare=False)
    assert state.integral == 0.0
    for beat in range(40, 80):
        state, _ = pid_step(state, -error, beat / 2, 0.5, gains, at_most=error > 0, at_least=error < 0, spare=False)
    assert state.integral * error < 0
