"""How SLOs are shown in a terminal."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pals_ray.cli.status_table import status_view, target_text
from pals_ray.control.slo import SloState, Step, by_priority, status_of
from pals_ray.types import (
    BudgetSource,
    FleetStatus,
    Latency,
    OperatingPoint,
    Provenance,
    ReplicaStatus,
    ReplicaTelemetry,
    Slo,
    Stranded,
    Target,
    Verdicts,
)

CHAT = Target(Slo(ttft_s=2.0, tpot_s=0.1))
BATCH = Target(Slo(itl_p99_s=0.05), throughput_tokens_per_s=500.0, priority=1)
COUNTS = st.integers(0, 1000)


def row(model, target, recent=None, total=None, **more):
    gaps = (1000, 4.0) if target.slo.itl_p99_s is not None else (0, 0.0)
    state = SloState(steps=(Step(0.0, recent or Verdicts(), *gaps),), total=total or Verdicts(), **more)
    return status_of(model, target, state)


def fleet(*rows, replicas=()):
    return FleetStatus(
        budget_w=700,
        source=BudgetSource("set", 700, 700, "as it was set"),
        **dict.fromkeys(("reserve_w", "charge_w", "reserved_w", "parked_w", "measured_w", "unmanaged_w"), 0.0),
        stranded=Stranded(0, 0, 0, 0),
        **dict.fromkeys(("over_budget_w", "over_budget_s"), 0.0),
        last_settle_s=None,
        policy="policies.pals:allocate",
        version="v",
        epoch=1,
        enforced=True,
        time_scale=None,
        provenance=Provenance.MEASURED,
        replicas=replicas,
        gpus=(),
        notes=(),
        slos=rows,
        slos_by_priority=by_priority(rows),
    )


def shown(status, width=120):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(status_view(status))
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_model_has_a_line_of_its_window_and_one_since_the_start():
    lines = shown(fleet(row("chat", CHAT, Verdicts(997, 2, 1), Verdicts(9000, 15, 6, 1))))
    assert "SLO requests good late by TTFT / TPOT / failure error budget left" in lines
    assert "chat last 300 s 99.7% of 1000 2 / 1 / 0 70%, 7 more" in lines
    assert "99% asked since start 99.7% of 9022 15 / 6 / 1" in lines
    assert "priority 0 in window 99.7% of 1000 2 / 1 / 0 70%, 7 more" in lines


def test_a_spent_error_budget_says_by_how_many_requests():
    lines = shown(fleet(row("chat", CHAT, Verdicts(380, 20))))
    assert "chat last 300 s 95.0% of 400 20 / 0 / 0 -400%, 16 over" in lines
    assert "chat last 300 s - 0 / 0 / 0 100%, 1 more" in shown(fleet(row("chat", CHAT)))


def test_tokens_and_gaps_have_columns_where_they_are_limited():
    plain, both = row("chat", CHAT), row("batch", BATCH, Verdicts(3), intervals=40, under_target=3)
    lines = shown(fleet(plain, both))
    assert any(line.endswith("error budget left long gaps under tok/s") for line in lines)
    assert "batch last 300 s 100.0% of 3 0 / 0 / 0 - 0.40%" in lines
    assert "no limits since start - 0 / 0 / 0 7.5%" in lines


@given(COUNTS, COUNTS, st.sampled_from([0.9, 0.99, 0.999]))
def test_an_attainment_that_is_missed_is_never_shown_as_kept(good, late, asked):
    line = next(line for line in shown(fleet(row("m", CHAT, Verdicts(good, late)))) if line.startswith("m last"))
    percent = line.split()[4]
    if percent != "-" and good / (good + late) < asked:
        assert float(percent.removesuffix("%")) < 100 * asked


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_of_models_with_limits_fits_a_narrow_terminal(width):
    lines = shown(fleet(row("tiny-dense", CHAT, Verdicts(9970, 12, 15, 3), Verdicts(90000, 150, 60, 10))), width)
    assert "99% asked since start 99.7% of 90220 150 / 60 / 10" in lines


def test_a_replica_shows_its_latencies_beside_their_limits():
    target = Target(Slo(ttft_s=1.5, tpot_s=0.1, itl_p99_s=0.25))
    seen = ReplicaTelemetry(ttft=Latency(0.2, 1.25), tpot=Latency(0.05, 0.08), itl=Latency(0.04, None))
    point, watts = OperatingPoint(200, 16), dict.fromkeys(("charge_w", "grant_w", "stranded_w"), 0.0)
    replica = ReplicaStatus(
        "m#1", "m", "n", (), 1, "serving", point.cap_w, point.batch_limit, 32, **watts, target=target, telemetry=seen,
        tokens_per_joule=None, reason="", grant_reason="", provenance=Provenance.MEASURED,
    )  # fmt: skip
    text = " ".join(shown(replace(fleet(), replicas=(replica,))))
    assert "TTFT p50 200 ms p99 1.25 s (limit 1.5 s)" in text
    assert "TPOT p50 50 ms p99 80 ms (limit 100 ms)" in text
    assert "ITL p50 40 ms p99 - (limit 250 ms)" in text


def test_a_target_in_words():
    assert target_text(Target()) == "all demand"
    assert target_text(CHAT) == "all demand, 99% of requests within TTFT 2 s and TPOT 100 ms over 300 s"
    asked = Target(Slo(tpot_s=0.04, attainment=0.999, window_s=60), throughput_tokens_per_s=500, priority=2)
    assert target_text(asked) == "500 tok/s, 99.9% of requests within TPOT 40 ms over 60 s, priority 2"
    assert target_text(BATCH) == "500 tok/s, ITL p99 within 50 ms, priority 1"
