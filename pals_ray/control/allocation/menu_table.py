"""All replicas' menus of (watts, value) as arrays, and a division: one point of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pals_ray.control.allocation.budget_tree import FloatArray, IntArray

#: Points worked on at a time, so that all prices are tried while the points are in the CPU's cache.
CACHED_POINTS = 25_600


@dataclass(frozen=True, slots=True)
class MenuTable:
    """What n replicas offer: p points each, by watts above the replica's least charge.

    `extra_w` (n, p) is whole watts of the node, rising along a row from 0; `value` (n, p). A shorter menu repeats its
    last point.
    """

    extra_w: FloatArray
    value: FloatArray

    def __len__(self) -> int:
        return len(self.extra_w)

    def at(self, index: IntArray) -> tuple[FloatArray, FloatArray]:
        """(extra watts, value) of each replica's point `index` (n,)."""
        rows = np.arange(len(self))
        return self.extra_w[rows, index], self.value[rows, index]

    def best_at(self, price: FloatArray) -> IntArray:
        """(n, k): each replica's points of the highest `value - price x watts`, at its own prices (n, k) per W."""
        best = np.empty(price.shape, dtype=np.int64)
        rows = max(1, CACHED_POINTS // self.extra_w.shape[1])
        for start in range(0, len(self), rows):
            part = slice(start, start + rows)
            extra_w, value = self.extra_w[part], self.value[part]
            net = np.empty_like(value)
            for k in range(price.shape[1]):
                np.multiply(extra_w, -price[part, k, None], out=net)
                np.add(net, value, out=net)
                net.argmax(axis=1, out=best[part, k])
        return best


@dataclass(frozen=True, slots=True)
class Division:
    """One point of each menu: `index` (n,), its total value, and `bound`, which no division's value exceeds."""

    index: IntArray
    value: float
    bound: float
