"""The errors that every part of pals-ray may raise: each says what was asked, what is possible and what to do."""

from __future__ import annotations


class PalsError(Exception):
    """Base of every error of ours: says what was asked, what is possible and what to do."""


class InfeasibleBudget(PalsError):
    """A budget below what the fleet needs at its lowest caps; `needed_w` is the least that would do."""

    def __init__(self, asked_w: float, needed_w: float, why: str) -> None:
        super().__init__(f"{asked_w:g} W asked, but {needed_w:.0f} W needed: {why}")
        self.asked_w = asked_w
        self.needed_w = needed_w
        self.why = why

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[float, float, str]]:
        return InfeasibleBudget, (self.asked_w, self.needed_w, self.why)


class NotConfigured(PalsError):
    """The manager runs, but nobody has told it the fleet's configuration yet."""
