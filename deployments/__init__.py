"""Serve applications: `serve run deployments:app`, or `serve run deployments:build config=fleet.yaml`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.application import build

if TYPE_CHECKING:
    from ray.serve import Application

    app: Application

__all__ = ["app", "build"]


def __getattr__(name: str) -> Any:
    # Built only when asked for, so that `build` with another file does not build the default fleet first.
    if name == "app":
        return build({})
    raise AttributeError(name)
