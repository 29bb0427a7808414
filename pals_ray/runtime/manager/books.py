"""From a fleet file and the nodes that are known to a ledger: what opening one takes, and what a redeploy changes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from pydantic import ValidationError

from pals_ray.config.fleet import ConfigError, FleetConfig, TargetConfig, explain
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import ManagedGpu, NodeInfo, NodeMemo
from pals_ray.errors import InfeasibleBudget
from pals_ray.runtime.messages import Registration
from pals_ray.types import Target

_Labels = Iterable[tuple[str, str]]


def open_ledger(config: FleetConfig, budget_w: float, epoch: int, nodes: Iterable[NodeMemo]) -> Ledger:
    """A ledger for this configuration on what is known of the nodes; agents say hello to it again."""
    return Ledger(
        LedgerConfig(
            reserve_w=config.reserve_w, lease_s=config.lease_s, allow_unenforced=config.hardware.allow_unenforced
        ),
        epoch=epoch,
        budget_w=budget_w,
        now_s=time.monotonic(),
        domains=[domain.domain() for domain in config.domains],
        known=nodes,
    )


def ledger_part(config: FleetConfig) -> FleetConfig:
    """What a ledger is opened with and cannot change while it runs: all but the budget, the policy and the targets."""
    models = tuple(model.model_copy(update={"target": TargetConfig()}) for model in config.models)
    return config.model_copy(update={"budget_w": 1.0, "policy": "", "models": models})


def redescribed(nodes: Iterable[NodeMemo], config: FleetConfig, labels: Mapping[str, _Labels]) -> tuple[NodeMemo, ...]:
    """Nodes that are known, under another configuration's overhead and domains; `labels` by node id."""
    names = {domain.name for domain in config.domains}

    def domain(node: NodeInfo) -> str | None:
        if node.node_id in labels:
            return domain_of(labels[node.node_id], config)
        return node.domain if node.domain in names else None

    overhead = config.overhead.overhead()
    return tuple(replace(m, node=replace(m.node, overhead=overhead, domain=domain(m.node))) for m in nodes)


def refuse_too_little(config: FleetConfig, nodes: Iterable[NodeMemo]) -> None:
    """`InfeasibleBudget` where a running fleet does not fit a new configuration even at its lowest caps."""
    lowest = [replace(memo, node=replace(memo.node, gpus=tuple(map(_at_lowest, memo.node.gpus)))) for memo in nodes]
    ledger = open_ledger(config, config.budget_w, 0, lowest)
    budgets_w = {None: config.budget_w} | {domain.name: domain.budget_w for domain in config.domains}
    for name, budget_w in budgets_w.items():
        needed_w = ledger.needed_w(time.monotonic(), name)
        if needed_w > budget_w:
            where = f"domain {name}" if name is not None else "the running fleet"
            raise InfeasibleBudget(budget_w, needed_w, f"the nodes of {where} at their lowest caps")


def changed_target(targets: Mapping[str, Target], model: str, changes: Mapping[str, Any]) -> Target:
    """A model's target with some values changed. Raises `ConfigError` naming the wrong one, or the models there are."""
    if model not in targets:
        raise ConfigError(f"there is no model {model!r} in this fleet; it has {', '.join(targets)}")
    try:
        return TargetConfig.model_validate({**asdict(targets[model]), **changes}).target()
    except ValidationError as error:
        raise ConfigError(f"the target of {model} stays as it is:\n{explain(error)}") from error


def _at_lowest(gpu: ManagedGpu) -> ManagedGpu:
    return replace(gpu, limit_w=gpu.min_limit_w) if gpu.may_set else gpu


def domain_of(node_labels: _Labels, config: FleetConfig) -> str | None:
    """The innermost domain whose label a node carries, None outside any."""
    labels = dict(node_labels)
    matching = [d.name for d in config.domains if d.label is not None and labels.get(d.label) == d.value]
    parents = {domain.parent for domain in config.domains}
    return next((name for name in matching if name not in parents), matching[0] if matching else None)


def node_info(registration: Registration, config: FleetConfig) -> NodeInfo:
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
        domain=domain_of(registration.spec.node_labels, config),
        overhead=config.overhead.overhead(),
        unmanaged=registration.unmanaged,
    )
