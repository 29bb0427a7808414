"""How far the dies of one GPU type differ in the power they draw for the same work."""

from __future__ import annotations


def die_factor(index: int, spread: float = 0.03) -> float:
    """The factor on dynamic power of die `index`, within 1 ± spread: dies of one type differ (FACTS).

    A golden-ratio sequence: repeatable, and well spread for any number of dies.
    """
    return 1.0 + spread * (2.0 * ((index * 0.6180339887498949 + 0.5) % 1.0) - 1.0)
