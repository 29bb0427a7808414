"""The runs of a case whose models are to serve tokens/s, as PALS has it: targets from what `static` serves flat out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from pals_ray.config.scenario import STATIC_BATCH, LoadSpec
from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.evaluation.capacity import alone
from pals_ray.evaluation.cases import SATURATION, Case, full_charge_w, requests_for
from pals_ray.evaluation.runs import CaseRuns, Run
from pals_ray.evaluation.simulated_profile import full_tokens_per_s
from pals_ray.models.specs import find_gpu
from pals_ray.simulation.oracle import Tried, best_flat_out
from pals_ray.simulation.results.figures import figures
from pals_ray.simulation.setting import SimFleet, SimSetting
from pals_ray.simulation.simulate import simulate
from pals_ray.simulation.traces import Trace
from pals_ray.types import OperatingPoint, Target
from policies import uniform

#: A fixed point is run flat out for so long, or for so many requests, to see what it serves, after as long to fill, s;
#: on a seed of no scenario.
FLAT_OUT_S, FLAT_OUT_REQUESTS = 60.0, 5000
_SEED = 8_000_000
#: PALS's own caps, W, and batches.
PALS_CAPS_W, PALS_BATCHES = (150.0, 200.0, 250.0, 300.0, 350.0, 400.0), (1, 4, 8, 16, 32, 64)


class FlatOut(NamedTuple):
    """What a model serves at a fixed point when requests never run out, on all of its replicas."""

    tokens_per_s: float
    tokens_per_joule: float


def saturating_per_s(fleet: SimFleet, point: OperatingPoint, lengths: Trace) -> float:
    """Requests/s of a fleet's one model that never run out at a point."""
    replicas = sum(len(node.replicas) for node in fleet.nodes)
    served = replicas * full_tokens_per_s(fleet.models[0], point)
    return SATURATION * served / float(lengths.output_tokens.mean())


@lru_cache(maxsize=4096)
def flat_out(fleet: SimFleet, point: OperatingPoint, lengths: Trace) -> FlatOut:
    """Run a fleet's one model flat out."""
    model = replace(fleet.models[0], fixed=point, target=Target(), max_batch=max(point.batch_limit, STATIC_BATCH))
    rate = saturating_per_s(fleet, point, lengths)
    half_s = max(min(FLAT_OUT_S, FLAT_OUT_REQUESTS / rate), 1.0)
    duration_s = 2.0 * half_s
    offered = requests_for(LoadSpec(ramp_s=0.0), "poisson", lengths, rate, duration_s, _SEED)
    own = replace(fleet, models=(model,))
    result = simulate(SimSetting(own, full_charge_w(own), uniform.allocate, duration_s), {model.name: offered})
    found = figures(result, half_s)
    return FlatOut(found["tokens_per_s"], found["tokens_per_joule"])


class TargetRuns(CaseRuns):
    """All runs of one case with tokens/s targets. In a closed loop, requests never run out."""

    follow_s = 0.0

    def __init__(
        self,
        case: Case,
        lengths: Trace,
        folder: Path,
        seeds: Sequence[int],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(case, lengths, folder, seeds, tick)
        self._free = {model.name: alone(self.fleet, model.name) for model in self.fleet.models}
        share, models = case.target or 1.0, []
        for model in self.fleet.models:
            aim = share * self._flat_out(model.name, self.reference[model.name]).tokens_per_s
            models.append(replace(model, target=replace(model.target, throughput_tokens_per_s=aim)))
        self.fleet = replace(self.fleet, models=tuple(models))

    @cached_property
    def capacity_per_s(self) -> Mapping[str, float | None]:
        """Requests/s that each model serves flat out at the reference."""
        mean = float(self._lengths.output_tokens.mean())
        return {name: self._flat_out(name, point).tokens_per_s / mean for name, point in self.reference.items()}

    @cached_property
    def rates_per_s(self) -> dict[str, float]:
        """The mean requests/s that are offered to each model."""
        if self.case.load is not None:
            return super().rates_per_s
        top = {m.name: OperatingPoint(find_gpu(m.gpu).max_limit_w, m.max_batch) for m in self.fleet.models}
        return {name: saturating_per_s(self._free[name], point, self._lengths) for name, point in top.items()}

    def oracles(self) -> dict[str, tuple[OperatingPoint, list[Run]]]:
        """By name, the best fixed point of the fleet's one model and its runs: the one with the most tokens/J of those
        that serve the target flat out; with the scenario's caps up to the start batch and up to 64, and with PALS's own
        caps and batches, one lever or both."""
        (model,) = self.fleet.models
        aim = model.target.throughput_tokens_per_s or 0.0

        def try_at(point: OperatingPoint) -> Tried:
            found = self._flat_out(model.name, point)
            return Tried(point, found.tokens_per_s >= aim, found.tokens_per_joule, point.batch_limit)

        caps_w, most = self._oracle_caps_w(), min(STATIC_BATCH, model.max_batch)
        grids = {
            "oracle": (caps_w, graph_sizes(model.max_batch)),
            f"oracle@{STATIC_BATCH}": (caps_w, graph_sizes(most)),
            "grid_batch_only@64": (PALS_CAPS_W[-1:], PALS_BATCHES),
            "grid_power_only@64": (PALS_CAPS_W, PALS_BATCHES[-1:]),
            "grid_joint@64": (PALS_CAPS_W, PALS_BATCHES),
        }
        return {name: self._or_static(best_flat_out(try_at, *grid)) for name, grid in grids.items()}

    def _flat_out(self, name: str, point: OperatingPoint) -> FlatOut:
        return flat_out(self._free[name], point, self._lengths)
