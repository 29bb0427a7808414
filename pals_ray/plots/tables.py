"""Figures as text: tables in a terminal and in Markdown, and one JSON object."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

Json = dict[str, Any]


def table(
    headers: Iterable[str], rows: Iterable[Sequence[str]], left: Collection[str] = (), fold: bool = False, **style: Any
) -> Table:
    """A table for a terminal, its columns right-aligned but for those named in `left`.

    `fold` breaks cells that are too long instead of cutting them; `style` is what rich's `Table` takes.
    """
    made = Table(**style)
    for header in headers:
        justify, overflow = "left" if header in left else "right", "fold" if fold else "ellipsis"
        made.add_column(header, justify=justify, overflow=overflow)  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*row)
    return made


class Report:
    """What a command has found: its figures, as they go into JSON, and the tables and sentences that show them."""

    def __init__(self, figures: Any, *shown: RenderableType) -> None:
        self.figures = figures
        self.shown = shown

    def print(self, as_json: bool, indent: int | None = None) -> None:
        """One JSON object on stdout, or everything else."""
        if as_json:
            print(json.dumps(self.figures, indent=indent))
        else:
            Console(highlight=False).print(*self.shown, sep="\n")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, with the empty line that ends it."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def replace_between(file: Path, begin: str, end: str, text: str) -> None:
    """Write generated text into a page, between two marks that stay."""
    before, _, rest = file.read_text().partition(begin)
    _, _, after = rest.partition(end)
    file.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def percent(value: float | None, form: str = "z.1f") -> str:
    """A fraction in percent, "-" where there is none."""
    return "-" if value is None else f"{100 * value:{form}} %"


def seconds(value: float | None) -> str:
    """A latency in ms, or in s from 1 s on; "-" where there is none."""
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s"
