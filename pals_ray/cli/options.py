"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core.")]
SampleTrace = Annotated[bool, typer.Option("--sample-trace", help="The small synthetic trace shipped.")]
