"""The one reader of the operator's files: it opens, decodes and checks them, and words every error alike."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from click import ClickException
from pydantic import BaseModel, ConfigDict, ValidationError

from pals_ray.errors import PalsError

M = TypeVar("M", bound=BaseModel)


class ConfigError(PalsError, ClickException):
    """A configuration that cannot be used. A ClickException, so that `serve run` prints the message alone."""


class StrictModel(BaseModel):
    """A part of a file: unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8; `what` names its kind in the message. Raises `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the {what} {path}: it is not a text file in UTF-8") from error


def read_content(path: Path, what: str) -> Any:
    """What a file holds, decoded as JSON where its name ends so and as YAML otherwise. Raises `ConfigError`."""
    text = read_text(path, what)
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


def check_mapping(model: type[M], content: Any, source: str, holds: str) -> M:
    """Check decoded content that must be a mapping; `source` and `holds` word the message. Raises `ConfigError`."""
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold a mapping with {holds}")
    return check(model, content, f"{source} cannot be used")


def check(model: type[M], content: Any, refused: str) -> M:
    """Content as a pydantic model. Raises `ConfigError`: `refused`, then a line for each finding."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{refused}:\n{explain(error)}") from error


def explain(error: ValidationError) -> str:
    """A validation error as one readable line for each finding: where, what, and the value that was given."""
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "(whole file)"
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in {"value_error", "missing"} else f" (given: {item['input']!r})"
        if item["type"] == "extra_forbidden":
            message = "no such key"
        lines.append(f"  {where}: {message}{given}")
    return "\n".join(lines)


class CsvRow(NamedTuple):
    """One row of a CSV file: its line number in the file, and its cells."""

    path: Path
    line: int
    cells: list[str]

    def refused(self, why: str) -> ConfigError:
        """The error that names this row."""
        return ConfigError(f"{self.path}, line {self.line}: {why}")

    def text(self, column: int) -> str:
        """A cell's text. Raises `ConfigError` where the row is too short."""
        if column >= len(self.cells):
            raise self.refused(f"only {len(self.cells)} columns")
        return self.cells[column]

    def number(self, column: int) -> float:
        """A cell's finite number. Raises `ConfigError`."""
        cell = self.text(column)
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.refused(f"{cell!r} is not a number")
        return number

    def find_column(self, names: tuple[str, ...]) -> int:
        """In a header, the one column that has one of these names. Raises `ConfigError` where there is none, or two."""
        found = [at for at, cell in enumerate(self.cells) if cell.lower() in names]
        if len(found) != 1:
            why = "two columns of this kind" if found else f"only {', '.join(self.cells)}"
            raise ConfigError(
                f"{self.path} needs one column named {' or '.join(names)}, and has {why}; rename one in the header"
            )
        return found[0]


def read_csv(path: Path, what: str) -> list[CsvRow]:
    """The rows of a CSV file separated by commas, semicolons or tabs, without blank lines and comments (#).

    Raises `ConfigError`, also where there are no rows.
    """
    lines = read_text(path, what).splitlines()
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    reader = csv.reader(lines, delimiter=next((mark for mark in ";\t" if mark in first), ","))
    rows = [
        CsvRow(path, reader.line_num, [cell.strip() for cell in row])
        for row in reader
        if row and not row[0].startswith("#")
    ]
    rows = [row for row in rows if any(row.cells)]
    if not rows:
        raise ConfigError(f"{path} holds no rows")
    return rows
