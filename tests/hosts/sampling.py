"""The limits in force on several hosts, looked at from outside: their virtual GPUs lie in the /dev/shm that they share.

    with LimitSampler({"rack-a": ["10-77-0-3"], ...}, a_w=40, b=0.1) as sampler: ...

Watts are at node level, as budgets are: each node's overhead `a_w`, and `1 + b` times the limits of its GPUs.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np

from pals_ray.gpus.gpu_protocol import GpuDriverMissingError
from pals_ray.gpus.virtual import VirtualDriver, VirtualGpu
from tests.hosts.slow_link import go_before_all
from tests.support.fleets import SHARED_MEMORY

PERIOD_S = 0.01
#: Two sums of the same limits may differ by so much, W.
ROUNDING_W = 0.01


class LimitSampler:
    """Sums of limits in groups of nodes (a fleet, its domains) every 10 ms; times are s of the monotonic clock.

    Looks from a process of its own that goes before all others: this one's threads wait for one another.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], a_w: float, b: float) -> None:
        """`groups` names node keys. A node that is not the fleet's yet counts from when all of it is parked."""
        self.groups = {name: list(keys) for name, keys in groups.items()}
        self._keys = {key for keys in groups.values() for key in keys}
        self._gpus: dict[str, Sequence[VirtualGpu]] = {}
        for key in self._keys:
            with suppress(GpuDriverMissingError):
                self._gpus[key] = VirtualDriver.attach(key).gpus()
        self._a_w, self._b = a_w, b
        #: What it has seen: time and sum of each group, a row of numbers each.
        self._seen = tempfile.TemporaryFile(dir=SHARED_MEMORY, buffering=0)  # noqa: SIM115  (read after the end, too)
        self._looker = multiprocessing.get_context("fork").Process(target=self._run, daemon=True)

    def __enter__(self) -> LimitSampler:
        self._looker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._looker.kill()
        self._looker.join()

    @property
    def rows(self) -> list[tuple[float, dict[str, float]]]:
        """Every sample so far: when, and the sum of each group, W."""
        return self._read(0, self._count)

    @property
    def last(self) -> tuple[float, dict[str, float]]:
        """The last sample; at time 0 there were no limits."""
        return (self._read(self._count - 1, 1) or [(0.0, dict.fromkeys(self.groups, 0.0))])[0]

    @property
    def _count(self) -> int:
        return os.fstat(self._seen.fileno()).st_size // (8 * (1 + len(self.groups)))

    def _read(self, first: int, count: int) -> list[tuple[float, dict[str, float]]]:
        width = 1 + len(self.groups)
        seen = np.frombuffer(os.pread(self._seen.fileno(), 8 * width * count, max(8 * width * first, 0)))
        return [(at_s, dict(zip(self.groups, watts, strict=True))) for at_s, *watts in seen.reshape(-1, width).tolist()]

    def _run(self) -> None:
        go_before_all()
        gc.disable()
        due_s = time.monotonic()
        while True:
            time.sleep(max(due_s - time.monotonic(), 0.0))
            due_s = max(due_s + PERIOD_S, time.monotonic())
            self._seen.write(np.array([time.monotonic(), *self._look().values()]).tobytes())

    def _look(self) -> dict[str, float]:
        for key in self._keys - self._gpus.keys():
            with suppress(GpuDriverMissingError):
                gpus = VirtualDriver.attach(key).gpus()
                if all(gpu.limit_w() <= gpu.info.min_limit_w for gpu in gpus):
                    self._gpus[key] = gpus
        node_w = {
            key: self._a_w + (1 + self._b) * sum(gpu.limit_w() for gpu in gpus) for key, gpus in self._gpus.items()
        }
        return {name: sum(node_w.get(key, 0.0) for key in keys) for name, keys in self.groups.items()}

    def gpu_limits_w(self, key: str) -> list[float]:
        """Limit in force of each GPU of a node, now, W."""
        return [gpu.limit_w() for gpu in self._gpus[key]]

    def worst_w(self, group: str, since_s: float = 0.0, until_s: float = float("inf")) -> float:
        """The highest sum of a group between two times, W."""
        return max(watts[group] for at_s, watts in self.rows if since_s <= at_s < until_s)

    def at_w(self, group: str, at_s: float) -> float:
        """A group's sum as last sampled before a time, W."""
        return next(watts[group] for sampled_s, watts in reversed(self.rows) if sampled_s < at_s)

    def kept_after_s(self, group: str, budget_w: float, since_s: float, until_s: float) -> float:
        """How long after `since_s` the first sample was from which on a group's sum stayed within a budget, s."""
        kept_s = None
        for at_s, watts in reversed([row for row in self.rows if since_s <= row[0] < until_s]):
            if watts[group] > budget_w + ROUNDING_W:
                break
            kept_s = at_s
        assert kept_s is not None, f"{group} was not within {budget_w:g} W at the end"
        return kept_s - since_s

    def report(self, budgets_w: Mapping[str, float], since_s: float = 0.0, until_s: float = float("inf")) -> str:
        """The worst sample of each group against its budget, in a line."""
        parts = [f"{name} {self.worst_w(name, since_s, until_s):.0f} of {w:g} W" for name, w in budgets_w.items()]
        times_s = [at_s for at_s, _ in self.rows if since_s <= at_s < until_s]
        gap_s = max((after - before for before, after in itertools.pairwise(times_s)), default=0.0)
        return f"worst of {len(times_s)} samples: {', '.join(parts)} (longest gap between two: {gap_s * 1000:.0f} ms)"

    def within(self, budgets_w: Mapping[str, float], since_s: float = 0.0, until_s: float = float("inf")) -> bool:
        """Whether each sample of each group was within its budget."""
        return all(self.worst_w(name, since_s, until_s) <= w + ROUNDING_W for name, w in budgets_w.items())
