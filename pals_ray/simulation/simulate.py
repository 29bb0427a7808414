"""Running a setting under given requests, from first to last."""

from __future__ import annotations

from pals_ray.simulation.collect import collect
from pals_ray.simulation.results.run_result import RunResult
from pals_ray.simulation.run import Run
from pals_ray.simulation.setting import Offered, SimSetting


def simulate(setting: SimSetting, requests: Offered) -> RunResult:
    """Run the fleet for `setting.duration_s` under these requests; the same input gives the same result to the last
    digit. Raises `SimulationError` for a fleet that cannot be, `InfeasibleBudget` for a budget under its lowest caps.
    """
    run = Run(setting, requests)
    run.to_the_end()
    return collect(run)
