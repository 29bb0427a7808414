"""What an operator asks for by call or over HTTP and is more than a number of watts: checked here, as files are."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from pals_ray.config.budget_files import SIGNAL_EVERY_S
from pals_ray.config.fleet import Watts
from pals_ray.config.reader import StrictModel, check
from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.regulation import RegulationError, Signal
from pals_ray.control.budget.signal_following import Following


class FollowRequest(StrictModel):
    """A signal and how to follow it: target = base + range x value, under a ceiling. W at node level.

    `value` lies in [-1, 1], `time_s` counts from the first; without it a value comes every 2 s.
    """

    base_w: Watts
    range_w: float = Field(ge=0, allow_inf_nan=False)
    ceiling_w: Watts
    value: tuple[Annotated[float, Field(ge=-1, le=1)], ...]
    time_s: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _possible(self) -> FollowRequest:
        if self.range_w >= self.base_w:
            raise ValueError(f"a range of {self.range_w:g} W around {self.base_w:g} W goes down to nothing")
        if self.ceiling_w < self.base_w:
            raise ValueError(f"the ceiling of {self.ceiling_w:g} W lies under the base of {self.base_w:g} W")
        try:
            self.plan().signal()
        except RegulationError as error:
            raise ValueError(str(error)) from error
        return self

    def plan(self) -> FollowedSignal:
        """What the manager is asked to follow. The manager sets the start time."""
        times_s = self.time_s
        if times_s is None:
            times_s = tuple((SIGNAL_EVERY_S * np.arange(len(self.value))).tolist())
        return FollowedSignal(Following(self.base_w, self.range_w, self.ceiling_w), times_s, self.value, started_s=0.0)


def followed(signal: Signal, **watts: Any) -> FollowedSignal:
    """A signal to be followed with `base_w`, `range_w` and `ceiling_w`. Raises `ConfigError` naming what cannot be."""
    content = {"value": signal.value.tolist(), "time_s": signal.time_s.tolist(), **watts}
    return check(FollowRequest, content, "the signal cannot be followed like that").plan()
