"""How each model keeps its SLO and its tokens/s, from the tallies that its replicas' agents send."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from pals_ray.control.manager.agent_registry import AgentRegistry
from pals_ray.control.slo import SloState, Tally, observe, status_of
from pals_ray.types import SloStatus, Target

log = logging.getLogger("pals.manager")


class SloAccounts:
    """One account a model, from its making on; times are s of the manager's monotonic clock."""

    def __init__(self) -> None:
        self._states: dict[str, SloState] = {}
        self._warned: dict[str, str] = {}

    def observe(self, registry: AgentRegistry, targets: Mapping[str, Target], now_s: float) -> None:
        """Take the present tallies of all replicas in, and log which limits no point can keep, each once."""
        tallies: dict[str, dict[str, Tally]] = {model: {} for model in targets}
        for name, member in registry.members.items():
            if member.spec.model in tallies and member.beat is not None and member.beat.tally is not None:
                tallies[member.spec.model][name] = member.beat.tally
        for model, target in targets.items():
            self._states[model] = observe(self._states.get(model, SloState()), now_s, tallies[model], target)
        notes = {row.model or "": note for row in self.statuses(registry, targets) if (note := unreachable(row))}
        for model, note in notes.items():
            if self._warned.get(model) != note:
                log.warning(note)
        self._warned = notes

    def statuses(self, registry: AgentRegistry, targets: Mapping[str, Target]) -> tuple[SloStatus, ...]:
        """What status and metrics show of each model."""
        fastest_s = fastest_tpots_s(registry)
        return tuple(
            replace(status_of(model, target, self._states.get(model, SloState())), fastest_tpot_s=fastest_s.get(model))
            for model, target in targets.items()
        )


def fastest_tpots_s(registry: AgentRegistry) -> dict[str, float]:
    """By model, the TPOT that it is predicted at with one sequence and every GPU at its highest cap, s.

    Of several replicas that of the slowest; a model that nothing predicts is not there.
    """
    most_w = {device.node_id: device.gpu.info.max_limit_w for device in registry.devices.values()}
    surfaces = {
        (member.spec.model, most_w[member.spec.node_id], id(member.model)): member.model.surface
        for member in registry.members.values()
        if member.model is not None and member.spec.node_id in most_w
    }
    found: dict[str, float] = {}
    for (model, cap_w, _), surface in surfaces.items():
        alone = surface.predict(cap_w, 1)
        found[model] = max(found.get(model, 0.0), 1.0 / float(alone.throughput_tokens_per_s))
    return found


def unreachable(row: SloStatus) -> str | None:
    """What to tell an operator of a TPOT limit that a model cannot keep; None where it may."""
    if row.slo is None or row.slo.tpot_s is None or row.fastest_tpot_s is None or row.slo.tpot_s >= row.fastest_tpot_s:
        return None
    return (
        f"{row.model}: a TPOT of {row.slo.tpot_s * 1000:.3g} ms is asked, but {row.fastest_tpot_s * 1000:.3g} ms is "
        "predicted for one sequence at the highest cap: its requests will be late; raise slo.tpot_s above that, or "
        "serve the model on more or faster GPUs"
    )
