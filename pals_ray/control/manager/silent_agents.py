"""How a silent agent is noticed, and when one that lives counts as hanging. Times are s of the manager's clock."""

from __future__ import annotations

from collections.abc import Iterable

from pals_ray.control.manager.agent_registry import AgentRegistry
from pals_ray.control.manager.commands import FindNode, FindSilentAgent

#: An agent that was not heard for so long is asked whether it lives.
SILENT_S = 3.0
#: One that lives is ended after so long: it beats twice a second, and a driver call that hangs may never return. Where
#: its node was cut off it has as long again as that lasted: TCP waits up to twice as long before it tries again.
HANGS_S = 20.0


def silent(registry: AgentRegistry, nodes: Iterable[str], now_s: float) -> tuple[FindSilentAgent | FindNode, ...]:
    """Every agent that has been silent for too long, and every one of the ledger's nodes that no agent speaks for."""
    heard_s = {name: now_s - registry.silence_s(name, now_s) for name in registry.members}
    agents = [FindSilentAgent(name, time_s) for name, time_s in heard_s.items() if now_s - time_s >= SILENT_S]
    return (*agents, *map(FindNode, set(nodes) - {member.spec.node_id for member in registry.members.values()}))


def hangs(now_s: float, heard_s: float, cut_off_s: float | None) -> bool:
    """Whether a living agent, last heard at `heard_s`, has been silent for too long; `cut_off_s` is when its node was
    last found cut off (None: never)."""
    reached_s = max(heard_s, cut_off_s) if cut_off_s is not None else heard_s
    return now_s - reached_s >= HANGS_S + (reached_s - heard_s)
