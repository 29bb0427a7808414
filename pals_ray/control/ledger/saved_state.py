"""What a manager writes down so that the next one can charge in full everyone that it has not heard yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pals_ray.control.ledger.reservations import Replica, Reservations
from pals_ray.control.messages import NodeMemo, ReplicaMemo
from pals_ray.types import Grant


def memo(accounts: Reservations) -> tuple[NodeMemo, ...]:
    """Every node with the highest limit that each GPU may have, or get by orders already sent."""
    found = []
    for node in accounts.nodes.values():
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


def restore(accounts: Reservations, known: Iterable[NodeMemo], epoch: int, now_s: float, lease_s: float) -> None:
    """Open the books with what was written down: every replica silent, every GPU charged its highest limit."""
    for entry in known:
        node = accounts.insert_node(entry.node, {gpu.uuid: gpu.limit_w for gpu in entry.node.gpus})
        node.joined = entry.joined
        node.unparked_since_s = now_s
        for note in entry.replicas:
            gpus = tuple(node.gpus[uuid] for uuid in note.uuids)
            terms = node.terms_for(gpus or list(node.gpus.values())[: note.num_gpus])
            # Nobody was ever sent this grant (seq 0): it stands for whatever the last manager had granted.
            cap_w = max((gpu.limit_w for gpu in gpus), default=terms.min_limit_w)
            grant = Grant(note.replica_id, epoch, 0, terms.charge_w(cap_w), lease_s, "granted by the last manager")
            replica = Replica(note.replica_id, node, note.num_gpus, terms, grant, gpus=gpus, heard_s=now_s)
            for gpu in gpus:
                gpu.owner = note.replica_id
            accounts.replicas[note.replica_id] = node.replicas[note.replica_id] = replica
            accounts.recharge(replica)
        accounts.recharge_parked(node)
