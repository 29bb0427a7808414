"""What is deployed, as the manager's core knows it, and what a change of it means for the nodes that are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import ManagedGpu, NodeInfo, NodeMemo, Registration
from pals_ray.control.snapshot import Domain, Overhead, Policy
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import Target

_Labels = Iterable[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class DeployedModel:
    """One model: what is wanted of it, the name by which tables may know it, and over how many ranks a replica goes."""

    target: Target
    known_as: str = ""
    tensor_parallel: int = 1
    expert_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Deployment:
    """A fleet file's content for the core. `policy_name` is what messages call the policy; watts are at node level.

    `fail_safe_cap_w` is the cap that an agent goes to when its lease ends, W per GPU; None for the device's lowest.
    `time_scale` is that of virtual GPUs.
    """

    budget_w: float
    policy_name: str
    policy: Policy
    models: Mapping[str, DeployedModel]
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    domains: tuple[Domain, ...] = ()
    overhead: Overhead = field(default_factory=Overhead)
    fail_safe_cap_w: float | None = None
    time_scale: float = 1.0

    @property
    def targets(self) -> dict[str, Target]:
        """What is wanted of each model."""
        return {name: model.target for name, model in self.models.items()}

    def open_ledger(self, budget_w: float, epoch: int, nodes: Iterable[NodeMemo], now_s: float) -> Ledger:
        """A ledger on what is known of the nodes; agents say hello to it again."""
        return Ledger(self.ledger, epoch=epoch, budget_w=budget_w, now_s=now_s, domains=self.domains, known=nodes)

    def redescribed(self, nodes: Iterable[NodeMemo], labels: Mapping[str, _Labels]) -> tuple[NodeMemo, ...]:
        """Nodes that are known, under this deployment's overhead and domains; `labels` by node id."""
        names = {domain.name for domain in self.domains}

        def domain(node: NodeInfo) -> str | None:
            if node.node_id in labels:
                return domain_of(labels[node.node_id], self.domains)
            return node.domain if node.domain in names else None

        return tuple(replace(m, node=replace(m.node, overhead=self.overhead, domain=domain(m.node))) for m in nodes)

    def refuse_too_little(self, nodes: Iterable[NodeMemo], now_s: float) -> None:
        """`InfeasibleBudget` where a running fleet does not fit even at its lowest caps."""
        lowest = [replace(memo, node=replace(memo.node, gpus=tuple(map(_at_lowest, memo.node.gpus)))) for memo in nodes]
        ledger = self.open_ledger(self.budget_w, 0, lowest, now_s)
        budgets_w = {None: self.budget_w} | {domain.name: domain.budget_w for domain in self.domains}
        for name, budget_w in budgets_w.items():
            needed_w = ledger.needed_w(now_s, name)
            if needed_w > budget_w:
                where = f"domain {name}" if name is not None else "the running fleet"
                raise InfeasibleBudget(budget_w, needed_w, f"the nodes of {where} at their lowest caps")

    def node_info(self, registration: Registration) -> NodeInfo:
        """A node as the ledger wants it described."""
        return NodeInfo(
            node_id=registration.spec.node_id,
            gpus=tuple(
                ManagedGpu(
                    uuid=gpu.info.uuid,
                    min_limit_w=gpu.info.min_limit_w,
                    max_limit_w=gpu.info.max_limit_w,
                    limit_w=gpu.limit_w,
                    floor_w=gpu.floor_w,
                    may_set=gpu.may_set,
                )
                for gpu in registration.managed
            ),
            domain=domain_of(registration.spec.node_labels, self.domains),
            overhead=self.overhead,
            unmanaged=registration.unmanaged,
        )


def domain_of(node_labels: _Labels, domains: Iterable[Domain]) -> str | None:
    """The innermost domain whose label a node carries, None outside any."""
    labels, domains = dict(node_labels), tuple(domains)
    matching = [d.name for d in domains if d.label is not None and labels.get(d.label) == d.value]
    parents = {domain.parent for domain in domains}
    return next((name for name in matching if name not in parents), matching[0] if matching else None)


def _at_lowest(gpu: ManagedGpu) -> ManagedGpu:
    return replace(gpu, limit_w=gpu.min_limit_w) if gpu.may_set else gpu
