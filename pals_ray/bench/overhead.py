"""`pals bench overhead`: what pals-ray costs an engine, against plain Ray Serve LLM on the same machine.

Both serve the same tiny model, side by side on one cluster, and are loaded in turn: a pair's runs take turns of some
seconds, since the speed of a shared host drifts within minutes by more than the difference looked for. Our side is not
paced: its worker holds a virtual GPU but computes as fast as vLLM's own. While the plain side is loaded, manager, agent
and guardian are stopped (SIGSTOP), so that none of their work falls on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import psutil

from pals_ray.bench.served_fleet import URL, BenchError, default_fleet, served_fleet
from pals_ray.engine.hook_cost import hook_us
from pals_ray.models.power_model import FloatArray
from pals_ray.plots.tables import Report, table
from pals_ray.profiling.load import ClosedLoop, LoadResult, RequestShape, in_full_swing

MODEL, PLAIN = "tiny-dense", "/plain"
STREAMS, SHAPE = 8, RequestShape(prompt_tokens=64, output_tokens=96)
WARM_S, TURN_S, SETTLE_S = 8.0, 10.0, 1.0
RESAMPLES = 10_000
#: How the command lines of manager, agents and guardian are known.
_ACTORS, _GUARDIAN = ("ray::PowerAgent", "ray::GlobalPowerManager"), "pals_ray.runtime.node.guardian"
UNPACED = "pals_ray.engine.virtual.unpaced_worker.UnpacedWorker"


def run(pairs: int, seconds: float) -> Report:
    """Compare an engine under pals-ray, unpaced, with plain ray.serve.llm; and time the scheduler's hook."""
    with served_fleet(unpaced_fleet()):
        _deploy_plain()
        done = np.array(asyncio.run(_alternate(pairs, seconds)))
    step_us = hook_us()
    rows, figures = [], dict[str, float]()
    for number, (title, key, form) in enumerate((("tokens/s", "throughput", ".1f"), ("TTFT p50, s", "ttft", ".4f"))):
        ours, plain = done[:, :, number].T
        median, low, high = ratio(ours / plain)
        half_width = (high - low) / 2
        interval = (f"{median:.4f}", f"{low:.4f} to {high:.4f}", f"{half_width:.4f}")
        rows.append((title, *interval, *(format(float(np.median(side)), form) for side in (ours, plain))))
        figures |= {f"{key}_ratio": median, f"{key}_half_width": half_width}
    shown = table(
        ("figure", "median ratio", "95 % interval", "half-width", "ours", "plain"),
        rows,
        left=("figure",),
        title=f"Under pals-ray over plain ray.serve.llm: {pairs} pairs of {seconds:g} s, {STREAMS} streams",
    )
    return Report(figures | {"hook_us": step_us}, shown, f"scheduler hook: {step_us:.2f} us a step")


def ratio(ratios: FloatArray) -> tuple[float, float, float]:
    """The median of some ratios, with the interval that 95 % of resampled medians lie in (bootstrap over pairs)."""
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def unpaced_fleet() -> dict[str, Any]:
    """The default fleet's dense model alone, its worker computing as fast as it can."""
    content = default_fleet()
    (model,) = [m for m in content["models"] if m["llm_config"]["model_loading_config"]["model_id"] == MODEL]
    model["llm_config"]["engine_kwargs"]["worker_cls"] = UNPACED
    return content | {"models": [model]}


def _deploy_plain() -> None:
    """Deploy the same engine a second time, as Ray Serve LLM serves it without pals-ray."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from pals_ray.runtime.serve.server import TINY_FOLDER, TINY_MODELS

    (model,) = unpaced_fleet()["models"]
    content = model["llm_config"]
    del content["engine_kwargs"]["worker_cls"]
    source = content["model_loading_config"]["model_source"]
    content["model_loading_config"]["model_source"] = str(TINY_FOLDER / TINY_MODELS[source])
    content["accelerator_config"] = {"kind": "cpu"}
    content["placement_group_config"] = {"bundle_per_worker": {"CPU": 0.2}}
    content["deployment_config"]["ray_actor_options"] = {"num_cpus": 0.1}
    ingress = {"ray_actor_options": {"num_cpus": 0.1}, "num_replicas": 1, "autoscaling_config": None}
    application = build_openai_app(
        {"llm_configs": [LLMConfig.model_validate(content)], "ingress_deployment_config": ingress}
    )
    serve.run(application, name="plain", route_prefix=PLAIN)


async def _alternate(pairs: int, seconds: float) -> list[list[tuple[float, float]]]:
    """Output tokens/s and median TTFT of each pair's two sides, ours first."""
    sides = (URL, URL + PLAIN)
    for side in sides:
        await _load(side, WARM_S, seed=0)
    turns = max(1, round(seconds / TURN_S))
    done = []
    for pair in range(pairs):
        runs: dict[str, list[LoadResult]] = {side: [] for side in sides}
        for turn in range(turns):
            for side in sides if (pair + turn) % 2 == 0 else reversed(sides):
                with _stopped_parts() if side != URL else nullcontext():
                    # The same requests for both.
                    runs[side].append(await _load(side, seconds / turns, seed=pair * turns + turn))
                await asyncio.sleep(SETTLE_S)
        done.append([_together(runs[side]) for side in sides])
    return done


def _together(turns: list[LoadResult]) -> tuple[float, float]:
    """Output tokens/s and median TTFT, s, of one side's run."""
    tokens = sum(turn.output_tokens for turn in turns)
    elapsed_s = sum(turn.ended_s - turn.started_s for turn in turns)
    return tokens / elapsed_s, float(np.median([ttft_s for turn in turns for ttft_s in turn.ttft_s]))


async def _load(url: str, seconds: float, seed: int) -> LoadResult:
    async with ClosedLoop(url, MODEL, STREAMS, in_full_swing(SHAPE, seed)) as load:
        await asyncio.sleep(seconds)
    if load.result.failures or not load.result.ttft_s:
        raise BenchError(f"requests to {url} failed: {load.result.failures[:3] or 'none completed'}")
    return load.result


@contextmanager
def _stopped_parts() -> Iterator[None]:
    """Stop manager, agents and guardian (SIGSTOP) while the block runs."""
    commands = ((p, " ".join(p.info["cmdline"] or ())) for p in psutil.process_iter(["cmdline"]))
    parts = [process for process, command in commands if command.startswith(_ACTORS) or _GUARDIAN in command]
    if len(parts) < 3:
        raise BenchError(f"manager, agent and guardian should run, but there are only {len(parts)} of them")
    for part in parts:
        part.suspend()
    try:
        yield
    finally:
        for part in parts:
            part.resume()
