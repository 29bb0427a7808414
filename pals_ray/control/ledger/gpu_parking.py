"""Parking free GPUs: one agent of the node lowers them, and they are charged as found until that is confirmed."""

from __future__ import annotations

from collections.abc import Iterable

from pals_ray.control.ledger.reservations import SAME_LIMIT_W, Gpu, Node, Reservations, readings_w
from pals_ray.control.messages import AgentReport, ParkOrder


class GpuParking:
    """Sends the park orders of one manager (`epoch`) to agents that have reported within `silent_s`."""

    def __init__(self, reservations: Reservations, epoch: int, silent_s: float) -> None:
        self._reservations = reservations
        self._epoch = epoch
        self._silent_s = silent_s

    def park(self, node: Node, gpus: Iterable[Gpu], now_s: float) -> None:
        """Park GPUs that no replica holds any more. Only what is read after the order that now goes out counts."""
        seq = self._reservations.next_seq()
        for gpu in gpus:
            gpu.park_seq, gpu.parked = seq, not gpu.info.may_set
        self._reservations.recharge_parked(node)
        _note_unparked(node, now_s)
        self.renew_order(node, now_s)

    def renew_order(self, node: Node, now_s: float) -> None:
        """Renew a node's park order where its free GPUs, or the agent that carries it out, have changed."""
        before = node.park
        answering = [name for name, replica in node.replicas.items() if replica.answers(now_s, self._silent_s)]
        if not answering:
            node.park = None
            return
        executor = before.executor if before is not None and before.executor in answering else answering[0]
        gpus = [gpu for gpu in node.free if gpu.info.may_set]
        limits_w = {gpu.info.uuid: gpu.info.min_limit_w for gpu in gpus}
        newest = max((gpu.park_seq for gpu in gpus), default=0)
        if before is None or (before.executor, before.limits_w) != (executor, limits_w) or before.seq < newest:
            seq = self._reservations.next_seq()
            node.park = ParkOrder(node.info.node_id, executor, self._epoch, seq, limits_w)

    def note_report(self, node: Node, report: AgentReport, now_s: float) -> None:
        """Note what an agent read on the free GPUs of its node."""
        park_epoch, seq = report.parking
        if park_epoch != self._epoch:
            return
        node.acked_seq = max(node.acked_seq, seq)
        for uuid, limit_w in readings_w(report.parked_w).items():
            gpu = node.gpus.get(uuid)
            # A reading from before the GPU was freed does not show what its last owner did afterwards.
            if gpu is not None and gpu.owner is None and seq >= gpu.park_seq:
                gpu.limit_w = limit_w
                gpu.parked = limit_w <= gpu.info.min_limit_w + SAME_LIMIT_W or not gpu.info.may_set
        self._reservations.recharge_parked(node)
        _note_unparked(node, now_s)


def is_order_due(node: Node) -> bool:
    """Whether a node's park order is not known to be carried out."""
    return node.park is not None and (node.acked_seq < node.park.seq or node.unparked_since_s is not None)


def _note_unparked(node: Node, now_s: float) -> None:
    if all(gpu.parked for gpu in node.free):
        node.unparked_since_s = None
    elif node.unparked_since_s is None:
        node.unparked_since_s = now_s
