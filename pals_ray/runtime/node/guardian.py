"""The node's guardian: a tiny process out of Ray's reach that gives every GPU its own limit back.

None of an actor's handlers runs on `ray stop -f`, `ray.kill` or SIGKILL, and a power limit outlives the process that
set it. So the first agent of a node starts this, detached twice (Ray kills direct children), and it stays until the
raylet and our engines are gone or the manager says stop.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace

from pals_ray.engine.control_block import block_path, live_engines, sweep
from pals_ray.errors import PalsError
from pals_ray.gpus.gpu_protocol import GpuDriver, GpuError, GpuLostError, GpuUnsupportedError
from pals_ray.processes import identify, is_alive
from pals_ray.runtime.node.node_file import SHARED_MEMORY, NodeState, read_state, update_state
from pals_ray.runtime.node.ownership import kill_engines

BEAT_S = 0.5
#: How long to wait after an attempt that failed.
RETRY_S = 2.0
#: How long replicas without an engine may outlive the restored limits before their blocks are left behind.
SWEEP_S = 15.0

#: Drivers keep limits in whole mW.
LIMIT_STEP_W = 1e-3
log = logging.getLogger("pals.guardian")


def watch(key: str) -> None:
    """Watch the node until it is to be given back, then restore its limits and remove our files."""
    while True:
        try:
            state = read_state(key)
            if state is None or state.guardian != identify():
                log.info("node %s: the file is gone or another guardian's; leaving", key)
                return
            if _is_due(state):
                if update_state(key, _give_back) is None:
                    log.info("node %s: limits restored", key)
                    _sweep_blocks(key)
                    return
                time.sleep(RETRY_S)
        except (PalsError, OSError) as error:  # nobody else would ever restore the limits
            log.error("node %s: trying again in %g s: %s", key, RETRY_S, error)
            time.sleep(RETRY_S)
        time.sleep(BEAT_S)


def _is_due(state: NodeState) -> bool:
    """Whether the node is to be given back: the manager said so or its raylet is gone, and our processes are too."""
    over = state.stop or not is_alive(state.raylet)
    if not over or any(is_alive(agent) for agent in state.agents):
        return False
    # Without agents there is no replica any more, and no engine is to outlive it.
    return not kill_engines(str(block_path(state.node_key, ""))) and not live_engines(state.node_key)


def _give_back(state: NodeState | None) -> NodeState | None:
    """Under the node's lock, so that no agent enrols half-way: restore all limits; None once nothing is left to do."""
    if state is None or state.guardian != identify() or not _is_due(state):
        return state
    return None if _restore_all(state) else state


def _sweep_blocks(key: str) -> None:
    """Remove control blocks; a replica may take a moment longer to go than its engine and agent."""
    until_s = time.monotonic() + SWEEP_S
    sweep(key)
    while any(SHARED_MEMORY.glob(f"pals-{key}-*")) and time.monotonic() < until_s:
        time.sleep(BEAT_S)
        sweep(key)


def _restore_all(state: NodeState) -> bool:
    """Give back every limit that differs from the one found; True once none is left to give back."""
    driver = state.hardware.open(state.node_key)
    try:
        done = [_restore(driver, uuid, limit_w) for uuid, limit_w in state.found_limit_w.items()]
        return all(done)
    finally:
        driver.close()


def _restore(driver: GpuDriver, uuid: str, found_w: float) -> bool:
    try:
        gpu = driver.gpu(uuid)
        if abs(gpu.ordered_limit_w() - found_w) >= LIMIT_STEP_W and gpu.may_set_limit():
            gpu.set_limit_w(found_w)
            log.info("%s: back at %g W", uuid, found_w)
    except (GpuLostError, GpuUnsupportedError) as error:
        log.warning("%s: nothing to restore any more: %s", uuid, error)
    except GpuError as error:
        log.error("%s: not restored yet, trying again: %s", uuid, error)
        return False
    return True


def main() -> None:
    """Detach, enter the node's file as its guardian, and watch."""
    key = sys.argv[1]
    if os.fork():
        os._exit(0)
    os.chdir("/")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    update_state(key, _enter)
    watch(key)


def _enter(state: NodeState | None) -> NodeState | None:
    if state is None or (state.guardian is not None and is_alive(state.guardian)):
        return state
    return replace(state, guardian=identify())


if __name__ == "__main__":
    main()
