"""Policies by import path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass

import policies
from pals_ray.config.reader import ConfigError
from pals_ray.control.snapshot import Policy


class UnknownPolicy(ConfigError):
    """A policy path that names nothing callable."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy: its import path, what it does in a line, and whether the fleet uses it."""

    path: str
    summary: str
    in_use: bool


def list_policies(in_use: str | None = None) -> tuple[PolicyInfo, ...]:
    """Every policy in the folder `policies`, by name; where `in_use` is another one, it comes last."""
    found = [f"policies.{module.name}:allocate" for module in pkgutil.iter_modules(policies.__path__)]
    if in_use is not None and in_use not in found:
        found.append(in_use)
    return tuple(PolicyInfo(path, _summary(path), path == in_use) for path in found)


def _summary(path: str) -> str:
    try:
        module = importlib.import_module(path.partition(":")[0])
        said = inspect.getdoc(load_policy(path)) if module.__doc__ is None else module.__doc__
    except (ImportError, UnknownPolicy):
        return "cannot be imported here"
    return (said or "").strip().partition("\n")[0]


def load_policy(path: str) -> Policy:
    """The function at `package.module:function`. Raises `UnknownPolicy` with what is wrong."""
    module_name, _, function_name = path.partition(":")
    try:
        policy: Policy = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownPolicy(
            f"policy {path!r} cannot be loaded ({error}); name one of ours, as policies.proportional:allocate, or a "
            "function of your own that every node can import"
        ) from error
    if not callable(policy):
        raise UnknownPolicy(f"policy {path!r} is not a function")
    return policy
