"""A node's own small file: the limits found at first, whose raylet it is, its guardian, and the order to stop.

Agents write it, the guardian acts on it. It lies in /dev/shm, since limits do not outlive a reboot either. Its name
holds the node's address, since several hosts may share one /dev/shm.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from pals_ray.errors import PalsError
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.processes import ProcessId

SHARED_MEMORY = Path("/dev/shm")
LOCK_TIMEOUT_S = 10.0


class GuardianError(PalsError):
    """The node's guardian could not be started, so limits would not be restored after a crash."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """What the node's file says. By GPU UUID: `found_limit_w`, the limit ordered before we first touched it, and
    `may_set`, whether we may set it."""

    node_key: str
    hardware: HardwareSpec
    raylet: ProcessId
    found_limit_w: Mapping[str, float] = field(default_factory=dict)
    may_set: Mapping[str, bool] = field(default_factory=dict)
    agents: tuple[ProcessId, ...] = ()
    guardian: ProcessId | None = None
    stop: bool = False


def node_key(ip_address: str) -> str:
    """A node's part of file names. What follows it is set off by `-`, so no key followed by `-` begins another key."""
    return re.sub(r"[^0-9A-Za-z-]", "_", ip_address.replace(".", "-"))


def state_path(key: str) -> Path:
    return SHARED_MEMORY / f"pals-node-{key}.json"


def read_state(key: str) -> NodeState | None:
    """The node's state, None where there is no file."""
    try:
        raw = json.loads(state_path(key).read_text())
    except FileNotFoundError:
        return None
    return NodeState(
        node_key=raw["node_key"],
        hardware=HardwareSpec(**raw["hardware"]),
        raylet=ProcessId(*raw["raylet"]),
        found_limit_w=raw["found_limit_w"],
        may_set=raw["may_set"],
        agents=tuple(ProcessId(*agent) for agent in raw["agents"]),
        guardian=ProcessId(*raw["guardian"]) if raw["guardian"] else None,
        stop=raw["stop"],
    )


def _lock_path(key: str) -> Path:
    return state_path(key).with_suffix(".lock")


def update_state(key: str, change: Callable[[NodeState | None], NodeState | None]) -> NodeState | None:
    """Apply `change` to the state under the node's file lock and write it atomically; None removes all files.

    Raises `GuardianError` where the lock is not free within `LOCK_TIMEOUT_S`.
    """
    path = state_path(key)
    try:
        with FileLock(_lock_path(key), timeout=LOCK_TIMEOUT_S):
            state = change(read_state(key))
            if state is None:
                # Removed while it is held: FileLock notices a lock file that was removed, and takes a new one.
                path.unlink(missing_ok=True)
                _lock_path(key).unlink(missing_ok=True)
            else:
                scratch = path.with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps(asdict(state)))
                scratch.replace(path)
    except Timeout as error:
        raise GuardianError(f"{_lock_path(key)} was not free within {LOCK_TIMEOUT_S:g} s; `fuser` names who") from error
    return state
