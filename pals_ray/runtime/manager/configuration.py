"""From a fleet file to what the manager's core deploys, and what a change of one means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pals_ray.config.fleet import FleetConfig, parse_fleet_config
from pals_ray.config.policy_path import load_policy
from pals_ray.config.reader import ConfigError
from pals_ray.config.target import TargetConfig, with_changes
from pals_ray.control.allocation.replica_parking import ReplicaParking
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.manager.deployment import DeployedModel, Deployment
from pals_ray.types import Target

log = logging.getLogger("pals.manager")


def stored_config(content: Mapping[str, Any] | None) -> FleetConfig | None:
    """What the manager before was deployed with; None where it was not, or by a version that took other keys."""
    if content is None:
        return None
    try:
        return parse_fleet_config(dict(content), "the configuration of the manager before")
    except ConfigError as error:
        log.warning("waiting for the next deployment: %s", error)
        return None


def deployment_of(config: FleetConfig) -> Deployment:
    """What a fleet file deploys. Raises `ConfigError` where its policy cannot be loaded."""
    policy = load_policy(config.policy)
    return Deployment(
        budget_w=config.budget_w,
        policy_name=config.policy,
        policy=ReplicaParking(policy) if config.allow_parking else policy,
        models={
            model.model_id: DeployedModel(
                model.target.target(), model.known_as, model.tensor_parallel, model.expert_parallel
            )
            for model in config.models
        },
        ledger=LedgerConfig(
            reserve_w=config.reserve_w, lease_s=config.lease_s, allow_unenforced=config.hardware.allow_unenforced
        ),
        domains=tuple(domain.domain() for domain in config.domains),
        overhead=config.overhead.overhead(),
        fail_safe_cap_w=config.fail_safe_cap_w,
        time_scale=config.time_scale,
    )


def same_ledger(before: FleetConfig | None, after: FleetConfig) -> bool:
    """Whether a running ledger can go on: only budget, policy and targets differ."""
    return before is not None and _ledger_part(before) == _ledger_part(after)


def _ledger_part(config: FleetConfig) -> FleetConfig:
    models = tuple(model.model_copy(update={"target": TargetConfig()}) for model in config.models)
    return config.model_copy(update={"budget_w": 1.0, "policy": "", "models": models})


def changed_target(targets: Mapping[str, Target], model: str, changes: Mapping[str, Any]) -> Target:
    """A model's target with some values changed. Raises `ConfigError` naming the wrong one, or the models there are."""
    if model not in targets:
        raise ConfigError(f"there is no model {model!r} in this fleet; it has {', '.join(targets)}")
    return with_changes(targets[model], changes, f"the target of {model} stays as it is")
