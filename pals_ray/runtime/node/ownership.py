"""Which processes and GPUs of a node are ours: what our raylet started or may give out, and our replicas' engines."""

from __future__ import annotations

from contextlib import suppress

import psutil

from pals_ray.engine.control_block import BLOCK_VARIABLE
from pals_ray.processes import ProcessId, identify
from pals_ray.runtime.node.node_file import GuardianError


def find_raylet() -> ProcessId:
    """The raylet that this Ray worker belongs to."""
    for parent in psutil.Process().parents():
        if parent.name() == "raylet":
            return identify(parent.pid)
    raise GuardianError("this process has no raylet above it; start it as a Ray actor")


def is_ours(pid: int, raylet: ProcessId) -> bool:
    """Whether a process that holds a GPU belongs to this raylet: it, or something it started."""
    try:
        process = psutil.Process(pid)
        return any(ancestor.pid == raylet.pid for ancestor in (process, *process.parents()))
    except psutil.NoSuchProcess:
        return True  # gone since it was listed


def visible_gpus(uuids: list[str], raylet: ProcessId) -> set[str]:
    """The GPUs, of those a node has in the driver's order, that this raylet may give out.

    A raylet hands out what its CUDA_VISIBLE_DEVICES names (indices or UUIDs), or all there are.
    """
    named = psutil.Process(raylet.pid).environ().get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return set(uuids)
    chosen = set()
    for name in filter(None, (part.strip() for part in named.split(","))):
        if name.isdigit():
            chosen |= set(uuids[int(name) : int(name) + 1])
        else:
            chosen |= {uuid for uuid in uuids if uuid.startswith(name)}
    return chosen


def kill_engines(block: str) -> int:
    """Kill every engine process whose control block's path begins with `block`; how many there were.

    Needed for an engine whose replica dies while it starts: it has no scheduler yet that would see to that, and waits
    for minutes for its dead parent. Engines inherit the block's name, replicas only set it: they are not found.
    """
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(BLOCK_VARIABLE, "").startswith(block):
                process.kill()
                found += 1
    return found
