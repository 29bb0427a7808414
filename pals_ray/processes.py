"""Processes identified by pid and start time, because pids alone are reused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class ProcessId(NamedTuple):
    """A process of this machine; `start_ticks` is its start in clock ticks since boot (0 where it is gone)."""

    pid: int
    start_ticks: int


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot (proc(5), field 22), or 0 if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return 0 if state in "ZX" else int(fields[18])


def identify(pid: int | None = None) -> ProcessId:
    """The identity of a process, this one by default."""
    pid = os.getpid() if pid is None else pid
    return ProcessId(pid, start_ticks(pid))


def is_alive(process: ProcessId) -> bool:
    """Whether exactly this process still runs."""
    return process.start_ticks != 0 and start_ticks(process.pid) == process.start_ticks
