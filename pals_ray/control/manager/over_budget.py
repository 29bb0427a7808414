"""Measured draw above the budget: the worst of it, W, and for how long, s."""

from __future__ import annotations


class OverBudget:
    """Counts from its making on; times are s of the manager's clock."""

    def __init__(self, now_s: float) -> None:
        self.worst_w = 0.0
        self.total_s = 0.0
        self._counted_s = now_s

    def count(self, drawn_w: float, budget_w: float, now_s: float) -> None:
        """Take in what has been drawn since the last count."""
        if drawn_w > budget_w:
            self.worst_w = max(self.worst_w, drawn_w - budget_w)
            self.total_s += now_s - self._counted_s
        self._counted_s = now_s
