"""A node's own small file: the limits found at first, whose raylet it is, and the order to stop.

Agents write it, the guardian acts on it. It lies in /dev/shm, since limits do not outlive a reboot either, and is keyed
by the node's address, since several hosts may share one /dev/shm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pals_ray.engine.control_block import BLOCK_VARIABLE
from pals_ray.errors import PalsError
from pals_ray.processes import ProcessId, identify, is_alive
from pals_ray.runtime.node.hardware import HardwareSpec

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
    """A node's name in file names, which may go on with `-`: no key is the beginning of another and a `-`."""
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
                # The lock goes while it is held: whoever waits for it notices, and takes the next one.
                path.unlink(missing_ok=True)
                _lock_path(key).unlink(missing_ok=True)
            else:
                scratch = path.with_suffix(f".{os.getpid()}")
                scratch.write_text(json.dumps(asdict(state)))
                scratch.replace(path)
    except Timeout as error:
        raise GuardianError(f"{_lock_path(key)} was not free within {LOCK_TIMEOUT_S:g} s; `fuser` names who") from error
    return state


def node_blocks(key: str) -> list[Path]:
    """Control blocks of the node's replicas, dead or alive."""
    return sorted(SHARED_MEMORY.glob(f"pals-{key}-*"))


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


def find_raylet() -> ProcessId:
    """The raylet that this Ray worker belongs to."""
    for parent in psutil.Process().parents():
        if parent.name() == "raylet":
            return identify(parent.pid)
    raise GuardianError("this process has no raylet above it; start it as a Ray actor")


def enrol(
    key: str,
    hardware: HardwareSpec,
    raylet: ProcessId,
    uuids: Iterable[str],
    look: Callable[[str], tuple[float, bool]],
    deadline_s: float = 30.0,
) -> NodeState:
    """Make the node ours: remember each GPU's limit as found, once, and see that a guardian runs.

    `look` says of a GPU the limit last ordered, W, and whether we may set it. It is called under the node's lock, and
    only where no enrolled agent lives that could be setting limits meanwhile, or of GPUs that none of them knows. A
    limit remembered earlier stays, so that a crashed session's caps are not taken for the operator's own. Waits for a
    stop that is under way. Raises `GuardianError` where no guardian comes up within `deadline_s`.
    """
    until = time.monotonic() + deadline_s
    uuids = tuple(uuids)

    def join(state: NodeState | None) -> NodeState | None:
        if state is None:
            state = NodeState(key, hardware, raylet)
        elif state.stop:
            return state
        living = tuple(agent for agent in state.agents if is_alive(agent) and agent != identify())
        known = state.may_set if living or identify() in state.agents else {}
        seen = {uuid: look(uuid) for uuid in uuids if uuid not in known}
        return replace(
            state,
            hardware=hardware,
            raylet=raylet,
            found_limit_w={uuid: limit_w for uuid, (limit_w, _) in seen.items()} | dict(state.found_limit_w),
            may_set=dict(known) | {uuid: may_set for uuid, (_, may_set) in seen.items()},
            agents=(*living, identify()),
        )

    while True:
        state = update_state(key, join)
        assert state is not None
        if not _guarded(state):
            _start_guardian(key)
        elif not state.stop:
            return state
        if time.monotonic() > until:
            raise GuardianError(
                f"node {key}: no guardian within {deadline_s:g} s "
                f"({'an earlier stop has not finished' if state.stop else 'it does not start'}); "
                f"see {guardian_log(key)}"
            )
        time.sleep(0.1)


def keep_guardian(key: str) -> None:
    """Start the node's guardian again where it died. Raises `GuardianError`."""
    state = read_state(key)
    if state is not None and not _guarded(state):
        _start_guardian(key)


def _guarded(state: NodeState) -> bool:
    return state.guardian is not None and is_alive(state.guardian)


def guardian_log(key: str) -> Path:
    return Path("/tmp") / f"pals-guardian-{key}.log"


def _start_guardian(key: str) -> None:
    try:
        with guardian_log(key).open("ab") as log:
            subprocess.run(
                [sys.executable, "-m", "pals_ray.runtime.node.guardian", key],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=True,
                timeout=20,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise GuardianError(f"node {key}: its guardian does not start ({error}); see {guardian_log(key)}") from error


def order_stop(key: str) -> None:
    """Tell the node's guardian to restore all limits as soon as our engines are gone, and to leave."""
    update_state(key, lambda state: None if state is None else replace(state, stop=True))
    keep_guardian(key)


def is_stopping(key: str) -> bool:
    """Whether limits are still to be given back; a guardian that died on the way is started again."""
    keep_guardian(key)
    return read_state(key) is not None


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
