"""The frame that all pictures share: a grid of axes, a title, and a PNG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

mpl.use("Agg")
import matplotlib.pyplot as plt


@contextmanager
def picture(
    path: Path, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, dpi: int = 110
) -> Iterator[NDArray[Any]]:
    """A (rows, columns) array of axes to draw on, `size` in inches; written to `path` when the block ends."""
    figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    yield axes
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def shades(count: int) -> NDArray[Any]:
    """As many colours of one scale, (count, 4)."""
    return np.asarray(plt.get_cmap("viridis")(np.linspace(0.0, 0.9, count)))
