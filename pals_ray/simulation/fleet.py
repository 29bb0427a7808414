"""The fleet that a setting describes: engines on their nodes' GPUs, dies drawn, requests' logs and routers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

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
from pals_ray.simulation.setting import Offered, Requests, SimFleet, SimModel, SimNode, SimSetting, SimulationError


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica on its GPUs."""

    replica_id: str
    model: SimModel
    node: SimNode
    uuids: tuple[str, ...]
    terms: ChargeTerms
    engine: Engine

    @property
    def spec(self) -> ReplicaSpec:
        """What the manager knows it by."""
        return ReplicaSpec(
            replica_id=self.replica_id,
            model=self.model.name,
            num_gpus=len(self.uuids),
            node_id=self.node.name,
            gpus=self.uuids,
            max_batch=self.engine.max_batch,
        )


@dataclass(frozen=True, slots=True)
class Fleet:
    """All of it. `parked` is how many GPUs of each node no replica holds."""

    placed: tuple[Placed, ...]
    all_nodes: tuple[SimNode, ...]
    nodes: Mapping[str, NodeInfo]
    parked: Mapping[str, int]
    logs: Mapping[str, ModelLog]
    routers: Mapping[str, Router]
    meter: Meter

    def parked_charge_w(self, node: SimNode) -> float:
        """What the parked GPUs of a node are charged, W."""
        return node.overhead.charge_w(
            self.parked[node.name] * find_gpu(node.gpu).min_limit_w, self.parked[node.name], node.num_gpus
        )

    def parked_draw_w(self, node: SimNode) -> float:
        """What the parked GPUs of a node draw, W."""
        return self.parked[node.name] * find_gpu(node.gpu).idle_bare_w

    def node_j(self, now_s: float, died_s: Mapping[str, float]) -> float:
        """What nodes have drawn so far, J, overhead included; those that died nothing since."""
        total_j = 0.0
        for placed in self.placed:
            placed.engine.read(now_s)
            total_j += placed.engine.energy_j * (1.0 + placed.node.overhead.b)
        for node in self.all_nodes:
            rest_w = self.parked_draw_w(node) * (1.0 + node.overhead.b) + node.overhead.a_w
            total_j += rest_w * min(now_s, died_s.get(node.name, now_s))
        return total_j


def build(setting: SimSetting, offered: Offered) -> Fleet:
    """Raises `SimulationError` for what cannot be placed or served, `UnknownSpecError` for unknown GPUs and models."""
    fleet = setting.fleet
    unknown = set(offered) - {model.name for model in fleet.models}
    if unknown:
        raise SimulationError(f"requests for {', '.join(sorted(unknown))}, which the fleet does not serve")
    none = Requests(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    logs = {model.name: ModelLog(_checked(model, offered.get(model.name, none))) for model in fleet.models}
    meter = Meter(setting.duration_s)
    factors = [die_factor(i, fleet.die_spread) for i in range(sum(node.num_gpus for node in fleet.nodes))]
    random.Random(f"dies {setting.seed}").shuffle(factors)
    placed: list[Placed] = []
    nodes, parked = {}, {}
    for node in fleet.nodes:
        nodes[node.name] = _node_info(node)
        drawn, factors = factors[: node.num_gpus], factors[node.num_gpus :]
        dies = drawn if node.dies is None else list(node.dies)
        if len(dies) != node.num_gpus:
            raise SimulationError(f"node {node.name} has {node.num_gpus} GPUs, but {len(dies)} dies are given")
        used = 0
        for name in node.replicas:
            model = fleet.model(name)
            take = model.parallelism.num_gpus
            if used + take > node.num_gpus:
                raise SimulationError(f"node {node.name} has {node.num_gpus} GPUs, too few for {node.replicas}")
            if find_gpu(model.gpu) != find_gpu(node.gpu):
                raise SimulationError(f"{name} is for {model.gpu}, but node {node.name} has {node.gpu}")
            gpus = slice(used, used + take)
            placed.append(_place(fleet, node, model, logs[name], meter, gpus, dies[gpus], placed))
            used += take
        parked[node.name] = node.num_gpus - used
    routers = {
        name: Router(
            name, [p.engine for p in placed if p.model.name == name], random.Random(f"routes {name} {setting.seed}")
        )
        for name in logs
    }
    for name in offered:
        if not any(p.model.name == name for p in placed):
            raise SimulationError(f"requests for {name}, which has no replica on any node")
    return Fleet(tuple(placed), fleet.nodes, nodes, parked, logs, routers, meter)


def _place(
    fleet: SimFleet,
    node: SimNode,
    model: SimModel,
    log: ModelLog,
    meter: Meter,
    gpus: slice,
    dies: list[float],
    before: list[Placed],
) -> Placed:
    info = _node_info(node)
    silicon = find_gpu(node.gpu)
    own = info.gpus[gpus]
    terms = group_terms(
        node.overhead,
        node.num_gpus,
        tuple((gpu.min_limit_w, gpu.max_limit_w) for gpu in own),
        tuple(gpu.floor_w for gpu in own),
    )
    engine = Engine(
        log,
        GroupStepper(model.physics, dies),
        meter,
        number=len(before),
        max_batch=model.max_batch,
        step_tokens=model.step_tokens,
        kv_tokens=model.kv_capacity_tokens,
        cap_w=model.fixed.cap_w if model.fixed else silicon.min_limit_w,
        node_factor=1.0 + node.overhead.b,
        time_scale=fleet.time_scale,
    )
    if model.fixed:
        engine.order_batch_limit(model.fixed.batch_limit, 0.0)
    replica_id = f"{model.name}#{sum(p.model.name == model.name for p in before)}"
    return Placed(replica_id, model, node, tuple(gpu.uuid for gpu in own), terms, engine)


def _node_info(node: SimNode) -> NodeInfo:
    """The node as its first agent describes it: GPUs at their lowest limits, nothing running on them yet."""
    silicon = find_gpu(node.gpu)
    return NodeInfo(
        node_id=node.name,
        gpus=tuple(
            ManagedGpu(f"{node.name}/{i}", silicon.min_limit_w, silicon.max_limit_w, silicon.min_limit_w)
            for i in range(node.num_gpus)
        ),
        domain=node.domain,
        overhead=node.overhead,
    )


def _checked(model: SimModel, requests: Requests) -> Requests:
    """A request that no engine could ever hold would wait for ever."""
    if len(requests):
        longest = int((requests.prompt_tokens + requests.output_tokens).max())
        if longest > model.kv_capacity_tokens:
            raise SimulationError(
                f"a request for {model.name} has {longest} tokens in all, but a replica's KV cache holds "
                f"{model.kv_capacity_tokens}: drop it, or use more GPUs a replica"
            )
    return requests
