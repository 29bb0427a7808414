"""What an agent's core asks its driver to do. Limits and caps are W per GPU; GPUs go by UUID.

Of `ReadLimits`, `SetLimits` and `SetGroupCap` at most one is under way at a time. The driver tells the core what came
of it: `limits_read` after the first, `limits_set` after the others, `call_failed` where it failed as nobody foresaw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pals_ray.control.messages import Hello


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Read the limit in force of each of these GPUs."""

    uuids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SetLimits:
    """Set each GPU's own limit."""

    limits_w: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SetGroupCap:
    """Bring the replica's GPUs, now at `limits_w`, to one cap, so that none ends above another one that cannot rise."""

    limits_w: Mapping[str, float]
    cap_w: float


@dataclass(frozen=True, slots=True)
class OrderEngine:
    """Tell the engine its batch limit, whether the request router is to pass the replica by, and the limits on TTFT and
    TPOT that requests are judged by, s; inf where there is none."""

    batch_limit: int
    parked: bool
    ttft_limit_s: float
    tpot_limit_s: float


@dataclass(frozen=True, slots=True)
class SayHello:
    """Say hello to the manager; its answer goes to `answered`."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class SendBeat:
    """Send the manager a beat (`AgentCore.beat`); its answer goes to `answered`."""


@dataclass(frozen=True, slots=True)
class ConfirmGrant:
    """A newer grant is in force: the manager is to hear of it at once, by the answer to its push or by a beat."""


Command = ReadLimits | SetLimits | SetGroupCap | OrderEngine | SayHello | SendBeat | ConfirmGrant
