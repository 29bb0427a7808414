"""The batch sizes that an engine has CUDA graphs for: a limit between two of them pays for the larger one."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache


@lru_cache(maxsize=256)
def graph_sizes(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8, from 256 steps of 16 (vLLM 0.29), up to the start value, which is always one."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, max_batch + 1, 16))
    return (*(size for size in sizes if size < max_batch), max_batch)


def snap(batch: float, max_batch: int) -> int:
    """The largest of these sizes that is not above `batch`; 1 at least."""
    sizes = graph_sizes(max_batch)
    return sizes[max(bisect_right(sizes, batch) - 1, 0)]
