"""Schedules: which budget a schedule asks for at an instant, ramps included. Times are Unix s."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise, takewhile


@dataclass(frozen=True, slots=True)
class Entry:
    """A budget of `budget_w` from `start_s` to `end_s`, Unix s; -inf and inf leave an end open.

    `ramp_s` is how long the budget takes to come down to the entry, or to rise from it again.
    """

    start_s: float
    end_s: float
    budget_w: float
    ramp_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of time and the entry that holds in it; None: the base budget."""

    start_s: float
    end_s: float
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Entries in any order. Where some overlap the lowest holds, so that every one of them is kept."""

    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Scheduled:
    """What a schedule asks for now, W, and why.

    The budget stays what it is until `next_change_s`, Unix s: now itself on a ramp, inf where nothing follows.
    """

    budget_w: float
    reason: str
    next_change_s: float


@dataclass(frozen=True, slots=True)
class _Ramp:
    """A straight line over time that the budget stays under."""

    start_s: float
    end_s: float
    from_w: float
    to_w: float

    def at_w(self, wall_s: float) -> float:
        share = (wall_s - self.start_s) / (self.end_s - self.start_s)
        return self.from_w + (self.to_w - self.from_w) * share


def budget_at(schedule: Schedule, base_w: float, wall_s: float) -> Scheduled:
    """The budget at Unix time `wall_s`; `base_w` is the budget while no entry holds.

    A change down is over when its entry starts, a change up begins when the lower budget ends, so the budget is never
    above what entries and base say for the instant itself. A change takes the `ramp_s` of the lower of the two sides
    (of the other where the lower is the base). Where it reaches over further entries, the lowest line counts.
    """
    pieces = _pieces(schedule.entries)
    piece = pieces[bisect_right(pieces, wall_s, key=lambda p: p.start_s) - 1]
    level_w = _level_w(piece, base_w)
    ramps = [ramp for index in range(1, len(pieces)) if (ramp := _ramp_into(pieces, index, base_w)) is not None]
    lowest = min(
        (ramp for ramp in ramps if ramp.start_s <= wall_s <= ramp.end_s),
        key=lambda ramp: ramp.at_w(wall_s),
        default=None,
    )
    if lowest is not None and (now_w := lowest.at_w(wall_s)) < level_w:
        way = "down" if lowest.to_w < lowest.from_w else "up"
        reason = f"on the ramp {way} from {lowest.from_w:g} W to {lowest.to_w:g} W, which ends at {_utc(lowest.end_s)}"
        return Scheduled(now_w, reason, wall_s)
    meets_s = [_meets_s(ramp, level_w) for ramp in ramps if ramp.end_s > wall_s and ramp.to_w < level_w <= ramp.from_w]
    next_s = max(wall_s, min([piece.end_s, *meets_s]))
    if piece.entry is None:
        why = f"the budget that is set, {base_w:g} W: no entry of the schedule holds"
    else:
        why = f"entry {schedule.entries.index(piece.entry) + 1} of the schedule: {level_w:g} W"
    return Scheduled(level_w, why + (f", until {_utc(next_s)}" if math.isfinite(next_s) else ", from now on"), next_s)


def at_least(asked_w: float, needed_w: float, who: str) -> tuple[float, str | None]:
    """Raise a budget to `needed_w`, what the fleet needs at its lowest caps, with a warning that names the watts.

    None instead of a warning where `asked_w` is enough. `who` is what asked, as in "the schedule".
    """
    if asked_w >= needed_w:
        return asked_w, None
    needed = f"{math.ceil(needed_w):d} W"
    return needed_w, f"{who} asks for {asked_w:.0f} W, but the fleet at its lowest caps needs {needed}: held at that"


@lru_cache(maxsize=8)
def _pieces(entries: tuple[Entry, ...]) -> tuple[Piece, ...]:
    cuts = sorted({-math.inf, math.inf, *(e.start_s for e in entries), *(e.end_s for e in entries)})
    pieces: list[Piece] = []
    for start_s, end_s in pairwise(cuts):
        holding = [e for e in entries if e.start_s <= start_s and end_s <= e.end_s]
        entry = min(holding, key=lambda e: e.budget_w, default=None)
        if pieces and pieces[-1].entry is entry:
            start_s = pieces.pop().start_s
        pieces.append(Piece(start_s, end_s, entry))
    return tuple(pieces)


def _level_w(piece: Piece, base_w: float) -> float:
    return base_w if piece.entry is None else piece.entry.budget_w


def _ramp_into(pieces: tuple[Piece, ...], index: int, base_w: float) -> _Ramp | None:
    """The ramp that belongs to the change between a piece and the one before it.

    Its high end is the highest budget within the ramp's time, so that the budget has no step where the ramp sets in.
    """
    before, after = pieces[index - 1], pieces[index]
    before_w, after_w = _level_w(before, base_w), _level_w(after, base_w)
    lower, higher = (before, after) if before_w < after_w else (after, before)
    entry = lower.entry or higher.entry
    if before_w == after_w or entry is None or entry.ramp_s == 0.0:
        return None
    change_s = after.start_s
    if after_w < before_w:
        start_s = change_s - entry.ramp_s
        reached = takewhile(lambda p: p.end_s > start_s, pieces[index - 1 :: -1])
        return _Ramp(start_s, change_s, max(_level_w(p, base_w) for p in reached), after_w)
    end_s = change_s + entry.ramp_s
    reached = takewhile(lambda p: p.start_s < end_s, pieces[index:])
    return _Ramp(change_s, end_s, before_w, max(_level_w(p, base_w) for p in reached))


def _meets_s(ramp: _Ramp, level_w: float) -> float:
    """When a ramp down comes under a level that lies between its ends."""
    return ramp.start_s + (ramp.from_w - level_w) / (ramp.from_w - ramp.to_w) * (ramp.end_s - ramp.start_s)


def _utc(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
