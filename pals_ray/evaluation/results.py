"""A case's runs as plain JSON values, and a scenario's cases as one summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pals_ray.evaluation.cases import WARM_UP_S
from pals_ray.evaluation.policy_tables import FIGURES
from pals_ray.evaluation.runs import CaseRuns, Run
from pals_ray.plots.tables import Json
from pals_ray.simulation.results.figures import estimate, estimates, gain, means, model_figures, violations_by_priority
from pals_ray.simulation.results.run_result import RunResult

#: Points of a time series that a picture needs.
SERIES_POINTS = 600
#: Operating points are counted in cells of so many W and so many sequences.
_CAP_CELL_W, _BATCH_CELL = 5.0, 4

#: A smaller gain of the oracle counts as none: a share of it would only be rounding.
LEAST_GAIN = 1e-3


def run_case(runs: CaseRuns, policies: Sequence[str], seeds: Sequence[int]) -> Json:
    """Run a case with these policies (and `static`, the reference) and give everything that tables and pictures need.

    A gain is one over `static` on the same seed. `share_of_oracle_gain` is of the node-level gain, None without
    an oracle or where that gains next to nothing.
    """
    case = runs.case
    static = [runs.static(seed) for seed in seeds]
    oracle = runs.oracle() if case.scenario.oracle and case.load is not None else None
    oracle_gain = None if oracle is None else _gain(oracle[1], static)["mean"]
    made = {policy: [runs.run(policy, seed) for seed in seeds] for policy in dict.fromkeys(["static", *policies])}
    series = {policy: _series(of[0].result) for policy, of in made.items()}
    if oracle is not None:
        made["oracle"] = oracle[1]
    found = {policy: _policy(runs, of, static, oracle_gain) for policy, of in made.items()}
    if oracle is not None:
        found["oracle"]["point"] = asdict(oracle[0])
    fleet, natural_w, *_ = runs.limited(seeds[0])
    limits = {m.name: {"ttft_p99_s": m.target.ttft_p99_s, "itl_p99_s": m.target.itl_p99_s} for m in fleet.models}
    return {
        "case": case.name,
        "fleet": case.fleet.name,
        "gpu": case.fleet.nodes[0].gpu,
        "kind": case.kinds_of_models,
        "load": case.load,
        "budget": case.kind,
        "budget_share": case.budget_share,
        "duration_s": case.duration_s,
        "seeds": list(seeds),
        "saturated_tokens_per_s": runs.capacity_tokens_per_s,
        "natural_draw_w": natural_w,
        "limits": limits,
        "policies": found,
        "series": series,
    }


def _policy(runs: CaseRuns, made: Sequence[Run], static: Sequence[Run], oracle_gain: float | None) -> Json:
    node = _gain(made, static)
    spread = estimates([run.figures for run in made])
    by_model = [model_figures(run.result, WARM_UP_S) for run in made]
    by_priority = [violations_by_priority(run.result, WARM_UP_S) for run in made]
    return {
        "figures": {name: None if e is None else e.mean for name, e in spread.items()},
        "half_width": {name: None if e is None else e.half_width for name, e in spread.items()},
        "gain_over_static": node,
        "gain_over_static_gpu": _gain(made, static, "tokens_per_joule_gpu"),
        "share_of_oracle_gain": node["mean"] / oracle_gain if oracle_gain and oracle_gain >= LEAST_GAIN else None,
        "counts": all(runs.counts(run) for run in made),
        "models": {name: means([found[name] for found in by_model]) for name in by_model[0]},
        "violations_by_priority": means([{str(k): rate for k, rate in found.items()} for found in by_priority]),
        "points": _points(made[0].result),
        "cuts": [asdict(cut) for cut in made[0].result.cuts],
        "notes": list(dict.fromkeys(note for run in made for note in run.result.notes)),
    }


def _gain(made: Sequence[Run], static: Sequence[Run], figure: str = "tokens_per_joule") -> Json:
    """The gain in a figure over `static`, seed by seed."""
    pairs = zip(made, static, strict=True)
    found = estimate([gain(run.figures[figure], own.figures[figure]) for run, own in pairs])
    return {"mean": found.mean, "half_width": found.half_width}


def _series(result: RunResult) -> Json:
    """Power and budget over time, as means over equal stretches where there are more points than a picture needs."""
    step = max(math.ceil(len(result.time_s) / SERIES_POINTS), 1)
    whole = len(result.time_s) // step * step

    def thin(values: Any) -> list[float]:
        column = np.asarray(values, dtype=np.float64)[:whole].reshape(-1, step).mean(axis=1)
        return [round(float(v), 2) if math.isfinite(v) else None for v in column]  # type: ignore[misc]

    series: Json = {name: thin(getattr(result, name)) for name in ("time_s", "budget_w", "charge_w", "node_power_w")}
    return series | {"target_w": None if result.target_w is None else thin(result.target_w)}


def _points(result: RunResult) -> dict[str, list[tuple[float, int, float]]]:
    """By model: (cap, batch limit, share of time) of each cell of operating points that its replicas were in."""
    out = {}
    for model in dict.fromkeys(replica.model for replica in result.replicas):
        own = [replica for replica in result.replicas if replica.model == model]
        caps, batches = (np.concatenate([getattr(r, name) for r in own]) for name in ("cap_w", "batch_limit"))
        caps = np.round(caps / _CAP_CELL_W) * _CAP_CELL_W
        batches = np.maximum(np.round(batches / _BATCH_CELL) * _BATCH_CELL, 1)
        cells, counts = np.unique(np.stack([caps, batches], axis=1), axis=0, return_counts=True)
        shares = zip(cells.tolist(), (counts / counts.sum()).tolist(), strict=True)
        out[model] = [(cap_w, int(batch), share) for (cap_w, batch), share in shares]
    return out


#: The worst case of these says more than a mean does.
WORST_CASE = ("over_budget_s", "over_budget_max_w", "settle_s", "settle_over_w")


def summary(scenario: str, cases: Sequence[Json]) -> Json:
    """A scenario's policies, each figure the plain mean over its cases; saturated ones are left out where there are
    others. Counted gains take a gain whose violations are too many as none. The share of the oracle's gain is the mean
    counted gain over the oracle's mean gain, on cases with an oracle."""
    loaded = [case for case in cases if case["load"] is not None] or list(cases)
    names = dict.fromkeys(name for case in loaded for name in case["policies"])
    policies = {name: _summed([case for case in loaded if name in case["policies"]], name) for name in names}
    return {"scenario": scenario, "policies": policies, "cases": list(cases)}


def _summed(cases: Sequence[Json], name: str) -> Json:
    entries = [case["policies"][name] for case in cases]
    found: Json = means([{key: v for key, v in entry["figures"].items() if key in FIGURES} for entry in entries])
    for key in ("gain_over_static", "gain_over_static_gpu"):
        found[key] = math.fsum(entry[key]["mean"] for entry in entries) / len(entries)
        counted = [entry[key]["mean"] if entry["counts"] else 0.0 for entry in entries]
        found[f"{key}_counted"] = math.fsum(counted) / len(entries)
    found["share_of_oracle_gain"] = _oracle_share(cases, name)
    for key in WORST_CASE:
        known = [entry["figures"][key] for entry in entries if entry["figures"][key] is not None]
        found[key] = max(known, default=None)
    found["cases"] = len(cases)
    found["cases_that_count"] = sum(entry["counts"] for entry in entries)
    found["violations_by_model"] = _merged([{m: v["violation_rate"] for m, v in e["models"].items()} for e in entries])
    found["violations_by_priority"] = _merged([entry["violations_by_priority"] for entry in entries])
    return found


def _oracle_share(cases: Sequence[Json], name: str) -> float | None:
    known = [case["policies"] for case in cases if "oracle" in case["policies"]]
    best = math.fsum(found["oracle"]["gain_over_static"]["mean"] for found in known)
    own = math.fsum(found[name]["gain_over_static"]["mean"] for found in known if found[name]["counts"])
    return own / best if best > 0 else None


def _merged(entries: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each key over the mappings that have it."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {key: means([{key: entry[key]} for entry in entries if key in entry])[key] for key in keys}
