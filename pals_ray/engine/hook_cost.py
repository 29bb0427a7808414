"""What our scheduler's hook adds to a step of the engine, measured on this machine without an engine."""

from __future__ import annotations

import tempfile
import timeit
from pathlib import Path

import numpy as np

from pals_ray.engine.control_block import ControlBlock
from pals_ray.engine.scheduler_hook import SchedulerHook


def hook_us(batch: int = 64, calls: int = 20_000) -> float:
    """The median over so many steps in EngineCore, us a step, in which `batch` sequences get a token."""
    with tempfile.TemporaryDirectory() as folder:
        hook = SchedulerHook(ControlBlock.create(Path(folder) / "block"), batch)

        def step() -> None:
            hook.limit(batch)
            hook.publish(batch, 0)

        return float(np.median(timeit.repeat(step, repeat=calls, number=1))) * 1e6
