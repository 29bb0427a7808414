"""The files that move a budget: schedules (YAML or JSON), regulation signals and node measurements (CSV)."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pals_ray.config.fleet import Watts
from pals_ray.config.reader import ConfigError, CsvRow, StrictModel, check_mapping, read_content, read_csv
from pals_ray.control.budget.overhead_fit import NodeSample
from pals_ray.control.budget.regulation import RegulationError, Signal
from pals_ray.control.budget.schedule import Entry, Schedule

#: Between the values of a signal without times, s.
SIGNAL_EVERY_S = 2.0
TIME_COLUMNS = ("time", "time_s", "t", "seconds", "timestamp", "datetime")
SIGNAL_COLUMNS = ("value", "signal", "y", "regd", "reg_d", "regulation")
NODE_COLUMNS = ("node_w", "node_watts", "node_power_w")
GPU_COLUMNS = ("gpu_w", "gpu_watts", "gpu_power_w")


def _wall_time(given: Any) -> datetime:
    """A date with a time of day. Bare dates and numbers are refused, because it is unclear which instant they mean."""
    if isinstance(given, datetime):
        return given
    try:
        if isinstance(given, str) and re.match(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d", given):
            return datetime.fromisoformat(given)
    except ValueError:
        pass
    raise ValueError(f"{given} is not a time; write it as 2026-07-01 17:00, or with an offset: 2026-07-01T17:00+02:00")


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"unknown time zone {name!r}; write it as Europe/Berlin or UTC") from error
    return name


WallTime = Annotated[datetime, BeforeValidator(_wall_time)]


class ScheduleEntry(StrictModel):
    """One entry: `budget_w` from `start` to `end`, either left out for an open end, reached over `ramp_s`."""

    budget_w: Watts
    start: WallTime | None = None
    end: WallTime | None = None
    ramp_s: float = Field(0.0, ge=0, allow_inf_nan=False)

    def entry(self, zone: tzinfo | None) -> Entry:
        """In Unix time. `zone` holds for times without an offset. Raises ValueError for a time that is no instant."""
        start_s = -math.inf if self.start is None else _unix_s(self.start, zone)
        end_s = math.inf if self.end is None else _unix_s(self.end, zone)
        if end_s <= start_s:
            raise ValueError(f"ends at {self.end}, which is not after its start at {self.start}")
        return Entry(start_s, end_s, self.budget_w, self.ramp_s)


class ScheduleFile(StrictModel):
    """A schedule: entries, and the time zone for times that have no offset."""

    time_zone: Annotated[str, AfterValidator(_known_zone)] | None = None
    entries: tuple[ScheduleEntry, ...]

    @model_validator(mode="after")
    def _times_are_instants(self) -> ScheduleFile:
        if not self.entries:
            raise ValueError("entries: there is none, so nothing would be scheduled")
        self.schedule()
        return self

    def schedule(self) -> Schedule:
        zone = None if self.time_zone is None else ZoneInfo(self.time_zone)
        entries = []
        for number, entry in enumerate(self.entries, start=1):
            try:
                entries.append(entry.entry(zone))
            except ValueError as error:
                raise ValueError(f"entry {number}: {error}") from error
        return Schedule(tuple(entries))


def _unix_s(given: datetime, zone: tzinfo | None) -> float:
    """The instant that a time of the file means. Raises ValueError for one that means none, or could mean two."""
    if given.tzinfo is not None:
        return given.timestamp()
    if zone is None:
        raise ValueError(
            f"{given} says no time zone; add time_zone (as Europe/Berlin) to the file, or an offset to the time, as in "
            f"{given.isoformat(timespec='minutes')}+00:00"
        )
    first, second = given.replace(tzinfo=zone, fold=0), given.replace(tzinfo=zone, fold=1)
    before, after = first.utcoffset(), second.utcoffset()
    if before is not None and after is not None and before > after:
        raise ValueError(
            f"{given} comes twice in {zone}, when the clocks go back; say which with an offset: "
            f"{first.isoformat(timespec='minutes')} or {second.isoformat(timespec='minutes')}"
        )
    if before != after:
        raise ValueError(f"{given} does not exist in {zone}: the clocks go forward over it; move it by the hour")
    return first.timestamp()


def load_schedule(path: str | Path) -> Schedule:
    """Read and check a schedule, JSON where the name ends so and YAML otherwise. Raises `ConfigError`."""
    path = Path(path).expanduser()
    return parse_schedule(read_content(path, "schedule"), str(path))


def parse_schedule(content: Any, source: str) -> Schedule:
    """Check a schedule's content, as it came from a file or a call; `source` names it. Raises `ConfigError`."""
    holds = "a list of entries, each with budget_w, start and end"
    return check_mapping(ScheduleFile, content, source, holds).schedule()


def load_signal(path: str | Path) -> Signal:
    """Read a regulation signal in [-1, 1] (such as PJM's RegD): values, with or without a column of times.

    Times are s, HH:MM[:SS] or dates with times, and count from the first; without them a value comes every 2 s.
    Raises `ConfigError` naming the line.
    """
    path = Path(path).expanduser()
    rows = read_csv(path, "signal")
    header = rows[0].cells
    if any(_is_name(cell) for cell in header):
        value_at = rows[0].find_column(SIGNAL_COLUMNS)
        time_at = None if len(header) == 1 else rows[0].find_column(TIME_COLUMNS)
        rows = rows[1:]
    elif len(header) <= 2:
        value_at, time_at = len(header) - 1, 0 if len(header) == 2 else None
    else:
        raise ConfigError(f"{path} has {len(header)} columns without names; keep the times and one column of values")
    values: list[float] = []
    times_s: list[float] = []
    for row in rows:
        value = row.number(value_at)
        if not -1.0 <= value <= 1.0:
            raise row.refused(f"{value:g} is not in [-1, 1]; divide the signal by its range")
        time_s = SIGNAL_EVERY_S * len(values) if time_at is None else _time_s(row, time_at)
        if times_s and time_s <= times_s[-1]:
            raise row.refused("the time is not after that of the line before; sort the file")
        values.append(value)
        times_s.append(time_s)
    try:
        return Signal(np.array(times_s) - (times_s[0] if times_s else 0.0), np.array(values))
    except RegulationError as error:
        raise ConfigError(f"{path} cannot be followed: {error}") from error


def _is_name(cell: str) -> bool:
    return bool(re.match(r"[A-Za-z]", cell)) and cell.lower() not in {"nan", "inf"}


def _time_s(row: CsvRow, column: int) -> float:
    cell = row.text(column)
    if clock := re.fullmatch(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d(?:\.\d+)?))?", cell):
        return 3600.0 * int(clock[1]) + 60.0 * int(clock[2]) + float(clock[3] or 0)
    if re.match(r"\d{4}-\d\d-\d\d[T ]", cell):
        try:
            moment = datetime.fromisoformat(cell)
        except ValueError as error:
            raise row.refused(f"{cell!r} is not a time") from error
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    return row.number(column)


def load_node_samples(path: str | Path) -> tuple[NodeSample, ...]:
    """Read watts of one node and of all its GPUs together, columns `node_w` and `gpu_w`; a sample's row is its line.

    Other columns are passed over. Raises `ConfigError` naming the line.
    """
    header, *rows = read_csv(Path(path).expanduser(), "measurements")
    node_at, gpu_at = header.find_column(NODE_COLUMNS), header.find_column(GPU_COLUMNS)
    return tuple(NodeSample(row.line, row.number(node_at), row.number(gpu_at)) for row in rows)
