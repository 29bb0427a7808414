"""The fleet that the tests bring up on test hosts: the default models on two workers, with overhead and domains."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

import yaml

from deployments.application import DEFAULT_CONFIG
from pals_ray.profiling.load import ClosedLoop, RequestShape
from pals_ray.runtime.node.node_file import node_key
from tests.hosts.cluster import ROOT, HostCluster
from tests.hosts.network import Host
from tests.hosts.sampling import LimitSampler
from tests.support.fleets import wait_for

MODELS = ["tiny-dense", "tiny-moe"]
LEASE_S = 5.0
FAIL_SAFE_W = 120.0
OVERHEAD = {"a_w": 50, "b": 0.1}
#: Two nodes of four A100s need 980 W at their lowest caps. Eight requests in flight on each model would use 590 W on
#: one worker and 750 W on the other, so that each of these budgets binds.
BUDGETS_W = {"fleet": 1300, "circuit-1": 1280, "rack-a": 585, "rack-b": 720}
#: What the fleet's budget is cut to.
LOW_W = 1100


def fleet_file(places: Mapping[str, Host]) -> dict[str, Any]:
    """The default models, each on the host named in `places` or anywhere, under budgets of the tests' own for the
    domains of the project's example. Left to itself, Ray packs what is small together."""
    content = yaml.safe_load(DEFAULT_CONFIG.read_text())
    for model in content["models"]:
        config = model["llm_config"]
        host = places.get(config["model_loading_config"]["model_id"])
        if host is not None:
            config["placement_group_config"] = {"bundle_per_worker": {"CPU": 0.2, f"node:{host.address}": 0.001}}
    domains = yaml.safe_load((ROOT / "deployments" / "examples" / "racks.yaml").read_text())["domains"]
    return {
        **content,
        "budget_w": BUDGETS_W["fleet"],
        "overhead": OVERHEAD,
        "domains": [{**domain, "budget_w": BUDGETS_W[domain["name"]]} for domain in domains],
        "lease_s": LEASE_S,
        "fail_safe_cap_w": FAIL_SAFE_W,
    }


def bring_up(cluster: HostCluster, places: Mapping[str, Host]) -> None:
    """From nothing to both models answering through the head, by the README's steps."""
    cluster.write_fleet_file(fleet_file(places))
    for step in ("ray get-auth-token", "ray up", "ray rsync-up", "ray exec cluster.yaml 'serve run"):
        cluster.step(step)
    took_s = wait_for(lambda: serves(cluster), 60, "not both models are served")
    print(f"both models answer through the head {took_s:.1f} s later")


def serves(cluster: HostCluster) -> bool:
    """Whether each model has a replica that holds GPUs, and answers."""
    served = {name.partition("#")[0] for name in cluster.places()}
    return served == set(MODELS) and all(cluster.answers(model) for model in MODELS)


@contextmanager
def sampled(cluster: HostCluster) -> Iterator[LimitSampler]:
    """Samples of every domain's limits while the block runs."""
    a, b = (node_key(worker.address) for worker in cluster.workers)
    groups = {"fleet": [a, b], "circuit-1": [a, b], "rack-a": [a], "rack-b": [b]}
    with LimitSampler(groups, **OVERHEAD) as sampler:
        yield sampler


def wait_for_caps(sampler: LimitSampler) -> None:
    """Wait until load has raised the caps well above the low budget."""
    wait_for(lambda: sampler.last[1]["fleet"] > LOW_W + 100, 60, "the load raises no cap", 0.05)


def look_on(sampler: LimitSampler, since_s: float, for_s: float) -> None:
    """Let the samples go on for so long after a time."""
    wait_for(lambda: sampler.last[0] > since_s + for_s, for_s + 5, "nobody looks at the limits", 0.02)


@contextmanager
def loaded(cluster: HostCluster, streams: int = 8) -> Iterator[None]:
    """So many requests in flight on each model while the block runs; after one that fails the next is asked."""
    here = multiprocessing.get_context("fork")  # a process of its own: clients would keep the sampler waiting
    stop = here.Event()
    clients = here.Process(target=_ask, args=(cluster.url, streams, stop), daemon=True)
    clients.start()
    try:
        yield
    finally:
        stop.set()
        clients.join(20)
        clients.kill()


def _ask(url: str, streams: int, stop: Event) -> None:
    os.nice(15)  # as Ray's workers: clients have machines of their own

    async def run() -> None:
        loops = [ClosedLoop(url, model, streams, RequestShape(32, 64), timeout_s=20) for model in MODELS]
        async with loops[0], loops[1]:
            while not stop.is_set():
                await asyncio.sleep(0.1)
            for loop in loops:
                loop.abandon()

    asyncio.run(run())
