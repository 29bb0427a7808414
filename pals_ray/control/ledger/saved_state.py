"""What a manager saves so that the next one can charge every replica in full before its agent has reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pals_ray.control.ledger.reservations import Replica, Reservations
from pals_ray.control.messages import NodeMemo, ReplicaMemo
from pals_ray.types import Grant


def memo(reservations: Reservations) -> tuple[NodeMemo, ...]:
    """Every node with the highest limit that each GPU may have, or get by orders already sent."""
    found = []
    for node in reservations.nodes.values():
        bounds_w = {uuid: gpu.limit_w for uuid, gpu in node.gpus.items()}
        for replica in node.replicas.values():
            bounds_w.update((gpu.info.uuid, replica.bound_w(gpu)) for gpu in replica.gpus)
        gpus = tuple(replace(gpu, limit_w=bounds_w[gpu.uuid]) for gpu in node.info.gpus)
        replicas = tuple(
            ReplicaMemo(replica.replica_id, replica.num_gpus, tuple(gpu.info.uuid for gpu in replica.gpus))
            for replica in node.replicas.values()
        )
        found.append(NodeMemo(replace(node.info, gpus=gpus), node.joined, replicas))
    return tuple(found)


def restore(reservations: Reservations, known: Iterable[NodeMemo], epoch: int, now_s: float, lease_s: float) -> None:
    """Begin with what was saved: every replica counts as silent, every GPU is charged its highest limit."""
    for entry in known:
        node = reservations.insert_node(entry.node, {gpu.uuid: gpu.limit_w for gpu in entry.node.gpus})
        node.joined = entry.joined
        node.unparked_since_s = now_s
        for note in entry.replicas:
            gpus = tuple(node.gpus[uuid] for uuid in note.uuids)
            terms = node.terms_for(gpus or list(node.gpus.values())[: note.num_gpus])
            # This grant (seq 0) is sent to nobody: it stands for whatever the last manager had granted.
            cap_w = max((gpu.limit_w for gpu in gpus), default=terms.min_limit_w)
            grant = Grant(note.replica_id, epoch, 0, terms.charge_w(cap_w), lease_s, "granted by the last manager")
            replica = Replica(note.replica_id, node, note.num_gpus, terms, grant, gpus=gpus, heard_s=now_s)
            for gpu in gpus:
                gpu.owner = note.replica_id
            reservations.replicas[note.replica_id] = node.replicas[note.replica_id] = replica
            reservations.recharge(replica)
        reservations.recharge_parked(node)
