"""Hearing of the end of a replica's process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from pals_ray.processes import ProcessId, is_alive


def when_gone(process: ProcessId, act: Callable[[], None]) -> None:
    """Have `act` called once this process has ended; at once where it has."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        act()
        return

    def gone() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        act()

    if is_alive(process):
        loop.add_reader(fd, gone)
    else:  # the pid is another process's by now
        os.close(fd)
        act()
