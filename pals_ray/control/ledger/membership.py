"""Who is in the ledger: nodes and replicas that come, and the GPUs that each replica claims."""

from __future__ import annotations

from collections.abc import Mapping

from pals_ray.control.ledger.reservations import Node, Replica, Reservations
from pals_ray.control.messages import GpuHeldError, Hello, LedgerError, NodeInfo
from pals_ray.types import Grant


def admit_node(reservations: Reservations, info: NodeInfo, now_s: float, silent_s: float) -> tuple[Node, bool]:
    """Take in a node; also whether its GPUs were charged before, under a dead node that goes with this.

    Such GPUs are charged as they were there, or as found where that is more. Raises `LedgerError` where agents of the
    other node still report and it has not been called lost.
    """
    limits_w = {gpu.uuid: gpu.limit_w for gpu in info.gpus}
    if not info.gpus:
        raise LedgerError(f"node {info.node_id} has no managed GPU: {len(info.unmanaged)} are held by others")
    reservations.chain(info.domain)
    before = [node for node in reservations.nodes.values() if not limits_w.keys().isdisjoint(node.gpus)]
    for node in before:
        if not node.lost and any(replica.answers(now_s, silent_s) for replica in node.replicas.values()):
            raise LedgerError(f"node {info.node_id} shows GPUs of node {node.info.node_id}, whose agents still speak")
    for node in before:
        for replica in list(node.replicas.values()):
            reservations.remove_replica(replica)
        for uuid in limits_w.keys() & node.gpus.keys():
            limits_w[uuid] = max(limits_w[uuid], node.gpus[uuid].limit_w)
        reservations.remove_node(node)
    return reservations.insert_node(info, limits_w), bool(before)


def register(reservations: Reservations, hello: Hello, node: Node, epoch: int, lease_s: float) -> Replica:
    """Add a new replica: free GPUs are set aside for it and stay parked until it claims them."""
    free = node.free
    left = len(free) - sum(replica.num_gpus for replica in node.replicas.values() if not replica.gpus)
    if not 1 <= hello.num_gpus <= left:
        raise LedgerError(
            f"replica {hello.replica_id} wants {hello.num_gpus} GPUs of node {node.info.node_id}, where {left} of "
            f"{len(node.gpus)} managed GPUs are free"
        )
    # Its GPUs are known only once its ranks run. The cheapest ones pay for no more than the lowest limit of any.
    terms = node.terms_for(sorted(free, key=lambda gpu: gpu.least_w)[: hello.num_gpus])
    grant = Grant(hello.replica_id, epoch, 0, terms.least_charge_w, lease_s, "registered")
    replica = Replica(hello.replica_id, node, hello.num_gpus, terms, grant)
    reservations.replicas[hello.replica_id] = node.replicas[hello.replica_id] = replica
    return replica


def check_same(replica: Replica, hello: Hello) -> None:
    """Raise `LedgerError` unless a known replica says hello from its node, with as many GPUs and no others."""
    node_id = replica.node.info.node_id
    if (node_id, replica.num_gpus) != (hello.node_id, hello.num_gpus):
        raise LedgerError(
            f"replica {replica.replica_id} is known on node {node_id} with {replica.num_gpus} GPUs, not on "
            f"{hello.node_id} with {hello.num_gpus}: let the old one leave first"
        )
    if replica.gpus:
        check_held(replica, hello.limits_w, "reads")


def check_held(replica: Replica, limits_w: Mapping[str, float], verb: str) -> None:
    """Raise `LedgerError` where these are not a replica's own GPUs."""
    held = [gpu.info.uuid for gpu in replica.gpus]
    if not limits_w.keys() <= set(held):
        raise LedgerError(f"replica {replica.replica_id} holds {', '.join(held)}, but {verb} {', '.join(limits_w)}")


def assign_gpus(reservations: Reservations, replica: Replica, limits_w: Mapping[str, float]) -> None:
    """Move free GPUs to a replica, at the limits read by its agent or what they were charged, if that is more."""
    node = replica.node
    for uuid in limits_w:
        if uuid not in node.gpus:
            raise LedgerError(f"{uuid} is not a managed GPU of node {node.info.node_id}: {', '.join(node.gpus)}")
        owner = node.gpus[uuid].owner
        if owner is not None:
            raise GpuHeldError(uuid, owner)
    gpus = tuple(node.gpus[uuid] for uuid in limits_w)
    if len(gpus) != replica.num_gpus:
        raise LedgerError(f"replica {replica.replica_id} registered {replica.num_gpus} GPUs and claims {len(gpus)}")
    terms = node.terms_for(gpus)
    # If they were parked at different limits, the lower ones would have to rise before anything was granted.
    if len({gpu.info.min_limit_w for gpu in gpus}) > 1 or terms.min_limit_w > terms.max_limit_w:
        raise LedgerError(f"the GPUs of replica {replica.replica_id} have different lowest limits: no common cap")
    for gpu in gpus:
        gpu.owner, gpu.limit_w = replica.replica_id, max(gpu.limit_w, limits_w[gpu.info.uuid])
    replica.gpus, replica.terms = gpus, terms
    reservations.recharge_parked(node)
    reservations.recharge(replica)
