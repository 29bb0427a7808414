"""Violations as ARCHITECTURE.md defines them, and misses per request."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.control.slo import QosState, by_priority, late_count, observe, status_of, tally_of
from pals_ray.control.telemetry import quantile_s
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Target

TARGET = Target(throughput_tokens_per_s=100.0, ttft_p99_s=1.0, itl_p99_s=0.1)
BUCKETS = len(LATENCY_EDGES_S) + 1


def histogram(latencies):
    counts = [0] * BUCKETS
    for latency_s, times in latencies.items():
        counts[bisect_left(LATENCY_EDGES_S, latency_s)] += times
    return tuple(counts)


class Engine:
    """An engine that counts what a test says happened."""

    def __init__(self):
        self.now_s = 0.0
        self.tokens = self.finished = self.running = self.waiting = 0
        self.ttft = dict.fromkeys((0.5, 2.0), 0)
        self.itl = dict.fromkeys((0.05, 0.2), 0)

    def reading(self):
        return EngineTelemetry(
            time_s=self.now_s,
            running=self.running,
            waiting=self.waiting,
            kv_use=0.0,
            prompt_tokens=0,
            generation_tokens=self.tokens,
            requests_finished=self.finished,
            preemptions=0,
            batch_limit=8,
            max_batch=8,
            ttft_counts=histogram(self.ttft),
            itl_counts=histogram(self.itl),
        )

    def tally(self, target=TARGET):
        return tally_of(self.reading(), target)


class Account:
    """One model's replicas looked at every half second."""

    def __init__(self, target=TARGET, replicas=1):
        self.target = target
        self.engines = {f"r{n}": Engine() for n in range(replicas)}
        self.state = QosState()
        self.now_s = 0.0
        self.look()

    @property
    def engine(self):
        return self.engines["r0"]

    def look(self):
        tallies = {name: engine.tally(self.target) for name, engine in self.engines.items()}
        self.state = observe(self.state, self.now_s, tallies, self.target)

    def interval(self, tokens_per_s=0.0, during=None):
        """Five seconds at a rate; `during` is called in the middle."""
        for beat in range(10):
            self.now_s += 0.5
            for engine in self.engines.values():
                engine.now_s = self.now_s
                engine.tokens += int(tokens_per_s / 2 / len(self.engines))
            if beat == 5 and during:
                during()
            self.look()
        return self.state.latest


def with_queue(account, running=4, waiting=3):
    for engine in account.engines.values():
        engine.running, engine.waiting = running, waiting
    account.interval(1000.0)
    return account.state.totals


def test_too_few_tokens_while_requests_wait_at_both_ends_are_a_violation():
    account = Account()
    with_queue(account)
    assert account.interval(96.0).throughput
    assert not account.interval(98.0).violation
    assert not account.interval(150.0).violation


def test_few_tokens_are_no_violation_where_nobody_waits_at_the_start_or_at_the_end():
    account = Account()
    account.engine.running = 2

    def queue(waiting):
        account.engine.waiting = waiting

    assert not account.interval(10.0, lambda: queue(5)).violation
    assert account.interval(10.0).throughput
    assert not account.interval(10.0, lambda: queue(0)).violation


def test_an_interval_without_any_request_is_not_judged():
    account = Account()
    account.interval()
    assert account.state.totals.intervals == 0
    account.engine.running = 1
    account.interval()
    assert account.state.totals.intervals == 1


def test_a_request_that_came_and_went_between_two_looks_makes_its_interval_count():
    account = Account()

    def one():
        account.engine.finished += 1
        account.engine.ttft[0.5] += 1

    account.interval(0.0, one)
    assert account.state.totals.intervals == 1
    account.interval()
    assert account.state.totals.intervals == 1


def test_more_than_one_per_cent_of_ttfts_over_the_limit_are_a_violation_and_one_per_cent_is_not():
    account = Account()
    account.engine.running = 1

    def completes(good, late):
        account.engine.ttft[0.5] += good
        account.engine.ttft[2.0] += late

    assert not account.interval(200.0, lambda: completes(99, 1)).violation
    assert account.interval(200.0, lambda: completes(98, 2)).ttft
    assert account.interval(200.0, lambda: completes(0, 1)).ttft
    assert not account.interval(200.0, lambda: completes(5, 0)).violation


def test_inter_token_latencies_count_alike_and_without_a_limit_nothing_is_late():
    account = Account()
    account.engine.running = 1

    def slow():
        account.engine.itl[0.2] += 5
        account.engine.itl[0.05] += 95

    assert account.interval(200.0, slow).itl
    free = Account(Target())
    free.engine.running = 1
    free.engine.itl[0.2] += 100
    assert not free.interval(200.0).violation


def test_one_interval_with_two_causes_is_one_violation():
    account = Account()
    with_queue(account)

    def late():
        account.engine.ttft[2.0] += 3
        account.engine.itl[0.2] += 3

    verdict = account.interval(10.0, late)
    assert verdict.throughput
    assert verdict.ttft
    assert verdict.itl
    status = status_of("m", TARGET, account.state)
    assert status.violations == 1
    assert (status.throughput_violations, status.ttft_violations, status.itl_violations) == (1, 1, 1)
    assert "tokens/s" in status.latest
    assert "TTFTs" in status.latest


def test_a_model_without_a_target_rate_is_to_serve_what_arrives():
    account = Account(Target())
    engine = account.engine
    engine.running, engine.waiting, engine.finished, engine.tokens = 8, 4, 96, 10_000

    def arrives(requests, finished):
        engine.waiting += requests - finished
        engine.finished += finished

    account.interval(500.0, lambda: arrives(25, 25))

    # About 100 tokens a request: 40 requests in 5 s are 800 tokens/s.
    assert account.interval(500.0, lambda: arrives(40, 25)).throughput
    assert not account.interval(800.0, lambda: arrives(38, 40)).violation


def test_a_models_replicas_are_judged_together():
    account = Account(replicas=2)
    with_queue(account)
    account.engines["r1"].waiting = 0
    assert account.interval(80.0).throughput
    assert not account.interval(120.0).violation
    assert account.state.totals.intervals == 3


def test_a_replica_that_joins_or_whose_engine_began_anew_counts_from_the_next_interval():
    account = Account()
    with_queue(account)
    account.engines["r1"] = Engine()
    account.engines["r1"].tokens = 1_000_000
    assert account.interval(50.0).throughput
    account.engines["r1"].tokens = 0
    account.engines["r1"].waiting = 1
    verdict = account.interval(60.0)
    assert verdict.throughput
    assert verdict.reason.startswith("30 of 100")


def test_what_nobody_watched_is_not_judged_and_a_clock_that_goes_back_begins_anew():
    account = Account()
    with_queue(account)
    judged = account.state.totals
    account.now_s += 60.0
    account.look()
    assert account.state.totals == judged
    account.now_s -= 1000.0
    account.look()
    assert account.state.totals == judged
    account.interval(10.0)
    assert account.state.totals.intervals == judged.intervals + 1


def test_a_limit_that_changes_within_an_interval_leaves_it_unjudged():
    account = Account()
    account.engine.running = 1
    account.engine.ttft[0.5] = 100

    def stricter():
        account.target = replace(TARGET, ttft_p99_s=0.1)

    account.interval(200.0, stricter)
    assert account.state.totals.intervals == 0


def test_misses_per_request_and_classes_add_up_over_models():
    strict, loose = Account(), Account(replace(TARGET, ttft_p99_s=5.0))
    for account in (strict, loose):
        account.engine.running = 1

        def completes(engine=account.engine):
            engine.ttft[2.0] += 10
            engine.ttft[0.5] += 30

        account.interval(200.0, completes)
    first, second = status_of("a", strict.target, strict.state), status_of("b", loose.target, loose.state)
    assert first.ttft_miss_share == 0.25
    assert second.ttft_miss_share == 0.0
    assert first.itl_miss_share is None
    assert first.violation_share == 1.0
    (together,) = by_priority([first, second])
    assert (together.intervals, together.violations, together.ttft_miss_share) == (2, 1, 0.125)
    assert [c.priority for c in by_priority([first, replace(second, priority=-1)])] == [-1, 0]


def test_the_bucket_of_the_limit_is_split_where_the_limit_lies():
    low_s, high_s = LATENCY_EDGES_S[100], LATENCY_EDGES_S[101]
    counts = histogram({high_s: 8, 10 * high_s: 1})
    assert late_count(counts, low_s) == 9
    assert late_count(counts, high_s) == 1
    assert late_count(counts, (low_s + 3 * high_s) / 4) == pytest.approx(3)
    assert late_count(histogram({1000.0: 2}), 500.0) == 2
    assert late_count(counts, None) == 0


@given(
    st.dictionaries(st.floats(1e-4, 100.0), st.integers(1, 500), min_size=1, max_size=8),
    st.floats(2e-4, 120.0),
)
def test_misses_exceed_one_per_cent_exactly_where_the_p99_exceeds_the_limit(latencies, limit_s):
    counts = histogram(latencies)
    late, total = late_count(counts, limit_s), sum(counts)
    p99_s = quantile_s(counts, 0.99)
    if abs(p99_s / limit_s - 1) > 1e-6 and abs(late / total - 0.01) > 1e-9:
        assert (late > 0.01 * total) == (p99_s > limit_s)
