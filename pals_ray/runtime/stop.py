"""`pals stop`: from the operator's process, so that it goes on when the manager ends."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import NodeDiedError, RayActorError, TaskUnschedulableError
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pals_ray.errors import PalsError
from pals_ray.runtime.node.enrolment import is_stopping, order_stop

STOP_DEADLINE_S = 60.0
MANAGER_DEADLINE_S = 10.0


class StopError(PalsError):
    """Something of ours is still there."""


def stop_fleet(manager: Any) -> None:
    """Delete our Serve application (no others), wait for its engines, restore every limit, end the manager."""
    app, nodes = ray.get(manager.begin_stop.remote())
    until_s = time.monotonic() + STOP_DEADLINE_S
    if app:
        with suppress(RayServeException):  # `serve shutdown` has deleted it before us
            serve.delete(app)
    # A dead node's guardian restores its limits unasked.
    _wait_until(
        lambda: _alive().isdisjoint(ray.get(manager.replicas_left.remote()).values()),
        until_s,
        "replicas have not gone",
    )
    for node_id, key in nodes:
        _on_node(node_id, order_stop, key)
    _wait_until(
        lambda: not any(_on_node(node_id, is_stopping, key) for node_id, key in nodes),
        until_s,
        "guardians have not restored every limit; see /tmp/pals-guardian-*.log on the nodes",
    )
    with suppress(RayActorError):  # it answers by ending; gone before that, the call would be lost with this process
        ray.get(manager.finish_stop.remote(), timeout=MANAGER_DEADLINE_S)


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _on_node(node_id: str, function: Any, *args: Any) -> Any:
    """What a function answers on a node; None where the node is dead, or dies meanwhile."""
    if node_id not in _alive():
        return None
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        return ray.get(ray.remote(function).options(num_cpus=0, scheduling_strategy=affinity).remote(*args))
    except (TaskUnschedulableError, NodeDiedError):
        return None


def _wait_until(done: Any, until_s: float, otherwise: str) -> None:
    while not done():
        if time.monotonic() > until_s:
            raise StopError(f"after {STOP_DEADLINE_S:g} s {otherwise}; run `pals stop` again")
        time.sleep(0.2)
