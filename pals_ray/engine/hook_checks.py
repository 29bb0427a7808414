"""Whether the engine that was just started really runs with our hooks."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock

_GROUP = "vllm.stat_logger_plugins"
_PLUGIN = "pals_ray"


def engine_hooks_missing(block: ControlBlock) -> str | None:
    """What is wrong where scheduler or stat logger has not written to the block yet; None where both have."""
    if block.scheduler().heartbeat_ns == 0:
        return (
            f"the power-aware scheduler has not written to {block.path}: engine_kwargs must say scheduler_cls="
            f"'pals_ray.engine.scheduler.PowerAwareScheduler', and EngineCore must inherit {BLOCK_VARIABLE}"
        )
    if block.logger_heartbeat_ns() == 0:
        return f"the stat-logger plugin has not written to {block.path}: {_why_not_loaded()}"
    return None


def _why_not_loaded() -> str:
    """vLLM leaves plugins out silently; this says which of its reasons applies."""
    if not any(point.name == _PLUGIN for point in entry_points(group=_GROUP)):
        return (
            "pals-ray is not installed as a package in this environment (its sources are on the path, but vLLM finds "
            "plugins through installed metadata); install it with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _PLUGIN not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} leaves it out; add {_PLUGIN} to the list, or unset it"
    return "it is installed and allowed, but failed to load or has no log_stats; see the engine's log"
