"""Requests followed from step to step without vLLM: what the judge is told, and what the control block says of it."""

from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.request_watch import RequestWatch
from pals_ray.types import Verdicts

#: What the wall clock says at 0 s of the monotonic one.
EPOCH_S = 1_700_000_000.0
Status = Enum("Status", "WAITING FINISHED_STOPPED FINISHED_ABORTED FINISHED_IGNORED FINISHED_ERROR")


@dataclass(eq=False)
class Request:
    """As much of vLLM's request as is asked for."""

    request_id: str
    arrival_time: float
    num_output_tokens: int = 0
    status: Status = Status.WAITING
    resumable: bool = False
    sampling_params: object = None


class Engine:
    """A scheduler that does what a test says, on clocks that stand still until told."""

    def __init__(self, block):
        self.now_s, self.set_s = 0.0, 0.0
        self.block = block
        self.watch = RequestWatch(block, lambda: self.now_s, lambda: EPOCH_S + self.now_s + self.set_s)

    def comes(self, name, ago_s=0.0, **more):
        request = Request(name, EPOCH_S + self.now_s - ago_s, **more)
        self.watch.arrived(request)
        return request

    def step(self, at_s, tokens=(), scheduled=(), ended=()):
        """One step: these requests get a token, and these end with it."""
        self.now_s = at_s
        self.watch.tokens_came()
        for request in tokens:
            request.num_output_tokens += 1
        for request in ended:
            request.status = Status.FINISHED_STOPPED
        self.watch.stepped([r.request_id for r in scheduled], {r.request_id for r in ended})

    def ends(self, request, status=Status.FINISHED_ABORTED, **how):
        request.status = status
        self.watch.ended({request.request_id}, **how)

    def said(self):
        return self.block.telemetry()


@pytest.fixture
def engine(tmp_path):
    block = ControlBlock.create(tmp_path / "block")
    block.order_latency_limits(2.0, 0.1)
    return Engine(block)


def test_one_within_both_limits_is_good_with_all_its_tokens(engine):
    request = engine.comes("a", ago_s=0.5)
    engine.step(1.0, scheduled=[request])
    engine.step(1.4, [request])
    engine.step(1.5, [request])
    engine.step(1.59, [request], ended=[request])
    assert engine.said().verdicts == Verdicts(good=1, good_tokens=3)


def test_the_wait_before_the_engine_heard_of_it_counts(engine):
    request = engine.comes("a", ago_s=1.5)
    engine.step(0.6, [request], scheduled=[request])
    assert engine.said().verdicts == Verdicts(late_ttft=1)


def test_one_that_still_waits_is_late_once_its_limit_has_passed(engine):
    engine.comes("a")
    engine.step(2.0)
    assert engine.said().verdicts.judged == 0
    engine.step(2.1)
    assert engine.said().verdicts == Verdicts(late_ttft=1)


def test_a_slow_answer_is_late_when_it_ends(engine):
    request = engine.comes("a")
    engine.step(0.5, [request], scheduled=[request])
    engine.step(0.75, [request])
    assert engine.said().verdicts.judged == 0
    engine.step(0.9, [request], ended=[request])
    assert engine.said().verdicts == Verdicts(late_tpot=1)


def test_answers_of_one_token_or_none_are_judged_by_ttft_alone(engine):
    token, embedding, late = engine.comes("a"), engine.comes("b"), engine.comes("c", ago_s=1.9)
    engine.step(1.0, [token], [token, embedding, late], ended=[token, embedding, late])
    assert engine.said().verdicts == Verdicts(good=2, late_ttft=1, good_tokens=1)


def test_a_client_that_goes_before_a_limit_is_broken_leaves_no_verdict(engine):
    waiting, decoding = engine.comes("a"), engine.comes("b")
    engine.step(0.5, [decoding], [decoding])
    engine.step(0.6, [decoding])
    engine.ends(waiting)
    engine.ends(decoding)
    engine.step(60.0)
    assert engine.said().arrived == 2
    assert engine.said().verdicts == Verdicts()


def test_a_client_that_goes_after_a_limit_was_broken_leaves_a_late_request(engine):
    waiting, decoding = engine.comes("a"), engine.comes("b")
    engine.step(0.5, [decoding], [decoding])
    engine.step(0.9, [decoding])
    engine.now_s = 2.5
    engine.ends(decoding)
    engine.ends(waiting)
    assert engine.said().verdicts == Verdicts(late_ttft=1, late_tpot=1)


def test_an_abort_is_judged_by_the_last_token_not_by_when_it_is_heard_of(engine):
    request = engine.comes("a")
    engine.step(0.5, [request], [request])
    engine.step(0.59, [request])
    engine.now_s = 0.68
    engine.ends(request)
    assert engine.said().verdicts == Verdicts()


def test_one_that_its_frontend_stops_by_text_has_ended_as_it_should(engine):
    stops = {"sampling_params": SimpleNamespace(stop=["\n"])}
    answered, silent = engine.comes("a", **stops), engine.comes("b", **stops)
    engine.step(0.5, [answered], [answered])
    engine.ends(answered)
    engine.ends(silent)
    assert engine.said().verdicts == Verdicts(good=1, good_tokens=1)


@pytest.mark.parametrize("status", [Status.FINISHED_ERROR, Status.FINISHED_IGNORED])
def test_one_that_the_engine_gives_up_has_failed(engine, status):
    request = engine.comes("a")
    engine.ends(request, status)
    assert engine.said().verdicts == Verdicts(late_failed=1)


def test_those_that_an_engine_ends_as_it_stops_have_failed(engine):
    request = engine.comes("a")
    engine.step(0.5, [request], [request])
    engine.ends(request, by_client=False)
    assert engine.said().verdicts == Verdicts(late_failed=1)


def test_a_preempted_request_keeps_the_time_of_its_first_token(engine):
    request = engine.comes("a")
    engine.step(0.5, [request], [request])
    # Preempted, its prompt computed again, and scheduled as if for the first time.
    engine.step(1.0, scheduled=[request])
    engine.step(1.1, [request], ended=[request])
    assert engine.said().verdicts == Verdicts(late_tpot=1)


def test_limits_that_change_hold_from_the_next_step_on(engine):
    first, second = engine.comes("a"), engine.comes("b")
    engine.step(1.5)
    engine.block.order_latency_limits(1.0, 0.1)
    assert engine.said().verdicts.judged == 0
    engine.step(1.6, [first], [first])
    assert engine.said().verdicts == Verdicts(late_ttft=2)
    engine.block.order_latency_limits(float("inf"), float("inf"))
    third = engine.comes("c")
    engine.step(500.0, [third], [third])
    engine.step(900.0, [first, second, third], ended=[first, second, third])
    assert engine.said().verdicts == Verdicts(good=1, late_ttft=2, good_tokens=2)


def test_nothing_is_late_before_limits_were_ordered(tmp_path):
    engine = Engine(ControlBlock.create(tmp_path / "block"))
    request = engine.comes("a")
    engine.step(1000.0, [request], [request], [request])
    assert engine.said().verdicts == Verdicts(good=1, good_tokens=1)


@pytest.mark.parametrize("set_s", [-3600.0, 3600.0])
def test_a_wall_clock_that_is_set_changes_no_verdict_on_what_the_engine_knows(engine, set_s):
    request = engine.comes("a")
    engine.step(0.5, [request], [request])
    engine.set_s = set_s
    engine.step(0.59, [request], ended=[request])
    assert engine.said().verdicts == Verdicts(good=1, good_tokens=2)


def test_a_request_from_the_future_came_now(engine):
    request = engine.comes("a", ago_s=-3600.0)
    engine.step(1.9)
    assert engine.said().verdicts.judged == 0
    engine.step(2.1, [request], [request])
    assert engine.said().verdicts == Verdicts(late_ttft=1)


def test_sessions_are_counted_and_not_judged(engine):
    session = engine.comes("a", resumable=True)
    engine.step(50.0, [session], [session])
    engine.ends(session)
    assert (engine.said().arrived, engine.said().verdicts) == (1, Verdicts())


def test_what_is_unknown_or_was_judged_changes_nothing(engine):
    request = engine.comes("a")
    engine.step(0.5, [request], [request], [request])
    engine.watch.ended({"a", "stranger"})
    engine.watch.ended(set())
    engine.step(0.6, scheduled=[Request("stranger", EPOCH_S)])
    assert (engine.said().arrived, engine.said().verdicts) == (1, Verdicts(good=1, good_tokens=1))


def test_a_request_of_a_name_that_has_just_ended_is_another_one(engine):
    first = engine.comes("a")
    engine.step(0.5, [first], [first], [first])
    second = engine.comes("a")
    engine.watch.ended({"a"})
    assert engine.said().verdicts.judged == 1
    engine.step(0.6, [second], [second], [second])
    assert engine.said().verdicts == Verdicts(good=2, good_tokens=2)


def test_the_counts_are_written_as_one_record_and_only_when_they_change(engine):
    sequence = engine.block.field("judge_sequence")
    before = sequence.item(0)
    engine.step(0.1)
    assert sequence.item(0) == before
    engine.comes("a")
    assert sequence.item(0) == before + 2
