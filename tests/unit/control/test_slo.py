"""The verdict on each request, and how a model keeps its SLO and its tokens/s target."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import astuple, dataclass, replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.slo import (
    RequestJudge,
    SloState,
    Tally,
    allowed_late,
    by_priority,
    good_requests,
    observe,
    over_count,
    status_of,
    tally_of,
)
from pals_ray.control.telemetry import quantile_s
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Slo, Target, Verdicts

TTFT_S, TPOT_S = 2.0, 0.1
BUCKETS = len(LATENCY_EDGES_S) + 1


# -- the verdict on one request ----------------------------------------------------------------------------------------


@pytest.fixture
def judge():
    return RequestJudge(TTFT_S, TPOT_S)


def answered(judge, request="a", arrival_s=0.0, first_s=1.0, last_s=1.9, tokens=10):
    judge.arrived(request, arrival_s)
    judge.first_token(request, first_s)
    judge.ended(request, last_s, tokens)
    return judge.verdicts


def test_a_request_at_both_limits_is_good_and_counts_with_all_its_tokens(judge):
    assert answered(judge, first_s=2.0, last_s=3.0, tokens=11) == Verdicts(good=1, good_tokens=11)


def test_a_first_token_past_its_limit_is_late_at_once_and_the_end_adds_nothing(judge):
    judge.arrived("a", 0.0)
    judge.first_token("a", 2.1)
    assert judge.verdicts == Verdicts(late_ttft=1)
    judge.ended("a", 50.0, 10)
    assert judge.verdicts == Verdicts(late_ttft=1)


def test_more_time_per_output_token_than_the_limit_is_late_at_the_end(judge):
    assert answered(judge, last_s=2.0, tokens=10) == Verdicts(late_tpot=1)


def test_a_long_gap_is_made_up_for_by_quick_tokens(judge):
    """TPOT is a request's mean: unlike a gap between tokens, it is known at the end only."""
    judge.arrived("a", 0.0)
    judge.first_token("a", 1.0)
    judge.look(1.9)
    judge.ended("a", 1.95, 20)
    assert judge.verdicts.good == 1


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_output_token_or_none_is_judged_by_ttft_alone(judge, tokens):
    assert answered(judge, last_s=500.0, tokens=tokens) == Verdicts(good=1, good_tokens=tokens)


def test_the_end_of_a_request_without_a_token_is_its_first_token(judge):
    judge.arrived("good", 0.0)
    judge.arrived("late", 0.0)
    judge.ended("good", 1.9, 0)
    judge.ended("late", 2.1, 0)
    assert judge.verdicts == Verdicts(good=1, late_ttft=1)


def test_waiting_past_the_limit_is_late_before_any_token(judge):
    for arrival_s in (0.0, 0.5, 1.0):
        judge.arrived(arrival_s, arrival_s)
    judge.look(2.0)
    assert judge.verdicts == Verdicts()
    judge.look(2.6)
    assert judge.verdicts == Verdicts(late_ttft=2)
    judge.first_token(1.0, 2.7)
    judge.look(100.0)
    assert judge.verdicts == Verdicts(late_ttft=2)


def test_an_abort_is_not_judged_until_a_limit_is_broken(judge):
    for request in ("waits", "waited", "quick", "slow", "one token"):
        judge.arrived(request, 0.0)
    judge.aborted("waits", 1.9, 0)
    for request in ("quick", "slow", "one token"):
        judge.first_token(request, 1.0)
    judge.aborted("quick", 1.5, 6)
    judge.aborted("one token", 1.5, 1)
    assert judge.verdicts == Verdicts()
    judge.aborted("slow", 1.6, 6)
    judge.aborted("waited", 2.1, 0)
    assert judge.verdicts == Verdicts(late_ttft=1, late_tpot=1)


def test_a_failure_is_late_by_us_unless_it_was_late_before(judge):
    for request in ("waits", "decodes", "late"):
        judge.arrived(request, 0.0)
    judge.first_token("decodes", 1.0)
    judge.failed("waits")
    judge.failed("decodes")
    judge.look(2.1)
    judge.failed("late")
    judge.failed("stranger")
    assert judge.verdicts == Verdicts(late_ttft=1, late_failed=2)


def test_limits_that_change_hold_for_verdicts_from_then_on(judge):
    assert answered(judge, "before", last_s=1.9) == Verdicts(good=1, good_tokens=10)
    judge.arrived("decodes", 0.0)
    judge.first_token("decodes", 1.5)
    judge.arrived("waits", 0.0)
    judge.ttft_limit_s, judge.tpot_limit_s = 1.0, 0.05
    judge.look(1.6)
    judge.ended("decodes", 2.4, 10)
    assert judge.verdicts == Verdicts(good=1, good_tokens=10, late_ttft=1, late_tpot=1)
    judge.ttft_limit_s = judge.tpot_limit_s = inf
    assert answered(judge, "after", 0.0, 900.0, 9000.0, 10) == Verdicts(2, 1, 1, 0, 20)


def test_without_limits_every_answer_is_good():
    judge = RequestJudge()
    judge.arrived("waits", 0.0)
    judge.look(1e9)
    assert answered(judge, "a", 0.0, 1e6, 1e9, 2) == Verdicts(good=1, good_tokens=2)


@dataclass(frozen=True)
class Life:
    """What becomes of a request: when it comes, what it waits, its answer, and how that ends."""

    arrival_s: int
    ttft_s: int
    tokens: int
    decode_s: int
    end: str

    @property
    def first_s(self):
        return self.arrival_s + self.ttft_s

    @property
    def end_s(self):
        return self.first_s + (self.decode_s if self.tokens > 1 else 0)

    def events(self, name):
        yield self.arrival_s, 0, lambda judge: judge.arrived(name, self.arrival_s)
        if self.tokens:
            yield self.first_s, 1, lambda judge: judge.first_token(name, self.first_s)
        if self.end == "ended":
            yield self.end_s, 2, lambda judge: judge.ended(name, self.end_s, self.tokens)
        elif self.end == "aborted":
            yield self.end_s, 2, lambda judge: judge.aborted(name, self.end_s, self.tokens)
        elif self.end == "failed":
            yield self.end_s, 2, lambda judge: judge.failed(name)

    def verdict(self, ttft_s, tpot_s, until_s):
        """What it is to be counted as, straight from the definition; None where it is not judged by `until_s`."""
        first_s = self.first_s if self.tokens or self.end == "ended" else None
        waited_until_s = min(until_s, first_s if first_s is not None else inf)
        if first_s is None and self.end in ("aborted", "failed"):
            waited_until_s = min(until_s, self.end_s)
        if waited_until_s - self.arrival_s > ttft_s:
            return "late_ttft"
        if self.end == "never" or self.end_s > until_s:
            return None
        if self.end == "failed":
            return "late_failed"
        if self.tokens > 1 and (self.end_s - self.first_s) / (self.tokens - 1) > tpot_s:
            return "late_tpot"
        return "good" if self.end == "ended" else None


LIVES = st.builds(
    Life,
    st.integers(0, 30),
    st.integers(0, 12),
    st.integers(0, 5),
    st.integers(0, 12),
    st.sampled_from(["ended", "aborted", "failed", "never"]),
)
LIMITS_S = st.sampled_from([0.5, 2.5, 5.5, inf])


@given(st.lists(LIVES, max_size=12), LIMITS_S, LIMITS_S, st.integers(0, 60))
def test_each_request_gets_the_one_verdict_that_its_definition_gives(lives, ttft_s, tpot_s, until_s):
    judge = RequestJudge(ttft_s, tpot_s)
    events = sorted((e for i, life in enumerate(lives) for e in life.events(i)), key=lambda event: event[:2])
    for at_s, _, tell in events:
        if at_s <= until_s:
            judge.look(at_s)
            tell(judge)
    judge.look(until_s)
    come = [life for life in lives if life.arrival_s <= until_s]
    wanted = [(life.verdict(ttft_s, tpot_s, until_s), life.tokens) for life in come]
    counts = {name: sum(verdict == name for verdict, _ in wanted) for name in Verdicts.__slots__[:4]}
    tokens = sum(tokens for verdict, tokens in wanted if verdict == "good")
    assert judge.verdicts == Verdicts(**counts, good_tokens=tokens)


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["arrived", "first_token", "ended", "aborted", "failed", "look", "limits"]),
        st.integers(0, 4),
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(CALLS)
def test_whatever_is_told_in_whatever_order_none_is_judged_twice_and_what_is_judged_has_come(calls):
    judge, now_s, names, seen = RequestJudge(1.5, 1.5), 0, {}, Verdicts()
    for what, request, passed_s, tokens in calls:
        now_s += passed_s
        if what == "arrived":
            names[request] = (request, len(names), now_s)  # never one that came before
            judge.arrived(names[request], now_s)
        elif what == "limits":
            judge.ttft_limit_s, judge.tpot_limit_s = passed_s + 0.5, tokens + 0.5
        elif what == "look":
            judge.look(now_s)
        else:
            name = names.get(request, "stranger")
            rest = {"first_token": (now_s,), "failed": ()}.get(what, (now_s, tokens))
            getattr(judge, what)(name, *rest)
        new = judge.verdicts - seen
        assert min(astuple(new)) >= 0, "a verdict was taken back"
        assert what == "look" or new.judged <= 1
        assert not (what == "arrived" and new.judged)
        seen = judge.verdicts
    arrived = sum(what == "arrived" for what, *_ in calls)
    judge.ttft_limit_s = 0.5
    judge.look(now_s + 1.0)  # all that wait are judged; those that decode, and those aborted in time, are not
    assert seen.judged <= judge.verdicts.judged <= arrived


def test_judged_and_not_judged_are_all_that_came(judge):
    for request in range(6):
        judge.arrived(request, 0.0)
    judge.first_token(0, 1.0)
    judge.first_token(1, 1.0)
    judge.ended(0, 1.0, 1)
    judge.aborted(2, 1.0, 0)
    judge.failed(3)
    judge.look(2.5)
    not_judged = len({1, 2})  # decodes still; aborted in time
    assert judge.verdicts.judged + not_judged == 6


@given(st.lists(LIVES, min_size=1, max_size=12), LIMITS_S, LIMITS_S, st.integers(30, 60))
def test_the_verdicts_in_arrays_are_those_of_the_judge(lives, ttft_s, tpot_s, until_s):
    lives = [replace(life, end="ended", tokens=max(life.tokens, 1)) for life in lives]
    first_s = np.array([life.first_s if life.first_s <= until_s else np.nan for life in lives])
    last_s = np.array([life.end_s if life.end_s <= until_s else np.nan for life in lives])
    arrival_s, tokens = np.array([life.arrival_s for life in lives], float), np.array([life.tokens for life in lives])
    slo = Slo(*(None if limit_s == inf else limit_s for limit_s in (ttft_s, tpot_s)))
    good, late = good_requests(arrival_s, first_s, last_s, tokens, slo, until_s)
    wanted = [life.verdict(ttft_s, tpot_s, until_s) for life in lives]
    assert good.tolist() == [verdict == "good" for verdict in wanted]
    assert late.tolist() == [verdict is not None and verdict != "good" for verdict in wanted]


# -- a reading of an engine --------------------------------------------------------------------------------------------


def histogram(latencies):
    counts = [0] * BUCKETS
    for latency_s, times in latencies.items():
        counts[bisect_left(LATENCY_EDGES_S, latency_s)] += times
    return tuple(counts)


def test_a_tally_has_the_verdicts_and_the_gaps_over_their_limit():
    none = (0,) * BUCKETS
    engine = EngineTelemetry(
        time_s=0.0,
        running=4,
        waiting=3,
        kv_use=0.0,
        prompt_tokens=0,
        generation_tokens=700,
        requests_finished=9,
        preemptions=0,
        batch_limit=8,
        max_batch=8,
        arrived=12,
        verdicts=Verdicts(good=8, late_ttft=1),
        ttft_counts=none,
        tpot_counts=none,
        itl_counts=histogram({0.05: 95, 0.2: 5}),
    )
    assert tally_of(engine, Slo(itl_p99_s=0.1)) == Tally(Verdicts(8, 1), 700, 3, 100, 5.0, 0.1)
    assert tally_of(engine, Slo()) == Tally(Verdicts(8, 1), 700, 3, 100, 0.0, None)


def test_the_bucket_of_the_limit_is_split_where_the_limit_lies():
    low_s, high_s = LATENCY_EDGES_S[100], LATENCY_EDGES_S[101]
    counts = histogram({high_s: 8, 10 * high_s: 1})
    assert over_count(counts, low_s) == 9
    assert over_count(counts, high_s) == 1
    assert over_count(counts, (low_s + 3 * high_s) / 4) == pytest.approx(3)
    assert over_count(histogram({1000.0: 2}), 500.0) == 2
    assert over_count(counts, None) == 0


@given(
    st.dictionaries(st.floats(1e-4, 100.0), st.integers(1, 500), min_size=1, max_size=8),
    st.floats(2e-4, 120.0),
)
def test_over_one_per_cent_exceed_a_limit_exactly_where_the_p99_does(latencies, limit_s):
    counts = histogram(latencies)
    over, total = over_count(counts, limit_s), sum(counts)
    p99_s = quantile_s(counts, 0.99)
    if abs(p99_s / limit_s - 1) > 1e-6 and abs(over / total - 0.01) > 1e-9:
        assert (over > 0.01 * total) == (p99_s > limit_s)


# -- a model's account -------------------------------------------------------------------------------------------------

SLO = Slo(TTFT_S, TPOT_S, attainment=0.99, window_s=60.0, itl_p99_s=0.1)
TARGET = Target(SLO, throughput_tokens_per_s=100.0)
EMPTY = Tally(Verdicts(), 0, 0, 0, 0.0, SLO.itl_p99_s)


class Account:
    """One model's replicas, looked at every half second."""

    def __init__(self, target=TARGET, replicas=1):
        self.target = target
        self.tallies = {f"r{n}": replace(EMPTY, gap_limit_s=target.slo.itl_p99_s) for n in range(replicas)}
        self.state = SloState()
        self.now_s = 0.0
        self.look()

    def look(self):
        self.state = observe(self.state, self.now_s, self.tallies, self.target)

    def add(self, verdicts=None, replica="r0", gaps=0, gaps_over=0.0, tokens=0):
        """What an engine has done meanwhile."""
        was = self.tallies[replica]
        self.tallies[replica] = replace(
            was,
            verdicts=was.verdicts + (verdicts or Verdicts()),
            gaps=was.gaps + gaps,
            gaps_over=was.gaps_over + gaps_over,
            tokens=was.tokens + tokens,
        )

    def passes(self, seconds=5.0, tokens_per_s=0.0, waiting=None):
        """Time passes while all replicas together make so many tokens/s; `waiting` says how many wait by beat."""
        for beat in range(round(2 * seconds)):
            self.now_s += 0.5
            for name in self.tallies:
                self.add(replica=name, tokens=round(tokens_per_s / 2 / len(self.tallies)))
            if waiting is not None:
                self.tallies["r0"] = replace(self.tallies["r0"], waiting=waiting(beat))
            self.look()

    @property
    def status(self):
        return status_of("m", self.target, self.state)


def test_attainment_is_shown_over_the_window_and_since_the_start():
    account = Account()
    account.add(Verdicts(good=90, late_ttft=10))
    account.passes(0.5)
    account.passes(40.0)
    account.add(Verdicts(good=99, late_tpot=1))
    account.passes(0.5)
    assert account.status.recent == Verdicts(good=189, late_ttft=10, late_tpot=1)
    account.passes(30.0)
    assert account.status.recent == Verdicts(good=99, late_tpot=1)
    assert account.status.recent.attainment == 0.99
    assert account.status.total.attainment == 189 / 200
    account.passes(60.0)
    assert account.status.recent.attainment is None


def test_replicas_are_counted_together_each_from_its_second_tally_on():
    account = Account(replicas=2)
    account.tallies["r2"] = replace(EMPTY, verdicts=Verdicts(good=1000))
    for name in ("r0", "r1"):
        account.add(Verdicts(good=3, late_ttft=1), name)
    account.passes(0.5)
    assert account.status.total == Verdicts(good=6, late_ttft=2)
    account.add(Verdicts(good=5), "r2")
    account.passes(0.5)
    assert account.status.total == Verdicts(good=11, late_ttft=2)


def test_an_engine_that_began_anew_takes_nothing_back():
    account = Account()
    account.add(Verdicts(good=50), tokens=100)
    account.passes(0.5)
    account.tallies["r0"] = EMPTY
    account.passes(0.5)
    assert account.status.total == Verdicts(good=50)
    account.add(Verdicts(good=1), tokens=10)
    account.passes(0.5)
    assert account.status.total == Verdicts(good=51)


def test_requests_that_were_with_an_engine_that_is_gone_have_failed():
    account = Account(replicas=2)
    account.add(Verdicts(good=50), "r0", tokens=100)
    for name in ("r0", "r1"):
        account.tallies[name] = replace(account.tallies[name], unjudged=3)
    account.passes(0.5)
    assert account.status.total == Verdicts(good=50)
    account.tallies["r0"] = EMPTY  # its engine began anew
    del account.tallies["r1"]
    account.passes(0.5)
    assert account.status.total == Verdicts(good=50, late_failed=6)
    account.passes(0.5)
    assert account.status.total == Verdicts(good=50, late_failed=6)


def test_a_clock_that_goes_back_or_leaps_loses_no_verdict_since_the_start():
    account = Account()
    account.add(Verdicts(good=5))
    account.passes(0.5)
    for leap_s in (-1000.0, 5000.0):
        account.now_s += leap_s
        account.add(Verdicts(good=5))
        account.look()
        assert account.status.recent == Verdicts(good=5)
    assert account.status.total == Verdicts(good=15)


@given(
    st.lists(st.tuples(st.floats(0.1, 30.0), st.integers(0, 20), st.integers(0, 3)), max_size=150),
    st.floats(10.0, 300.0),
)
def test_the_account_stays_small_and_the_window_holds_what_was_judged_in_it(looks, window_s):
    account = Account(Target(replace(SLO, window_s=window_s)))
    judged = []
    for passed_s, good, late in looks:
        account.now_s += passed_s
        account.add(Verdicts(good=good, late_ttft=late))
        account.look()
        judged.append((account.now_s, good + late))
    step_s = window_s / 60
    assert len(account.state.steps) <= 61
    assert account.status.total.judged == sum(count for _, count in judged)
    surely = sum(count for at_s, count in judged if at_s > account.now_s - window_s + step_s + 1e-6)
    at_most = sum(count for at_s, count in judged if at_s > account.now_s - window_s - 1e-6)
    assert (
        surely
        <= account.status.recent.judged
        <= at_most
        + sum(count for at_s, count in judged if account.now_s - window_s - step_s <= at_s <= account.now_s - window_s)
    )


@pytest.mark.parametrize(
    ("judged", "attainment", "allowed"),
    [(0, 0.99, 1.0), (50, 0.99, 1.0), (99, 0.9, 9.9), (100, 0.99, 1.0), (100, 0.999, 0.1), (1000, 0.99, 10.0)],
)
def test_of_a_few_requests_one_may_be_late(judged, attainment, allowed):
    assert allowed_late(judged, attainment) == pytest.approx(allowed)


def test_the_error_budget_left_is_what_late_requests_have_not_used():
    account = Account()
    assert account.status.error_budget_left == 1.0
    account.add(Verdicts(good=998, late_ttft=1, late_tpot=1))
    account.passes(0.5)
    assert account.status.error_budget_left == pytest.approx(0.8)
    account.add(Verdicts(late_failed=18))
    account.passes(0.5)
    assert account.status.error_budget_left == pytest.approx(1 - 20 / 10.18)


def test_without_limits_there_is_no_error_budget():
    account = Account(Target())
    account.add(Verdicts(good=10))
    account.passes(0.5)
    assert account.status.error_budget_left is None
    assert account.status.recent.attainment == 1.0


def test_the_share_of_long_gaps_is_over_those_judged_by_the_limit_in_force():
    account = Account()
    assert account.status.itl_over_share is None
    account.add(gaps=100, gaps_over=3.0)
    account.passes(0.5)
    assert account.status.itl_over_share == pytest.approx(0.03)
    account.target = Target(replace(SLO, itl_p99_s=0.05))
    account.tallies["r0"] = replace(account.tallies["r0"], gap_limit_s=0.05, gaps_over=80.0)
    account.passes(0.5)
    assert account.status.itl_over_share == pytest.approx(0.03), "the other limit's count was subtracted"
    account.add(gaps=100, gaps_over=10.0)
    account.passes(0.5)
    assert account.status.itl_over_share == pytest.approx(0.065)
    assert Account(Target()).status.itl_over_share is None


# -- tokens/s ----------------------------------------------------------------------------------------------------------


def test_an_interval_is_under_target_below_95_per_cent_while_work_waits_at_every_look():
    account = Account()
    account.passes(5.0, 200.0, lambda beat: 3)  # work begins to wait within it
    assert (account.status.intervals, account.status.under_target_share) == (1, 0.0)
    account.passes(5.0, 96.0)
    assert account.status.under_target_share == 0.0
    account.passes(5.0, 94.0)
    assert account.status.under_target_share == pytest.approx(1 / 3)
    account.passes(5.0, 10.0, lambda beat: beat != 4)
    assert account.status.under_target_share == pytest.approx(1 / 4)


def test_a_models_replicas_serve_its_target_together():
    account = Account(replicas=2)
    account.passes(5.0, 200.0, lambda beat: 1)
    account.passes(5.0, 80.0)
    account.passes(5.0, 120.0)
    assert account.status.under_target_share == pytest.approx(1 / 3)


def test_what_nobody_watched_and_what_has_no_target_are_no_intervals():
    account = Account()
    account.passes(5.0, 10.0, lambda beat: 1)
    account.now_s += 60.0
    account.look()
    assert account.status.intervals == 1
    account.target = Target(SLO)
    account.passes(20.0, 10.0)
    assert account.status.intervals == 1
    account.now_s -= 1000.0
    account.target = TARGET
    account.look()
    account.passes(5.0, 10.0)
    assert account.status.intervals == 2


# -- priority classes --------------------------------------------------------------------------------------------------


def test_a_class_is_its_models_requests_together_each_with_its_own_allowance():
    strict = Account(Target(SLO, 100.0, priority=1))
    loose = Account(Target(replace(SLO, attainment=0.9), 100.0, priority=1))
    free = Account(Target(Slo(), priority=0))
    strict.add(Verdicts(good=990, late_ttft=10))
    loose.add(Verdicts(good=950, late_tpot=50))
    free.add(Verdicts(good=7))
    for account in (strict, loose, free):
        account.passes(0.5, 0.0, lambda beat: 1)
    strict.passes(10.0, 10.0)
    loose.passes(5.0, 200.0)
    first, second = by_priority(account.status for account in (strict, loose, free))
    assert (first.priority, first.recent, first.error_budget_left) == (0, Verdicts(good=7), None)
    assert (second.priority, second.model, second.slo) == (1, None, None)
    assert second.recent == second.total == Verdicts(good=1940, late_ttft=10, late_tpot=50)
    assert second.allowed == pytest.approx(110.0)
    assert second.error_budget_left == pytest.approx(1 - 60 / 110)
    assert second.intervals == strict.status.intervals + loose.status.intervals
    under = [a.status.under_target_share * a.status.intervals for a in (strict, loose)]
    assert second.under_target_share == pytest.approx(sum(under) / second.intervals)
    assert by_priority([]) == ()
