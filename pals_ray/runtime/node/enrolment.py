"""How a node becomes ours, with each GPU's limit noted as found and a guardian running, and how it is given back."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.processes import ProcessId, identify, is_alive
from pals_ray.runtime.node.node_file import GuardianError, NodeState, read_state, update_state


def enrol(
    key: str,
    hardware: HardwareSpec,
    raylet: ProcessId,
    uuids: Iterable[str],
    look: Callable[[str], tuple[float, bool]],
    deadline_s: float = 30.0,
) -> NodeState:
    """Make the node ours: note each GPU's limit as found, once, and ensure that a guardian runs.

    `look` returns a GPU's limit last ordered, W, and whether we may set it. It is called under the node's lock, and
    only for GPUs that no living agent has enrolled, since such an agent could be setting limits meanwhile. A limit
    noted earlier stays, so that the caps of a crashed session are not taken for the operator's own. Waits for a stop
    that is under way. Raises `GuardianError` where no guardian comes up within `deadline_s`.
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
    """Tell the node's guardian to restore all limits as soon as our engines are gone, and then to end."""
    update_state(key, lambda state: None if state is None else replace(state, stop=True))
    keep_guardian(key)


def is_stopping(key: str) -> bool:
    """Whether limits are still to be restored. A guardian that died meanwhile is started again."""
    keep_guardian(key)
    return read_state(key) is not None
