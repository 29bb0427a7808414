"""The status as Ray metrics, for Prometheus: set on the manager's beat. A new metric is a line of a table here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ray.util.metrics import Counter, Gauge

from pals_ray.types import FleetStatus, ReplicaStatus, SloStatus, Stranded, Verdicts

# Each table: the metric's name (without its prefix) or its label, its description, and where the value comes from.
_FLEET: tuple[tuple[str, str, Callable[[FleetStatus], float]], ...] = (
    ("budget_watts", "The fleet's budget, W at node level.", lambda fleet: fleet.budget_w),
    ("charge_watts", "What all managed GPUs occupy, W at node level.", lambda fleet: fleet.charge_w),
    ("power_watts", "Draw of all managed GPUs plus overhead, W.", lambda fleet: fleet.measured_w),
    ("parked_watts", "Charge of GPUs that no replica holds, W.", lambda fleet: fleet.parked_w),
    (
        "over_budget_worst_watts",
        "The worst excess of measured draw over the budget so far, W.",
        lambda fleet: fleet.over_budget_w,
    ),
)
_STRANDED_CAUSES: dict[str, Callable[[Stranded], float]] = {
    "minimum_cap": lambda stranded: stranded.minimum_cap_w,
    "headroom": lambda stranded: stranded.headroom_w,
    "not_binding": lambda stranded: stranded.not_binding_w,
}
_REPLICA: tuple[tuple[str, str, Callable[[ReplicaStatus], float | None]], ...] = (
    ("cap_watts", "Power cap of each GPU of a replica, W.", lambda row: row.cap_w),
    ("grant_watts", "Charge that a replica is granted, W.", lambda row: row.grant_w),
    ("power_watts", "Draw of a replica's GPUs, W.", lambda row: row.telemetry.power_w),
    ("batch_limit", "Sequences that a replica may run at once.", lambda row: row.batch_limit),
    ("running", "Requests running.", lambda row: row.telemetry.running),
    ("waiting", "Requests waiting.", lambda row: row.telemetry.waiting),
    ("tokens_per_second", "Output tokens/s.", lambda row: row.telemetry.throughput_tokens_per_s),
    ("demand_tokens_per_second", "Output tokens/s that arrive.", lambda row: row.demand_tokens_per_s),
    ("tokens_per_joule", "Output tokens for each joule of its GPUs.", lambda row: row.tokens_per_joule),
)
# A share of which there was nothing to judge is exported as if all had been well, so that no alert goes off.
_SLO_GAUGES: tuple[tuple[str, str, Callable[[SloStatus], float | None], float], ...] = (
    ("slo_attainment", "Share of good requests in the SLO's window.", lambda row: row.recent.attainment, 1.0),
    ("slo_attainment_since_start", "Share of good requests so far.", lambda row: row.total.attainment, 1.0),
    (
        "slo_error_budget_left",
        "Share of the late requests that the SLO allows in its window that is left; below 0 with more.",
        lambda row: row.error_budget_left,
        1.0,
    ),
    (
        "slo_itl_over_share",
        "Share of gaps between tokens in the SLO's window over slo.itl_p99_s.",
        lambda row: row.itl_over_share,
        0.0,
    ),
    (
        "under_target_share",
        "Share of intervals of 5 s under the target tokens/s while work was waiting.",
        lambda row: row.under_target_share,
        0.0,
    ),
)
_VERDICTS: tuple[tuple[str, str, Callable[[Verdicts], int]], ...] = (
    ("good_requests", "Requests that kept TTFT and TPOT limits.", lambda verdicts: verdicts.good),
    ("good_tokens", "Output tokens of good requests.", lambda verdicts: verdicts.good_tokens),
)
_LATE_BY: dict[str, Callable[[Verdicts], int]] = {
    "ttft": lambda verdicts: verdicts.late_ttft,
    "tpot": lambda verdicts: verdicts.late_tpot,
    "failed": lambda verdicts: verdicts.late_failed,
}


class FleetMetrics:
    """Gauges in W, tokens/s, sequences, shares; counters of requests, tokens, seconds. Units are in the names."""

    def __init__(self) -> None:
        self._fleet = [(Gauge(f"pals_{name}", text), value) for name, text, value in _FLEET]
        self._stranded = Gauge("pals_stranded_watts", "Charge that nobody uses, W, by cause.", ("cause",))
        self._replica = [
            (Gauge(f"pals_replica_{name}", text, ("model", "replica")), value) for name, text, value in _REPLICA
        ]
        of_model = ("model", "priority")
        self._slo = [(Gauge(f"pals_{name}", text, ("model",)), value, well) for name, text, value, well in _SLO_GAUGES]
        self._verdicts = [(name, Counter(f"pals_{name}", text, of_model), value) for name, text, value in _VERDICTS]
        self._late = Counter("pals_late_requests", "Late requests, by what made them so.", (*of_model, "by"))
        self._over_budget = Counter("pals_over_budget_seconds", "How long measured draw was above the budget, s.")
        self._counted: dict[tuple[str, str], float] = {}
        self._shown: dict[str, str] = {}
        self._models: set[str] = set()

    def export(self, status: FleetStatus) -> None:
        """Set every gauge, and add to the counters what has come since the last time."""
        for gauge, value in self._fleet:
            gauge.set(value(status))
        for cause, watts in _STRANDED_CAUSES.items():
            self._stranded.set(watts(status.stranded), {"cause": cause})
        self._set_replicas(status.replicas)
        self._set_models(status.slos)
        self._count(self._over_budget, "over_budget_seconds", "", status.over_budget_s, {})

    def _set_replicas(self, rows: Iterable[ReplicaStatus]) -> None:
        here = {row.replica_id: row.model for row in rows}
        for gone in self._shown.keys() - here.keys():
            for gauge, _ in self._replica:
                gauge.set(0.0, {"model": self._shown[gone], "replica": gone})
        self._shown = here
        for row in rows:
            for gauge, value in self._replica:
                gauge.set(value(row) or 0.0, {"model": row.model, "replica": row.replica_id})

    def _set_models(self, rows: Iterable[SloStatus]) -> None:
        here = {row.model or "": row for row in rows}
        for model in self._models | here.keys():
            for gauge, value, well in self._slo:
                share = value(here[model]) if model in here else None
                gauge.set(well if share is None else share, {"model": model})
        self._models = set(here)
        for model, row in here.items():
            tags = {"model": model, "priority": str(row.priority)}
            for name, counter, count in self._verdicts:
                self._count(counter, name, model, count(row.total), tags)
            for by, count in _LATE_BY.items():
                self._count(self._late, f"late_requests by {by}", model, count(row.total), {**tags, "by": by})

    def _count(self, counter: Counter, name: str, of: str, total: float, tags: Mapping[str, str]) -> None:
        more = total - self._counted.get((name, of), 0.0)
        if more > 0.0:
            counter.inc(more, dict(tags))
            self._counted[name, of] = total
