"""The status as an operator reads it in a terminal."""

from __future__ import annotations

from math import ceil, floor

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pals_ray.plots.tables import seconds, table
from pals_ray.types import BudgetSource, FleetStatus, Latency, ReplicaStatus, Slo, SloStatus, Target, Verdicts


def budget_line(status: FleetStatus) -> Text:
    """One line: budget, charge, draw, stranded watts."""
    reserve = f" (less {status.reserve_w:g} W reserve)" if status.reserve_w else ""
    line = Text(
        f"budget {status.budget_w:g} W{reserve} | charged {status.charge_w:.0f} W | "
        f"drawn {status.measured_w:.0f} W {status.provenance} | stranded {status.stranded.total_w:.0f} W "
        f"(minimum cap {status.stranded.minimum_cap_w:.0f}, headroom {status.stranded.headroom_w:.0f}, "
        f"not binding {status.stranded.not_binding_w:.0f})"
    )
    if not status.enforced:
        line.append("  UNENFORCED", style="bold red")
    return line


def source_line(source: BudgetSource) -> Text:
    """One line: what moves the budget, and why it is what it is now, a schedule's next change included."""
    if source.kind == "set":
        return Text(f"the budget stays as it was set: {source.set_w:g} W", style="dim")
    what = "a schedule moves the budget" if source.kind == "schedule" else "the draw follows a signal"
    return Text(f"{what} (set: {source.set_w:g} W): {source.reason}")


def target_text(target: Target) -> str:
    """What is wanted of a model, in a few words."""
    parts = [_throughput(target)]
    if target.slo.judges:
        parts.append(f"{_asked(target.slo)} over {target.slo.window_s:g} s")
    if target.slo.itl_p99_s is not None:
        parts.append(f"ITL p99 within {_limit(target.slo.itl_p99_s)}")
    if target.priority:
        parts.append(f"priority {target.priority}")
    if target.min_share:
        parts.append(f"minimum share {target.min_share:.0%}")
    return ", ".join(parts)


def _asked(slo: Slo) -> str:
    limits = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
    within = " and ".join(f"{name} {_limit(limit_s)}" for name, limit_s in limits if limit_s is not None)
    return f"{100 * slo.attainment:g}% of requests within {within}"


def _limit(limit_s: float) -> str:
    return f"{limit_s * 1000:g} ms" if limit_s < 1 else f"{limit_s:g} s"


def _throughput(target: Target) -> str:
    wanted = target.throughput_tokens_per_s
    return "all demand" if wanted is None else f"{wanted:g} tok/s"


def status_view(status: FleetStatus) -> RenderableType:
    """The whole status: the watts, each replica in a few lines, each GPU in one, and what an operator should know."""
    notes = [Text(f"! {note}", style="yellow") for note in status.notes]
    source = () if status.source.kind == "set" else (source_line(status.source),)
    replicas = map(_replica, status.replicas)
    return Group(budget_line(status), *source, _facts(status), *notes, *replicas, Text(), _slos(status), _gpus(status))


def _facts(status: FleetStatus) -> Text:
    scale = f" | virtual GPUs at time scale {status.time_scale:g}" if status.time_scale is not None else ""
    settle = "" if status.last_settle_s is None else f"; last cut in force after {status.last_settle_s * 1000:.0f} ms"
    return Text(
        f"parked {status.parked_w:.0f} W | unmanaged draw {status.unmanaged_w:.0f} W | over budget so far "
        f"{status.over_budget_s:.1f} s, at worst {status.over_budget_w:.0f} W{settle} | policy {status.policy}{scale}",
        style="dim",
    )


def _replica(replica: ReplicaStatus) -> Text:
    seen, slo, text = replica.telemetry, replica.target.slo, Text()
    text.append(f"\n{replica.replica_id}", style="bold")
    text.append(f"  {replica.state}, {replica.num_gpus} GPU on node {replica.node_id[:8]}\n")
    text.append(
        f"  cap {_number(replica.cap_w, '.0f')} W/GPU, batch limit {_number(replica.batch_limit, 'd')} of "
        f"{replica.max_batch} | running {seen.running}, waiting {seen.waiting} | "
        f"{seen.throughput_tokens_per_s:.0f} tok/s of {_throughput(replica.target)}, "
        f"{_number(replica.tokens_per_joule, '.2f')} tok/J\n"
        f"  TTFT {_percentiles(seen.ttft, slo.ttft_s)} | TPOT {_percentiles(seen.tpot, slo.tpot_s)} | "
        f"ITL {_percentiles(seen.itl, slo.itl_p99_s)}\n"
        f"  draws {seen.power_w:.0f} W {replica.provenance} of {replica.charge_w:.0f} W charged, "
        f"cap binds {seen.binding_share:.0%} | late steps {seen.late_share:.1%}\n"
    )
    if replica.expected is not None:
        said, (throughput, power) = replica.expected, replica.correction
        text.append(
            f"  predicted {said.capacity_tokens_per_s:.0f} tok/s at most for {said.demand_tokens_per_s:.0f} demanded, "
            f"{said.running:.0f} running, {said.node_w:.0f} W, {said.attainment:.1%} good | by the "
            f"{replica.predicted_by}, corrected x{throughput:.2f} tok/s x{power:.2f} W\n"
        )
    text.append(f"  {replica.reason}\n  grant {replica.grant_w:.0f} W: {replica.grant_reason}", style="italic")
    return text


def _slos(status: FleetStatus) -> Table:
    """How each model and each priority class keeps its SLO: a line of the window, and one since the manager started."""
    rows = (*status.slos, *status.slos_by_priority)
    gaps = any(row.slo is not None and row.slo.itl_p99_s is not None for row in rows)
    tokens = any(row.intervals for row in rows)
    headers = ["SLO", "requests", "good", "late by TTFT / TPOT / failure", "error budget left"]
    headers += ["long gaps"] * gaps + ["under tok/s"] * tokens
    lines: list[tuple[str, ...]] = []
    for row in rows:
        window = "in window" if row.slo is None else f"last {row.slo.window_s:g} s"
        over, under = _number(row.itl_over_share, ".2%"), _number(row.under_target_share, ".1%")
        name = row.model or f"priority {row.priority}"
        lines.append((name, window, *_counts(row.recent), _budget_left(row), *[over] * gaps, *[""] * tokens))
        asked = "" if row.slo is None else f"{100 * row.slo.attainment:g}% asked" if row.slo.judges else "no limits"
        lines.append((asked, "since start", *_counts(row.total), "", *[""] * gaps, *[under] * tokens))
    return table(headers, lines, left=("SLO", "requests"), fold=True, box=SIMPLE, pad_edge=False)


def _counts(seen: Verdicts) -> tuple[str, str]:
    good = "-" if seen.attainment is None else f"{_floor_percent(seen.attainment)} of {seen.judged}"
    return good, f"{seen.late_ttft} / {seen.late_tpot} / {seen.late_failed}"


def _floor_percent(share: float) -> str:
    """Rounded down, so that nothing that misses 99 % is shown as 99.0 %."""
    return f"{floor(1000 * share + 1e-9) / 10:.1f}%"


def _budget_left(row: SloStatus) -> str:
    """The share that is left, and how many more requests may be late, or how many are late over what is allowed."""
    if row.error_budget_left is None:
        return "-"
    left = row.allowed - row.recent.late
    if left < 0:
        return f"[bold red]{row.error_budget_left:.0%}, {ceil(-left)} over[/]"
    return f"{row.error_budget_left:.0%}, {floor(left)} more"


def _gpus(status: FleetStatus) -> Table:
    rows = (
        (
            f"{gpu.uuid} ({gpu.product})",
            f"{gpu.limit_w:.0f}{'' if gpu.enforceable else ' not ours to set'}",
            f"{gpu.power_w:.0f}",
            gpu.replica_id or "parked",
        )
        for gpu in status.gpus
    )
    headers = ("GPU", "limit W", "draw W", "held by")
    return table(headers, rows, left=("GPU", "held by"), fold=True, box=SIMPLE, pad_edge=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percentiles(seen: Latency, limit_s: float | None) -> str:
    limit = "" if limit_s is None else f" (limit {_limit(limit_s)})"
    return f"p50 {seconds(seen.p50_s)} p99 {seconds(seen.p99_s)}{limit}"
