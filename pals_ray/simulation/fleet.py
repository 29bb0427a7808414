"""The fleet that a setting describes: engines on their nodes' GPUs, dies drawn, requests' logs and routers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pals_ray.control.charge import ChargeTerms, group_terms
from pals_ray.control.messages import ManagedGpu, NodeInfo, ReplicaSpec
from pals_ray.models.physics.die_spread import die_factor
from pals_ray.models.physics.stepper import GroupStepper
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.engine.energy_meter import Meter
from pals_ray.simulation.engine.request_log import ModelLog
from pals_ray.simulation.engine.router import Router
from pals_ray.simulation.engine.scheduler import Engine
from pals_ray.simulation.setting import Offered, SimModel, SimNode, SimSetting, SimulationError
from pals_ray.simulation.traces import Trace


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica on its GPUs; `spec` is what the manager knows it by."""

    spec: ReplicaSpec
    model: SimModel
    node: SimNode
    terms: ChargeTerms
    engine: Engine


@dataclass(frozen=True, slots=True)
class Fleet:
    """All replicas, nodes by name, logs and routers by model. `parked` counts a node's GPUs without a replica."""

    placed: tuple[Placed, ...]
    nodes: Mapping[str, SimNode]
    parked: Mapping[str, int]
    logs: Mapping[str, ModelLog]
    routers: Mapping[str, Router]
    meter: Meter

    def parked_charge_w(self, node: SimNode) -> float:
        """What the parked GPUs of a node are charged, W."""
        parked = self.parked[node.name]
        return node.overhead.charge_w(parked * find_gpu(node.gpu).min_limit_w, parked, node.num_gpus)

    def parked_draw_w(self, node: SimNode) -> float:
        """What the parked GPUs of a node draw, W."""
        return self.parked[node.name] * find_gpu(node.gpu).idle_bare_w

    def rest_w(self, node: SimNode) -> float:
        """What a node draws beside its replicas, W at node level: parked GPUs and the constant overhead."""
        return self.parked_draw_w(node) * (1.0 + node.overhead.b) + node.overhead.a_w

    def node_j(self, now_s: float, died_s: Mapping[str, float]) -> float:
        """What nodes have drawn so far, J, overhead included; those that died nothing since."""
        total_j = 0.0
        for placed in self.placed:
            placed.engine.read(now_s)
            total_j += placed.engine.energy_j * (1.0 + placed.node.overhead.b)
        for node in self.nodes.values():
            total_j += self.rest_w(node) * min(now_s, died_s.get(node.name, now_s))
        return total_j


def build(setting: SimSetting, offered: Offered) -> Fleet:
    """Raises `SimulationError` for what cannot be placed or served, `UnknownSpecError` for unknown GPUs and models."""
    fleet = setting.fleet
    unknown = set(offered) - {model.name for model in fleet.models}
    if unknown:
        raise SimulationError(f"requests for {', '.join(sorted(unknown))}, which the fleet does not serve")
    none = Trace(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0.0)
    logs = {model.name: ModelLog(_checked(model, offered.get(model.name, none))) for model in fleet.models}
    meter = Meter(setting.duration_s)
    factors = [die_factor(i, fleet.die_spread) for i in range(sum(node.num_gpus for node in fleet.nodes))]
    random.Random(f"dies {setting.seed}").shuffle(factors)
    drawn = iter(factors)
    placed: list[Placed] = []
    engines: dict[str, list[Engine]] = {name: [] for name in logs}
    parked = {}
    for node in fleet.nodes:
        own_drawn = list(islice(drawn, node.num_gpus))
        dies = own_drawn if node.dies is None else list(node.dies)
        if len(dies) != node.num_gpus:
            raise SimulationError(f"node {node.name} has {node.num_gpus} GPUs, but {len(dies)} dies are given")
        silicon, used = find_gpu(node.gpu), 0
        for name in node.replicas:
            model = fleet.model(name)
            take = model.parallelism.num_gpus
            if used + take > node.num_gpus:
                raise SimulationError(f"node {node.name} has {node.num_gpus} GPUs, too few for {node.replicas}")
            if find_gpu(model.gpu) != silicon:
                raise SimulationError(f"{name} is for {model.gpu}, but node {node.name} has {node.gpu}")
            engine = Engine(
                logs[name],
                GroupStepper(model.physics, dies[used : used + take]),
                meter,
                model,
                number=len(placed),
                node_factor=1.0 + node.overhead.b,
                time_scale=fleet.time_scale,
            )
            spec = ReplicaSpec(
                replica_id=f"{name}#{len(engines[name])}",
                model=name,
                num_gpus=take,
                node_id=node.name,
                gpus=tuple(_uuid(node, i) for i in range(used, used + take)),
                max_batch=model.max_batch,
            )
            limits_w = ((silicon.min_limit_w, silicon.max_limit_w),) * take
            terms = group_terms(node.overhead, node.num_gpus, limits_w, (0.0,) * take)
            placed.append(Placed(spec, model, node, terms, engine))
            engines[name].append(engine)
            used += take
        parked[node.name] = node.num_gpus - used
    routers = {name: Router(name, own, random.Random(f"routes {name} {setting.seed}")) for name, own in engines.items()}
    for name in offered:
        if not engines[name]:
            raise SimulationError(f"requests for {name}, which has no replica on any node")
    return Fleet(tuple(placed), {node.name: node for node in fleet.nodes}, parked, logs, routers, meter)


def node_info(node: SimNode) -> NodeInfo:
    """The node as its first agent describes it: GPUs at their lowest limits, nothing running on them yet."""
    lowest_w, highest_w = find_gpu(node.gpu).min_limit_w, find_gpu(node.gpu).max_limit_w
    gpus = tuple(ManagedGpu(_uuid(node, i), lowest_w, highest_w, lowest_w) for i in range(node.num_gpus))
    return NodeInfo(node.name, gpus, node.domain, node.overhead)


def _uuid(node: SimNode, index: int) -> str:
    return f"{node.name}/{index}"


def _checked(model: SimModel, requests: Trace) -> Trace:
    """Refuse a request that no engine could ever hold: it would wait for ever."""
    longest = int((requests.prompt_tokens + requests.output_tokens).max(initial=0))
    if longest > model.kv_capacity_tokens:
        raise SimulationError(
            f"a request for {model.name} has {longest} tokens in all, but a replica's KV cache holds "
            f"{model.kv_capacity_tokens}: drop it, or use more GPUs a replica"
        )
    return requests
