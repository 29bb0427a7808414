"""What the manager's core asks its driver to do."""

from __future__ import annotations

from dataclasses import dataclass

from pals_ray.control.messages import ParkOrder
from pals_ray.types import Grant


@dataclass(frozen=True, slots=True)
class PushGrant:
    """Push a grant to its replica's agent; the report that confirms it goes to `confirmed`."""

    grant: Grant


@dataclass(frozen=True, slots=True)
class PushParking:
    """Push an order to park free GPUs to the agent of its executor; the report that confirms it goes to `confirmed`."""

    order: ParkOrder


@dataclass(frozen=True, slots=True)
class WriteState:
    """What has to outlive the manager has changed: write it, then tell `written` this number. One write does for many.

    No answer to an agent or an operator may go before all that was asked so far is written.
    """

    number: int


@dataclass(frozen=True, slots=True)
class WhenWritten:
    """Carry these out once all that was to be written so far is on disk; never, where it cannot be written."""

    commands: tuple[PushGrant | PushParking, ...]


@dataclass(frozen=True, slots=True)
class RaiseAt:
    """Call `raise_released` at this time, s of the manager's clock."""

    time_s: float


@dataclass(frozen=True, slots=True)
class DivideSoon:
    """Something has changed that asks for a new division: begin the next beat now."""


@dataclass(frozen=True, slots=True)
class FindSilentAgent:
    """An agent was last heard at `heard_s`, too long ago: find out whether it and its node live, else replace it."""

    replica_id: str
    heard_s: float


@dataclass(frozen=True, slots=True)
class FindNode:
    """No agent speaks for a node: find out whether it lives, and tell `node_lost` or `node_gone` if not."""

    node_id: str


Command = PushGrant | PushParking | WriteState | WhenWritten | RaiseAt | DivideSoon | FindSilentAgent | FindNode
