"""Violations and misses of each model, from the tallies that its replicas' agents send."""

from __future__ import annotations

from collections.abc import Mapping

from pals_ray.control.manager.fleet_status import Member
from pals_ray.control.slo import SloState, observe, status_of
from pals_ray.types import SloStatus, Target


class SloAccounts:
    """One account a model, from its making on; times are s of the manager's monotonic clock."""

    def __init__(self) -> None:
        self._states: dict[str, SloState] = {}

    def observe(self, members: Mapping[str, Member], targets: Mapping[str, Target], now_s: float) -> None:
        """Take the present tallies of all replicas in."""
        for model, target in targets.items():
            tallies = {
                name: member.beat.tally
                for name, member in members.items()
                if member.spec.model == model and member.beat is not None and member.beat.tally is not None
            }
            self._states[model] = observe(self._states.get(model, SloState()), now_s, tallies, target)

    def statuses(self, targets: Mapping[str, Target]) -> tuple[SloStatus, ...]:
        """What status and metrics show of each model."""
        return tuple(status_of(model, target, self._states.get(model, SloState())) for model, target in targets.items())
