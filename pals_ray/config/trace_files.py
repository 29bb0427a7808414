"""Files of real requests: Azure's CSV and Mooncake's JSONL, read into a `Trace`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pals_ray.config.reader import ConfigError
from pals_ray.simulation.traces import Trace

#: Where each format is published, for users who have no file yet.
PUBLISHED = {
    "azure": "the Azure Public Dataset (github.com/Azure/AzurePublicDataset, "
    "data/AzureLLMInferenceTrace_conv.csv; Splitwise, ISCA'24; CC-BY-4.0)",
    "mooncake": "the Mooncake repository (github.com/kvcache-ai/Mooncake, FAST25-release/traces; Mooncake, FAST'25)",
}
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length")


class MissingTrace(ConfigError):
    """A trace file that is not there: says which path is wanted, and where the file is published."""


def load_trace(path: str | Path, kind: str) -> Trace:
    """Read a trace of `kind` "azure" or "mooncake"; requests without output are left out, times count from the first.

    Raises `MissingTrace`, or `ConfigError` naming the line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingTrace(
            f"no trace at {path}: download it from {PUBLISHED[kind]} and put it there, "
            "or use --sample-trace for the small synthetic one that is shipped"
        )
    rows = sorted(_azure(path) if kind == "azure" else _mooncake(path))
    rows = [row for row in rows if row[2] >= 1]
    if len(rows) < 2:
        raise ConfigError(f"{path} holds fewer than two requests")
    time_s, prompts, outputs = (np.array(column) for column in zip(*rows, strict=True))
    time_s = time_s - time_s[0]
    if time_s[-1] <= 0:
        raise ConfigError(f"{path}: all requests come at the same time")
    # The trace ends a mean gap after its last request, so that repeating it keeps its rate.
    duration_s = float(time_s[-1] * len(rows) / (len(rows) - 1))
    return Trace(time_s, np.maximum(prompts, 1), outputs, duration_s)


def _azure(path: Path) -> Iterator[tuple[float, int, int]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(f"{path} is no Azure LLM inference trace: column {', '.join(missing)} is missing")
        for row in reader:
            try:
                # Azure's stamps have 7 digits of a second, one more than Python reads.
                stamp = row["TIMESTAMP"].strip()[:26]
                moment = datetime.fromisoformat(stamp).replace(tzinfo=UTC).timestamp()
                yield moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error


def _mooncake(path: Path) -> Iterator[tuple[float, int, int]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row: Any = json.loads(line)
                yield float(row["timestamp"]) / 1000.0, int(row["input_length"]), int(row["output_length"])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a Mooncake request with {', '.join(MOONCAKE_KEYS)} ({error!r})"
                ) from error
