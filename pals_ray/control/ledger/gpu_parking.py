"""Free GPUs: ordered to their lowest limits, one agent a node, and charged as found until that is confirmed."""

from __future__ import annotations

from collections.abc import Iterable

from pals_ray.control.ledger.reservations import SAME_LIMIT_W, Gpu, Node, Reservations, readings_w
from pals_ray.control.messages import AgentReport, ParkOrder


def free(accounts: Reservations, node: Node, gpus: Iterable[Gpu], epoch: int, now_s: float, silent_s: float) -> None:
    """GPUs that nobody holds any more are to be parked: only what is read after the order that now goes out counts."""
    seq = accounts.next_seq()
    for gpu in gpus:
        gpu.park_seq, gpu.parked = seq, not gpu.info.may_set
    accounts.recharge_parked(node)
    _note(node, now_s)
    order(accounts, node, epoch, now_s, silent_s)


def order(accounts: Reservations, node: Node, epoch: int, now_s: float, silent_s: float) -> None:
    """Renew a node's park order where its free GPUs, or the agent that carries it out, have changed."""
    before = node.park
    executor = before.executor if before is not None else ""
    if executor not in node.replicas or not node.replicas[executor].answers(now_s, silent_s):
        executor = next((name for name, replica in node.replicas.items() if replica.answers(now_s, silent_s)), "")
    if not executor:
        node.park = None
        return
    gpus = [gpu for gpu in node.free if gpu.info.may_set]
    limits_w = {gpu.info.uuid: gpu.info.min_limit_w for gpu in gpus}
    newest = max((gpu.park_seq for gpu in gpus), default=0)
    if before is None or (before.executor, before.limits_w) != (executor, limits_w) or before.seq < newest:
        node.park = ParkOrder(node.info.node_id, executor, epoch, accounts.next_seq(), limits_w)


def read(accounts: Reservations, node: Node, report: AgentReport, epoch: int, now_s: float) -> None:
    """Take note of what an agent read on the free GPUs of its node."""
    park_epoch, seq = report.parking
    if park_epoch != epoch:
        return
    node.acked_seq = max(node.acked_seq, seq)
    for uuid, limit_w in readings_w(report.parked_w).items():
        gpu = node.gpus.get(uuid)
        # A reading made before the GPU was freed says nothing of what its last owner did after.
        if gpu is not None and gpu.owner is None and seq >= gpu.park_seq:
            gpu.limit_w = limit_w
            gpu.parked = limit_w <= gpu.info.min_limit_w + SAME_LIMIT_W or not gpu.info.may_set
    accounts.recharge_parked(node)
    _note(node, now_s)


def due(node: Node) -> bool:
    """Whether a node's park order is not known to be carried out."""
    return node.park is not None and (node.acked_seq < node.park.seq or node.unparked_since_s is not None)


def _note(node: Node, now_s: float) -> None:
    if all(gpu.parked for gpu in node.free):
        node.unparked_since_s = None
    elif node.unparked_since_s is None:
        node.unparked_since_s = now_s
