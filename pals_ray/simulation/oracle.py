"""What nobody can know beforehand: the best fixed operating point for a load, and the highest load of a fixed point.

Both are searched for by trying in the simulator; what is tried is told by a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pals_ray.types import OperatingPoint


@dataclass(frozen=True, slots=True)
class Tried:
    """A fixed point that was tried: whether it attains what is asked, and its tokens per joule."""

    point: OperatingPoint
    attains: bool
    tokens_per_joule: float


def best_fixed(
    try_at: Callable[[OperatingPoint], Tried], caps_w: Sequence[float], batches: Sequence[int]
) -> Tried | None:
    """Of all pairs of a cap (ascending) and a batch the one that attains what is asked at the most tokens per joule;
    None where none does.

    What a cap attains a higher one attains too, at more watts. So each batch is tried at the best cap so far, and where
    it attains there its least cap is found by bisection.
    """
    best: Tried | None = None
    high = len(caps_w) - 1
    for batch in batches:
        found = try_at(OperatingPoint(caps_w[high], batch))
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
        if best is None or found.tokens_per_joule > best.tokens_per_joule:
            best, high = found, at
    return best


def highest(attains: Callable[[int], bool], low: int, high: int) -> int | None:
    """The highest of the numbers from `low` to `high` that attains, of which all below do too; None where none does."""
    if not attains(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if attains(middle) else (low, middle - 1)
    return low
