"""The status as Ray metrics, for Prometheus: set on the manager's beat. A new metric is a line of a table here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ray.util.metrics import Counter, Gauge

from pals_ray.types import FleetStatus, QosStatus, ReplicaStatus, Stranded

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
_QOS: tuple[tuple[str, str, Callable[[QosStatus], float]], ...] = (
    ("qos_intervals", "Intervals of 5 s judged.", lambda row: row.totals.intervals),
    ("violations", "Intervals in violation of a model's target.", lambda row: row.totals.violations),
    ("ttft_late_requests", "Requests whose TTFT was over its limit.", lambda row: row.totals.requests_late),
    ("itl_late_tokens", "Tokens whose inter-token latency was over its limit.", lambda row: row.totals.tokens_late),
)


class FleetMetrics:
    """Gauges in W, tokens/s, sequences; counters of intervals, late requests, seconds. Units are in the names."""

    def __init__(self) -> None:
        self._fleet = [(Gauge(f"pals_{name}", text), value) for name, text, value in _FLEET]
        self._stranded = Gauge("pals_stranded_watts", "Charge that nobody uses, W, by cause.", ("cause",))
        self._replica = [
            (Gauge(f"pals_replica_{name}", text, ("model", "replica")), value) for name, text, value in _REPLICA
        ]
        self._qos = [(name, Counter(f"pals_{name}", text, ("model", "priority")), value) for name, text, value in _QOS]
        self._over_budget = Counter("pals_over_budget_seconds", "How long measured draw was above the budget, s.")
        self._counted: dict[tuple[str, str], float] = {}
        self._shown: dict[str, str] = {}

    def export(self, status: FleetStatus) -> None:
        """Set every gauge, and add to the counters what has come since the last time."""
        for gauge, value in self._fleet:
            gauge.set(value(status))
        for cause, watts in _STRANDED_CAUSES.items():
            self._stranded.set(watts(status.stranded), {"cause": cause})
        self._set_replicas(status.replicas)
        for row in status.qos:
            tags = {"model": row.model or "", "priority": str(row.priority)}
            for name, counter, total in self._qos:
                self._count(counter, name, tags["model"], total(row), tags)
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

    def _count(self, counter: Counter, name: str, of: str, total: float, tags: Mapping[str, str]) -> None:
        more = total - self._counted.get((name, of), 0.0)
        if more > 0.0:
            counter.inc(more, dict(tags))
            self._counted[name, of] = total
