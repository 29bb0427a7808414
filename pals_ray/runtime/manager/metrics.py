"""The status as Ray metrics, for Prometheus: set on the manager's beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge

from pals_ray.types import FleetStatus, QosStatus, ReplicaStatus


class FleetMetrics:
    """Gauges in W, tokens/s, sequences; counters of intervals, late requests, seconds. Units are in the names."""

    def __init__(self) -> None:
        self._fleet = {
            name: Gauge(f"pals_{name}", text)
            for name, text in (
                ("budget_watts", "The fleet's budget, W at node level."),
                ("charge_watts", "What all managed GPUs occupy, W at node level."),
                ("power_watts", "Draw of all managed GPUs plus overhead, W."),
                ("parked_watts", "Charge of GPUs that no replica holds, W."),
                ("over_budget_worst_watts", "The worst excess of measured draw over the budget so far, W."),
            )
        }
        self._stranded = Gauge("pals_stranded_watts", "Charge that nobody uses, W, by cause.", ("cause",))
        self._replica = {
            name: Gauge(f"pals_replica_{name}", text, ("model", "replica"))
            for name, text in (
                ("cap_watts", "Power cap of each GPU of a replica, W."),
                ("grant_watts", "Charge that a replica is granted, W."),
                ("power_watts", "Draw of a replica's GPUs, W."),
                ("batch_limit", "Sequences that a replica may run at once."),
                ("running", "Requests running."),
                ("waiting", "Requests waiting."),
                ("tokens_per_second", "Output tokens/s."),
                ("demand_tokens_per_second", "Output tokens/s that arrive."),
                ("tokens_per_joule", "Output tokens for each joule of its GPUs."),
            )
        }
        self._counters = {
            name: Counter(f"pals_{name}", text, ("model", "priority"))
            for name, text in (
                ("qos_intervals", "Intervals of 5 s judged."),
                ("violations", "Intervals in violation of a model's target."),
                ("ttft_late_requests", "Requests whose TTFT was over its limit."),
                ("itl_late_tokens", "Tokens whose inter-token latency was over its limit."),
            )
        }
        self._over_budget = Counter("pals_over_budget_seconds", "How long measured draw was above the budget, s.")
        self._counted: dict[tuple[str, str], float] = {}
        self._shown: dict[str, str] = {}

    def export(self, status: FleetStatus) -> None:
        """Set every gauge, and count on what was counted since the last time."""
        values = (
            status.budget_w,
            status.charge_w,
            status.measured_w,
            status.parked_w,
            status.over_budget_w,
        )
        for gauge, value in zip(self._fleet.values(), values, strict=True):
            gauge.set(value)
        stranded = status.stranded
        causes = {
            "minimum_cap": stranded.minimum_cap_w,
            "headroom": stranded.headroom_w,
            "not_binding": stranded.not_binding_w,
        }
        for cause, watts in causes.items():
            self._stranded.set(watts, {"cause": cause})
        self._replicas(status.replicas)
        for row in status.qos:
            self._count_qos(row)
        self._count(self._over_budget, "over_budget_seconds", "", status.over_budget_s, {})

    def _replicas(self, rows: Iterable[ReplicaStatus]) -> None:
        here = {row.replica_id: row.model for row in rows}
        for gone in self._shown.keys() - here.keys():
            tags = {"model": self._shown[gone], "replica": gone}
            for gauge in self._replica.values():
                gauge.set(0.0, tags)
        self._shown = here
        for row in rows:
            seen = row.telemetry
            values: tuple[float | None, ...] = (
                row.cap_w,
                row.grant_w,
                seen.power_w,
                row.batch_limit,
                seen.running,
                seen.waiting,
                seen.throughput_tokens_per_s,
                row.demand_tokens_per_s,
                row.tokens_per_joule,
            )
            for gauge, value in zip(self._replica.values(), values, strict=True):
                gauge.set(value or 0.0, {"model": row.model, "replica": row.replica_id})

    def _count_qos(self, row: QosStatus) -> None:
        tags = {"model": row.model or "", "priority": str(row.priority)}
        totals = row.totals
        values = (totals.intervals, totals.violations, totals.requests_late, totals.tokens_late)
        for (name, counter), value in zip(self._counters.items(), values, strict=True):
            self._count(counter, name, tags["model"], value, tags)

    def _count(self, counter: Counter, name: str, of: str, total: float, tags: Mapping[str, str]) -> None:
        more = total - self._counted.get((name, of), 0.0)
        if more > 0.0:
            counter.inc(more, dict(tags))
            self._counted[name, of] = total
