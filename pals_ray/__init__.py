"""pals-ray: LLM serving on Ray inside one budget of watts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pals_ray.errors import InfeasibleBudget, PalsError
from pals_ray.types import BudgetChange, BudgetSource, FleetStatus, ReplicaStatus, Target

if TYPE_CHECKING:
    from pals_ray.runtime.client import Fleet, NotRunning, connect

__all__ = [
    "BudgetChange",
    "BudgetSource",
    "Fleet",
    "FleetStatus",
    "InfeasibleBudget",
    "NotRunning",
    "PalsError",
    "ReplicaStatus",
    "Target",
    "connect",
]


def __getattr__(name: str) -> Any:
    # Imported only when asked for: the handle imports Ray, which guardian, ranks and EngineCore do not need.
    if name in {"Fleet", "NotRunning", "connect"}:
        from pals_ray.runtime import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
