"""What has to outlive a manager: the next one goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pals_ray.control.budget.moving_budget import BudgetPlan
from pals_ray.control.messages import NodeMemo, ReplicaSpec
from pals_ray.types import Target


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """What has to outlive a manager. `budget_w` is the budget that was set, `plan` what moves it since (None: nothing),
    `targets` are those that were changed since the deployment."""

    epoch: int = 0
    budget_w: float = 0.0
    plan: BudgetPlan | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    nodes: tuple[NodeMemo, ...] = ()
    agents: Mapping[str, ReplicaSpec] = field(default_factory=dict)
