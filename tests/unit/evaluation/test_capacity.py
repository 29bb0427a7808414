"""Capacity: the highest rate of requests at which a model attains its SLO at a fixed point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pals_ray.evaluation.capacity import STEP, alone, capacity_per_s
from pals_ray.models.physics.roofline import Workload
from pals_ray.simulation.setting import SimFleet, SimModel, SimNode
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Slo, Target

LENGTHS = Trace(np.zeros(64), np.full(64, 300), np.linspace(20, 100, 64).astype(int), 1.0)
TOP = OperatingPoint(400.0, 16)


def fleet(**limits):
    models = tuple(
        SimModel(name, name, "A100-SXM", workload=Workload(300.0, 60.0), target=Target(slo=Slo(**limits)))
        for name in ("Llama-3.1-8B", "OLMoE-1B-7B")
    )
    return SimFleet((SimNode("n", "A100-SXM", 3, ("Llama-3.1-8B", "OLMoE-1B-7B", "Llama-3.1-8B")),), models)


def capacity(point=TOP, **limits):
    return capacity_per_s(alone(fleet(**limits), "Llama-3.1-8B"), point, LENGTHS, (101,))


def test_one_model_alone_keeps_its_replicas_and_their_node():
    own = alone(fleet(ttft_s=1.0), "Llama-3.1-8B")
    assert [model.name for model in own.models] == ["Llama-3.1-8B"]
    assert own.nodes[0].replicas == ("Llama-3.1-8B", "Llama-3.1-8B")
    assert own.nodes[0].num_gpus == 3


def test_a_tighter_limit_or_a_lower_cap_leaves_less_capacity_and_an_impossible_one_none():
    wide = capacity(ttft_s=2.0, tpot_s=0.1)
    assert capacity(ttft_s=0.2, tpot_s=0.1) < wide
    assert capacity(replace(TOP, cap_w=150.0), ttft_s=2.0, tpot_s=0.1) < wide
    assert capacity(ttft_s=0.001, tpot_s=0.1) is None


def test_capacities_are_one_percent_apart():
    found = [capacity(ttft_s=ttft_s, tpot_s=0.1) for ttft_s in (0.2, 2.0)]
    steps = np.log(found[1] / found[0]) / np.log(STEP)
    assert steps == pytest.approx(round(steps), abs=1e-6)
