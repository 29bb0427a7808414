"""A case's runs as plain JSON values, and a scenario's cases as one summary."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pals_ray.evaluation.cases import WARM_UP_S
from pals_ray.evaluation.policy_tables import FIGURES
from pals_ray.evaluation.runs import CaseRuns, Run, pooled_attainment
from pals_ray.plots.tables import Json
from pals_ray.simulation.results.figures import (
    counts_as_gain,
    estimate,
    estimates,
    gain,
    means,
    model_figures,
    priority_figures,
)
from pals_ray.simulation.results.run_result import RunResult
from pals_ray.types import Slo

#: Points of a time series that a picture needs.
SERIES_POINTS = 600
#: Operating points are counted in cells of so many W and so many sequences.
_CAP_CELL_W, _BATCH_CELL = 5.0, 4

#: With a tokens/s target a gain counts if the target is missed in at most this share of intervals.
MOST_UNDER_TARGET = 0.01
#: A smaller gain of the oracle counts as none: a share of it would only be rounding.
LEAST_GAIN = 1e-3


def run_case(runs: CaseRuns, policies: Sequence[str], seeds: Sequence[int]) -> Json:
    """Run a case with these policies (and `static`, the reference) and give everything that tables and pictures need.

    A gain is one over `static` on the same seed. `share_of_oracle_gain` is of the node-level gain, None without
    an oracle or where that gains next to nothing. Where the reference serves no model within its limits there are no
    policies.
    """
    case = runs.case
    head = {
        "case": case.name,
        "fleet": case.fleet.name,
        "gpu": case.fleet.nodes[0].gpu,
        "kind": case.kinds_of_models,
        "limit_set": case.limits,
        "load": case.load,
        "target": case.target,
        "demand": case.demand,
        "budget": case.budget,
        "budget_kind": case.kind,
        "budget_share": case.budget_share,
        "seeds": list(seeds),
        "capacity_per_s": runs.capacity_per_s,
        "limits": {m.name: _limits(m.target.slo) for m in runs.fleet.models},
        "left_out": runs.left_out,
    }
    if not runs.rates_per_s:
        return {**head, "policies": {}, "series": {}}
    static = [runs.run("static", seed) for seed in seeds]
    oracles = runs.oracles() if case.scenario.oracle else {}
    best = {name: _gain(of, static)["mean"] for name, (_, of) in oracles.items()}
    made = {policy: [runs.run(policy, seed) for seed in seeds] for policy in dict.fromkeys(["static", *policies])}
    series = {policy: _series(of[0].result) for policy, of in made.items()}
    made |= {name: of for name, (_, of) in oracles.items()}
    found = {policy: _policy(runs, of, static, best.get(oracle_of(policy, best))) for policy, of in made.items()}
    for name, (point, _) in oracles.items():
        found[name]["point"] = asdict(point)
    return {**head, "duration_s": runs.duration_s, "policies": found, "series": series}


def oracle_of(policy: str, oracles: Collection[str]) -> str:
    """The oracle that a policy is compared with: that of its own start batch where there is one."""
    own = f"oracle@{policy.partition('@')[2]}"
    return own if own in oracles else "oracle"


def _limits(slo: Slo) -> Json:
    return {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "attainment": slo.attainment}


def _policy(runs: CaseRuns, made: Sequence[Run], static: Sequence[Run], oracle_gain: float | None) -> Json:
    node = _gain(made, static)
    spread = estimates([run.figures for run in made])
    by_model = [model_figures(run.result, WARM_UP_S) for run in made]
    by_priority = [priority_figures(run.result, WARM_UP_S) for run in made]
    attainment, own = (pooled_attainment([run.figures for run in of]) for of in (made, static))
    counts = counts_as_gain(attainment, own, runs.case.scenario.least_attainment)
    if runs.case.target is not None:
        under = spread["under_target_rate"]
        counts = under is None or under.mean <= MOST_UNDER_TARGET
    return {
        "figures": {name: None if e is None else e.mean for name, e in spread.items()},
        "half_width": {name: None if e is None else e.half_width for name, e in spread.items()},
        "gain_over_static": node,
        "gain_over_static_gpu": _gain(made, static, "tokens_per_joule_gpu"),
        "share_of_oracle_gain": node["mean"] / oracle_gain if oracle_gain and oracle_gain >= LEAST_GAIN else None,
        "pooled_attainment": attainment,
        "counts": counts,
        "models": {name: means([found[name] for found in by_model]) for name in by_model[0]},
        "priorities": {str(name): means([found[name] for found in by_priority]) for name in by_priority[0]},
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
    """A scenario's policies, each figure the plain mean over its cases. Counted gains take the gain of a case whose
    attainment is too low as none. The share of the oracle's gain is the mean counted gain over the oracle's mean gain,
    on cases with an oracle. `limits` are those of each model, by set; `left_out` says which models a case does without.
    """
    names = dict.fromkeys(name for case in cases for name in case["policies"])
    policies = {name: _summed([case for case in cases if name in case["policies"]], name) for name in names}
    limits: Json = {}
    for case in cases:
        for model, slo in case["limits"].items():
            limits.setdefault(model, {})[case["limit_set"]] = slo
    left_out = [{key: case[key] for key in ("case", "left_out")} for case in cases if case["left_out"]]
    served = [case for case in cases if case["policies"]]
    return {"scenario": scenario, "policies": policies, "limits": limits, "left_out": left_out, "cases": served}


def shown(found: Json) -> Json:
    """The part of a summary that `pals simulate --json` prints."""
    cases = []
    for case in found["cases"]:
        policies = {}
        for name, entry in case["policies"].items():
            gains = {key: entry[key]["mean"] for key in ("gain_over_static", "gain_over_static_gpu")}
            policies[name] = {
                **{key: value for key, value in entry["figures"].items() if key in FIGURES},
                **gains,
                **{key: entry[key] for key in ("share_of_oracle_gain", "pooled_attainment", "counts")},
            }
        about = {key: value for key, value in case.items() if key not in ("policies", "series")}
        cases.append({**about, "policies": policies})
    return {**found, "cases": cases}


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
    for of, key in (("model", "models"), ("priority", "priorities")):
        for figure in ("attainment", "goodput_tokens_per_s"):
            found[f"{figure}_by_{of}"] = _merged([{n: v[figure] for n, v in e[key].items()} for e in entries])
    return found


def _oracle_share(cases: Sequence[Json], name: str) -> float | None:
    known = [case["policies"] for case in cases if "oracle" in case["policies"]]
    best = math.fsum(found[oracle_of(name, found)]["gain_over_static"]["mean"] for found in known)
    own = math.fsum(found[name]["gain_over_static"]["mean"] for found in known if found[name]["counts"])
    return own / best if best > 0 else None


def _merged(entries: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each key over the mappings that have it."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {key: means([{key: entry[key]} for entry in entries if key in entry])[key] for key in keys}
