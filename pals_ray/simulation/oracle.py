"""What nobody can know beforehand: the best fixed operating point for a load, and the highest load of a fixed point.

Both are searched for by trying in the simulator; what is tried is told by a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

from pals_ray.types import OperatingPoint

#: After so many batches one after another that do not attain, no smaller one is tried.
_MOST_MISSES = 2


@dataclass(frozen=True, slots=True)
class Tried:
    """A fixed point that was tried: whether it attains what is asked, its tokens per joule, and how many sequences ran
    on one replica at most."""

    point: OperatingPoint
    attains: bool
    tokens_per_joule: float
    most_running: float


def best_fixed(
    try_at: Callable[[OperatingPoint], Tried], caps_w: Sequence[float], batches: Sequence[int]
) -> Tried | None:
    """Of all pairs of a cap (ascending) and a batch the one that attains what is asked at the most tokens per joule;
    None where none does.

    What a cap attains a higher one attains too, at more watts. So each batch, the largest first, is tried at the best
    cap so far, and where it attains there its least cap is found by bisection. A limit that nothing reaches changes
    nothing. A smaller batch is faster and lets more wait: once some attain, those below `_MOST_MISSES` that do not are
    left out.
    """
    best: Tried | None = None
    high, misses, reached = len(caps_w) - 1, 0, inf
    for batch in sorted(batches, reverse=True):
        if batch > reached:
            continue
        if best is not None and misses == _MOST_MISSES:
            break
        found = try_at(OperatingPoint(caps_w[high], batch))
        misses = 0 if found.attains else misses + 1
        if not found.attains:
            continue
        at, low, step = high, 0, 1
        while low < at:
            # Steps down from the best cap so far grow as long as they attain: mostly the first one does not.
            middle = max(at - step, low) if step else (low + at) // 2
            lower = try_at(OperatingPoint(caps_w[middle], batch))
            if lower.attains:
                found, at, step = lower, middle, 2 * step
            else:
                low, step = middle + 1, 0
        reached = found.most_running
        if best is None or found.tokens_per_joule > best.tokens_per_joule:
            best, high = found, at
    return best


def best_flat_out(
    try_at: Callable[[OperatingPoint], Tried], caps_w: Sequence[float], batches: Sequence[int]
) -> Tried | None:
    """The same where as much is served as a point can: then a higher cap may give more tokens per joule too.

    For each batch the least cap that attains is found by bisection, and above it the peak of tokens per joule, which
    first rise with the cap and then fall. They rise with the batch: after `_MOST_MISSES` batches, the largest first,
    that are no better no smaller one is tried.
    """
    best: Tried | None = None
    misses, last = 0, len(caps_w) - 1
    for batch in sorted(batches, reverse=True):
        at = partial(_at, try_at, caps_w, batch)
        down = highest(partial(_attains_below, at, last), 0, last)
        if down is not None:
            low, high = last - down, last
            while high - low > 2:
                third = (high - low) // 3
                rises = at(high - third).tokens_per_joule > at(low + third).tokens_per_joule
                low, high = (low + third, high) if rises else (low, high - third)
            found = max((at(index) for index in range(low, high + 1)), key=lambda tried: tried.tokens_per_joule)
            if best is None or found.tokens_per_joule > best.tokens_per_joule:
                best, misses = found, 0
                continue
        misses += 1
        if best is not None and misses == _MOST_MISSES:
            break
    return best


def _at(try_at: Callable[[OperatingPoint], Tried], caps_w: Sequence[float], batch: int, index: int) -> Tried:
    return try_at(OperatingPoint(caps_w[index], batch))


def _attains_below(at: Callable[[int], Tried], last: int, down: int) -> bool:
    return at(last - down).attains


def highest(attains: Callable[[int], bool], low: int, high: int) -> int | None:
    """The highest of the numbers from `low` to `high` that attains, of which all below do too; None where none does."""
    if not attains(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if attains(middle) else (low, middle - 1)
    return low
