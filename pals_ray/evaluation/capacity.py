"""What a fixed point can serve: the highest rate of requests at which a model attains its SLO there."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from pals_ray.config.scenario import LoadSpec
from pals_ray.evaluation.cases import FOLLOW_S, WARM_UP_S, full_charge_w, requests_for
from pals_ray.evaluation.simulated_profile import full_tokens_per_s
from pals_ray.simulation.oracle import highest
from pals_ray.simulation.results.figures import figures, share_of
from pals_ray.simulation.setting import SimFleet, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint
from policies import uniform

#: What is tuned is tuned on so many requests at least, over all tuning seeds, and for so long, s.
TUNED_REQUESTS, TUNED_S = 2000, 150.0
#: Rates are tried in steps of this factor, from the lowest to the highest power of it, times what a full batch serves
#: by the roofline. A model that does not attain its SLO at the lowest (5 %) cannot be served within it.
STEP = 1.01
LOWEST, HIGHEST = -300, 20


def tuned_s(requests_per_s: float, seeds: int) -> float:
    """How long a run is that something is tuned on, without its warm-up, s."""
    return max(TUNED_S, TUNED_REQUESTS / requests_per_s / seeds)


def alone(fleet: SimFleet, name: str) -> SimFleet:
    """The fleet with one model's replicas only; all other GPUs are parked."""
    nodes = (replace(node, replicas=tuple(own for own in node.replicas if own == name)) for node in fleet.nodes)
    return replace(fleet, nodes=tuple(nodes), models=(fleet.model(name),), domains=())


@lru_cache(maxsize=64)
def capacity_per_s(fleet: SimFleet, point: OperatingPoint, lengths: Trace, seeds: tuple[int, ...]) -> float | None:
    """The highest requests/s, in steps of 1 %, at which a fleet's one model attains its SLO over these seeds with its
    replicas at a point; None where even a twentieth of what they serve is too much."""
    model = replace(fleet.models[0], fixed=point, max_batch=point.batch_limit)
    own = replace(fleet, models=(model,))
    replicas = sum(len(node.replicas) for node in own.nodes)
    full_per_s = replicas * full_tokens_per_s(model, point) / float(lengths.output_tokens.mean())

    def attains(power: int) -> bool:
        rate = full_per_s * STEP**power
        duration_s = WARM_UP_S + tuned_s(rate, len(seeds))
        counts = np.zeros(2, dtype=np.int64)
        for seed in seeds:
            offered = requests_for(LoadSpec(), "poisson", lengths, rate, duration_s, seed)
            setting = SimSetting(own, full_charge_w(own), uniform.allocate, duration_s, seed=seed, follow_s=FOLLOW_S)
            found = figures(simulate(setting, {model.name: offered}), WARM_UP_S)
            counts += found["good_requests"], found["late_requests"]
        attainment = share_of(int(counts[0]), int(counts[1]))
        return attainment is not None and attainment >= model.target.slo.attainment

    power = highest(attains, LOWEST, HIGHEST)
    return None if power is None else full_per_s * STEP**power
