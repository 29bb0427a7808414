"""What Prometheus is told of SLOs: shares as gauges, verdicts as counters."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from pals_ray.runtime.manager import metrics
from pals_ray.types import SloStatus, Stranded, Verdicts


@dataclass
class Seen:
    """A gauge or a counter as Ray has them, that remembers."""

    name: str
    values: dict = field(default_factory=dict)

    def set(self, value, tags=None):
        self.values[tuple((tags or {}).items())] = value

    def inc(self, value, tags):
        assert value > 0
        self.set(self.values.get(tuple(tags.items()), 0) + value, tags)


@pytest.fixture
def exported(monkeypatch):
    """A function that exports these rows; it answers with all values by name and tags."""
    made = {}

    def make(name, *_):
        return made.setdefault(name, Seen(name))

    monkeypatch.setattr(metrics, "Gauge", make)
    monkeypatch.setattr(metrics, "Counter", make)
    fleet = metrics.FleetMetrics()

    def export(*rows):
        plain = dict.fromkeys(("budget_w", "charge_w", "measured_w", "parked_w", "over_budget_w", "over_budget_s"), 1.0)
        fleet.export(SimpleNamespace(**plain, stranded=Stranded(0, 0, 0, 0), replicas=(), slos=rows))
        return {name: {tuple(dict(tags).values()): v for tags, v in seen.values.items()} for name, seen in made.items()}

    return export


def row(model="m", recent=None, total=None, left=None, priority=1):
    recent, total = recent or Verdicts(), total or Verdicts()
    return SloStatus(model, priority, None, recent, total, 1.0, left, 0.002, 0.25, 4)


def test_shares_of_window_and_since_the_start_are_gauges_by_model(exported):
    seen = exported(row(recent=Verdicts(good=3, late_ttft=1), total=Verdicts(good=9, late_tpot=1), left=-0.5))
    assert seen["pals_slo_attainment"] == {("m",): 0.75}
    assert seen["pals_slo_attainment_since_start"] == {("m",): 0.9}
    assert seen["pals_slo_error_budget_left"] == {("m",): -0.5}
    assert seen["pals_slo_itl_over_share"] == {("m",): 0.002}
    assert seen["pals_under_target_share"] == {("m",): 0.25}


def test_where_nothing_was_judged_or_the_model_is_gone_no_alert_would_go_off(exported):
    assert exported(row())["pals_slo_attainment"] == {("m",): 1.0}
    exported(row(recent=Verdicts(late_ttft=1), left=0.0))
    seen = exported(row("other"))
    assert seen["pals_slo_attainment"] == {("m",): 1.0, ("other",): 1.0}
    assert seen["pals_slo_error_budget_left"] == {("m",): 1.0, ("other",): 1.0}
    assert seen["pals_under_target_share"] == {("m",): 0.0, ("other",): 0.25}


def test_requests_are_counted_by_verdict(exported):
    exported(row(total=Verdicts(5, 1, 2, 0, 50)))
    seen = exported(row(total=Verdicts(7, 1, 4, 1, 80)), row("other"))
    assert seen["pals_good_requests"] == {("m", "1"): 7}
    assert seen["pals_good_tokens"] == {("m", "1"): 80}
    assert seen["pals_late_requests"] == {("m", "1", "ttft"): 1, ("m", "1", "tpot"): 4, ("m", "1", "failed"): 1}
