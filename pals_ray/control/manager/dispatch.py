"""In which order orders leave the manager: cuts first and at once, raises only when what they rest on is written down.

A disk may take longer than a cut has. Lost with this manager, a cut costs speed: what is on disk charges no less, and
the next manager raises the replica again. But a cut from a raise that still waits for the disk may lift a limit, so it
waits too.
"""

from __future__ import annotations

from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.manager.commands import Command, PushGrant, PushParking, WhenWritten, WriteState
from pals_ray.control.messages import Commands


class Dispatch:
    """Knows what was to be written and what is; numbers are those of `WriteState`."""

    def __init__(self) -> None:
        self._asked = self._on_disk = 0

    @property
    def is_written(self) -> bool:
        """Whether all that was to be written is on disk."""
        return self._on_disk == self._asked

    def write(self, ledger: Ledger | None) -> tuple[Command, ...]:
        """Have the state written, the ledger's memo with it."""
        if ledger is not None:
            ledger.saved()  # written from here on: nothing is sent or answered before it is on disk
        self._asked += 1
        return (WriteState(self._asked),)

    def written(self, number: int) -> None:
        """All that was asked up to this number is on disk."""
        self._on_disk = max(self._on_disk, number)

    def send(self, orders: Commands, ledger: Ledger, *, record_changed: bool = False) -> tuple[Command, ...]:
        """Push the ledger's orders; with `record_changed` something beside the ledger is to be written down too."""
        at_once = tuple(cut for cut in orders.cuts if self.is_written or ledger.lowers(cut))
        waiting = tuple(grant for grant in (*orders.cuts, *orders.raises) if grant not in at_once)
        rest: tuple[PushGrant | PushParking, ...] = (*map(PushGrant, waiting), *map(PushParking, orders.parks))
        writes = self.write(ledger) if record_changed or ledger.unsaved else ()
        if rest and not self.is_written:
            return (*map(PushGrant, at_once), *writes, WhenWritten(rest))
        return (*map(PushGrant, at_once), *writes, *rest)
