"""What is reserved: the limit that every GPU may have in force, and the sums per domain, kept by differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pals_ray.control.charge import EPS_W, ChargeTerms, group_terms
from pals_ray.control.messages import LedgerError, ManagedGpu, NodeInfo, ParkOrder
from pals_ray.control.snapshot import Domain
from pals_ray.types import Grant

#: Two limits this near one another are the same, W, for drivers may round a limit. Charged is what was read.
SAME_LIMIT_W = 0.5


def readings_w(limits_w: Mapping[str, float]) -> dict[str, float]:
    """The limits that were really read: anything but a positive number of watts counts as not read."""
    return {uuid: limit_w for uuid, limit_w in limits_w.items() if math.isfinite(limit_w) and limit_w > 0.0}


def domain_name(name: str | None) -> str:
    """A domain as messages name it; None is the whole fleet."""
    return f"domain {name}" if name is not None else "the fleet"


@dataclass(slots=True, eq=False)
class Gpu:
    """One managed GPU. Its limit in force is at most `limit_w`, unless an order to its present owner has raised it."""

    info: ManagedGpu
    limit_w: float
    owner: str | None = None
    park_seq: int = 0
    parked: bool = False

    def occupied_w(self, limit_w: float) -> float:
        """GPU watts that a limit occupies: the limit, or the clock floor's draw where that is higher."""
        return max(limit_w, self.info.floor_w)

    @property
    def least_w(self) -> float:
        """GPU watts that it can be brought to."""
        return self.occupied_w(self.info.min_limit_w if self.info.may_set else self.limit_w)


@dataclass(slots=True, eq=False)
class Replica:
    """One replica. `orders` are the (seq, cap) that its agent may still act on, oldest first, caps falling."""

    replica_id: str
    node: Node
    num_gpus: int
    terms: ChargeTerms
    grant: Grant
    gpus: tuple[Gpu, ...] = ()
    orders: list[tuple[int, float]] = field(default_factory=list)
    session: int = 0
    number: int = 0
    heard_s: float = -math.inf
    confirmed: bool = False
    waiting_since_s: float | None = None
    reserved_w: float = 0.0

    @property
    def cap_w(self) -> float:
        """The cap of the present grant, W."""
        return self.terms.cap_w(self.grant.charge_w)

    @property
    def may_set(self) -> bool:
        """Whether the limits of all its GPUs may be set."""
        return all(gpu.info.may_set for gpu in self.gpus)

    def answers(self, now_s: float, silent_s: float) -> bool:
        """Whether its agent has spoken to this manager within `silent_s`."""
        return self.session != 0 and now_s - self.heard_s <= silent_s

    def bound_w(self, gpu: Gpu) -> float:
        """The highest limit that `gpu` has, or that an order which its agent may still act on can give it, W."""
        if not gpu.info.may_set or not self.orders:
            return gpu.limit_w
        return max(gpu.limit_w, self.orders[0][1])

    def charge_w(self, limits_w: Iterable[float]) -> float:
        """Charge with its GPUs at these limits, W."""
        gpu_w = sum(gpu.occupied_w(limit_w) for gpu, limit_w in zip(self.gpus, limits_w, strict=True))
        return self.terms.overhead.charge_w(gpu_w, len(self.gpus), self.terms.node_gpus)

    def add_order(self, seq: int, cap_w: float) -> None:
        """Remember an order. Older ones with a lower cap are forgotten: they are superseded before this one is."""
        while self.orders and self.orders[-1][1] <= cap_w:
            self.orders.pop()
        self.orders.append((seq, cap_w))

    def add_oldest_order(self, cap_w: float) -> None:
        """Remember a cap that an earlier manager granted; any order of this manager supersedes it."""
        if cap_w > (self.orders[0][1] if self.orders else 0.0):
            self.orders.insert(0, (0, cap_w))

    def forget_orders_before(self, seq: int) -> None:
        """Forget the orders that an agent which obeys `seq` will never act on again."""
        self.orders = [order for order in self.orders if order[0] >= seq]


@dataclass(slots=True, eq=False)
class Node:
    """One node. `chain` are the domains that it counts in, innermost first, the fleet (None) last.

    `joined` is set once there was room for its parked charge and its GPUs were confirmed parked. `parked_w` is what its
    free GPUs are charged, `acked_seq` the last park order that was carried out, `unparked_since_s` since when a free
    GPU has not been confirmed at its lowest limit.
    """

    info: NodeInfo
    chain: tuple[str | None, ...]
    gpus: dict[str, Gpu]
    replicas: dict[str, Replica] = field(default_factory=dict)
    joined: bool = False
    lost: bool = False
    park: ParkOrder | None = None
    acked_seq: int = 0
    unparked_since_s: float | None = None
    parked_w: float = 0.0

    @property
    def free(self) -> list[Gpu]:
        """GPUs that no replica holds."""
        return [gpu for gpu in self.gpus.values() if gpu.owner is None]

    def group_w(self, gpu_w: float, count: int) -> float:
        """Charge of `count` of its GPUs that occupy `gpu_w` together, W."""
        return self.info.overhead.charge_w(gpu_w, count, len(self.gpus)) if count else 0.0

    def parked_least_w(self) -> float:
        """What its free GPUs will be charged once parked, W."""
        free = self.free
        return self.group_w(sum(gpu.least_w for gpu in free), len(free))

    def terms_for(self, gpus: Iterable[Gpu]) -> ChargeTerms:
        """Terms of a group of its GPUs."""
        infos = [gpu.info for gpu in gpus]
        ranges_w = tuple((info.min_limit_w, info.max_limit_w) for info in infos)
        return group_terms(self.info.overhead, len(self.gpus), ranges_w, tuple(float(info.floor_w) for info in infos))


class Reservations:
    """Nodes, replicas and running sums of all that is reserved, by domain (None: the whole fleet), W.

    `unsaved` is set by every change that has to be written down for the next manager before it takes effect.
    """

    def __init__(self, budget_w: float, domains: Iterable[Domain]) -> None:
        self.unsaved = False
        #: Numbers everything that is sent, in order.
        self.next_seq = itertools.count(1).__next__
        self.nodes: dict[str, Node] = {}
        self.replicas: dict[str, Replica] = {}
        self.domains: dict[str, Domain] = {domain.name: domain for domain in domains}
        self.budgets_w: dict[str | None, float] = {domain.name: domain.budget_w for domain in self.domains.values()}
        self.budgets_w[None] = budget_w
        self.reserved_w: dict[str | None, float] = dict.fromkeys(self.budgets_w, 0.0)
        inner_first = sorted(self.domains, key=lambda name: -len(self.chain(name)))
        #: Every domain before its parents, the fleet (None) last.
        self.inner_first: tuple[str | None, ...] = (*inner_first, None)

    def chain(self, domain: str | None) -> tuple[str | None, ...]:
        """The domains that count what happens in `domain`, innermost first, the fleet (None) last."""
        names: list[str | None] = []
        while domain is not None:
            if domain not in self.domains:
                raise LedgerError(f"no domain {domain!r} is configured; there are: {sorted(self.domains) or 'none'}")
            if domain in names:
                raise LedgerError(f"domain {domain!r} is its own parent: {' < '.join(map(str, names))}")
            names.append(domain)
            domain = self.domains[domain].parent
        return (*names, None)

    def insert_node(self, info: NodeInfo, limits_w: Mapping[str, float]) -> Node:
        """Take in a node with all GPUs free at `limits_w`."""
        gpus = {gpu.uuid: Gpu(info=gpu, limit_w=limits_w[gpu.uuid]) for gpu in info.gpus}
        node = Node(info=info, chain=self.chain(info.domain), gpus=gpus)
        self.nodes[info.node_id] = node
        self.recharge_parked(node)
        return node

    def remove_node(self, node: Node) -> None:
        """Take out a node: nothing of it is charged any more."""
        for replica in list(node.replicas.values()):
            self.remove_replica(replica)
        self._add(node, -node.parked_w)
        del self.nodes[node.info.node_id]

    def remove_replica(self, replica: Replica) -> None:
        """Free a replica's GPUs at the highest limit that they may have by now."""
        for gpu in replica.gpus:
            gpu.limit_w, gpu.owner, gpu.parked = replica.bound_w(gpu), None, False
        self._add(replica.node, -replica.reserved_w)
        del replica.node.replicas[replica.replica_id], self.replicas[replica.replica_id]
        self.recharge_parked(replica.node)

    def recharge(self, replica: Replica) -> None:
        """Bring the sums up to date after a change to a replica's orders or limits."""
        reserved_w = replica.charge_w(replica.bound_w(gpu) for gpu in replica.gpus) if replica.gpus else 0.0
        self._add(replica.node, reserved_w - replica.reserved_w)
        replica.reserved_w = reserved_w

    def recharge_parked(self, node: Node) -> None:
        """Bring the sums up to date after a change to a node's free GPUs."""
        free = node.free
        parked_w = node.group_w(sum(gpu.occupied_w(gpu.limit_w) for gpu in free), len(free))
        self._add(node, parked_w - node.parked_w)
        node.parked_w = parked_w

    def resum(self) -> None:
        """Sum everything anew, so that rounding errors of the differences never add up."""
        parts: dict[str | None, list[float]] = {name: [] for name in self.budgets_w}
        for node in self.nodes.values():
            own_w = math.fsum((node.parked_w, *(replica.reserved_w for replica in node.replicas.values())))
            for name in node.chain:
                parts[name].append(own_w)
        self.reserved_w = {name: math.fsum(values) for name, values in parts.items()}

    def room_w(self, node: Node) -> float:
        """Watts that may still be handed out on a node: the least room of its domains; negative when over, W."""
        return min(self.budgets_w[name] - self.reserved_w[name] for name in node.chain)

    def over_w(self) -> dict[str | None, float]:
        """The domains (None: the fleet) that are over their budget, and by how many W."""
        return {
            name: self.reserved_w[name] - budget_w
            for name, budget_w in self.budgets_w.items()
            if self.reserved_w[name] > budget_w + EPS_W
        }

    def _add(self, node: Node, difference_w: float) -> None:
        for name in node.chain:
            self.reserved_w[name] += difference_w
