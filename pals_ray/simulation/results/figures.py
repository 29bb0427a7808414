"""What a run is judged by: energy, latency, violations, budget kept, signal followed; and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.regulation import FloatArray, sample_means, score
from pals_ray.control.slo import QosConfig
from pals_ray.simulation.results.run_result import ModelResult, RunResult, quantile_s

T = TypeVar("T")

CONFIDENCE = 0.95
#: Figures of a run that followed a signal; of other runs they are None.
REGULATION_FIGURES = ("tracking_error", "aqa_error", "pjm_score", "precision")


#: What a run, or one model of it, is judged by, by name. None: there is nothing to say it of.
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and half its 95 % confidence interval (Student's t; None for a single seed)."""

    mean: float
    half_width: float | None


def figures(result: RunResult, since_s: float = 0.0, followed: FollowedSignal | None = None) -> Figures:
    """The figures of a run from `since_s` on (what came before is warming up), at node level unless the name says GPU.

    Rates are fractions of judged intervals. Latencies are over all requests (TTFT) and all tokens (ITL) of all models;
    a request without a first token by the end counts with the time that it has waited. Goodput counts the output tokens
    of requests whose TTFT and mean ITL are within their model's limits. Decisions and cap changes are per replica.
    `settle_s` and `settle_over_w` are the longest and the highest over all budget cuts, None where a signal is
    `followed`: its budget falls again before a fall has settled. ITL percentiles, preemptions, decisions, stranded
    watts and what concerns the budget are of the whole run.
    """
    # Share of time that its cap held the clock of each replica down.
    binding = [replica.binding.mean() for replica in result.replicas if len(result.time_s)]
    minutes, length_s = result.duration_s / 60.0, result.duration_s - since_s
    models, replicas = list(result.models.values()), result.replicas
    good = sum(good_tokens(model, result.duration_s, since_s) for model in models)
    tokens = sum(_after(result, since_s, replica.tokens_per_s) for replica in replicas)
    energy_j, node_energy_j = (_after(result, since_s, watts) for watts in (result.power_w, result.node_power_w))
    cuts = result.cuts if followed is None else ()
    settled = [cut.settled_s if cut.settled_s is not None else result.duration_s - cut.at_s for cut in cuts]
    return {
        "tokens_per_joule": tokens / node_energy_j,
        "tokens_per_joule_gpu": tokens / energy_j,
        "tokens_per_s": tokens / length_s,
        "power_w": node_energy_j / length_s,
        "power_gpu_w": energy_j / length_s,
        "goodput_tokens_per_s": good / length_s,
        "goodput_tokens_per_joule": good / node_energy_j,
        **_service(models, result, since_s),
        "over_budget_s": result.over_budget_s,
        "over_budget_max_w": result.over_budget_max_w,
        "charge_over_s": result.charge_over_s,
        "settle_s": max(settled, default=None),
        "settle_over_w": max((cut.most_over_w for cut in cuts), default=None),
        "stranded_w": result.stranded_w,
        "binding_share": float(np.mean(binding)) if binding else 0.0,
        "decisions_per_min": sum(r.decisions for r in replicas) / max(len(replicas), 1) / minutes,
        "cap_changes_per_min": sum(r.cap_changes for r in replicas) / max(len(replicas), 1) / minutes,
        "preemptions": sum(r.preemptions for r in replicas),
        **(dict.fromkeys(REGULATION_FIGURES) if followed is None else regulation_figures(result, followed)),
    }


def regulation_figures(result: RunResult, followed: FollowedSignal) -> Figures:
    """How well a run's draw followed a signal over its length (`REGULATION_FIGURES`)."""
    signal, following = followed.signal(), followed.following
    start_s, end_s = float(signal.time_s[0]), min(signal.end_s, result.duration_s)
    # A series' watts are means over the interval before their time: they hold from the time before.
    since_s = np.concatenate(([0.0], result.time_s[:-1]))
    power_w = sample_means(since_s, np.asarray(result.node_power_w, dtype=np.float64), start_s, end_s)
    y = sample_means(signal.time_s, signal.value, start_s, end_s)
    found = score(y, power_w, following.base_w, following.range_w)
    values = (found.tracking_error, found.aqa_error, found.pjm, found.precision)
    return dict(zip(REGULATION_FIGURES, values, strict=True))


def model_figures(result: RunResult, since_s: float = 0.0) -> dict[str, Figures]:
    """Each model's own figures, by name; `since_s` as in `figures`."""
    out = {}
    for name, model in result.models.items():
        tokens = sum(_after(result, since_s, r.tokens_per_s) for r in result.replicas if r.model == name)
        out[name] = {
            "priority": model.target.priority,
            "tokens_per_s": tokens / (result.duration_s - since_s),
            **_service([model], result, since_s),
        }
    return out


def violations_by_priority(result: RunResult, since_s: float = 0.0) -> dict[int, float | None]:
    """The violation rate of each priority class, first class first."""
    classes: dict[int, list[ModelResult]] = {}
    for model in result.models.values():
        classes.setdefault(model.target.priority, []).append(model)
    return {priority: violation_rate(classes[priority], since_s) for priority in sorted(classes)}


def violation_rate(models: Sequence[ModelResult], since_s: float = 0.0) -> float | None:
    """Violations over judged intervals of all these models that began at `since_s` or later; None without any."""
    judged = [i.verdict.violation for m in models for i in m.intervals if i.end_s - QosConfig().interval_s >= since_s]
    return sum(judged) / len(judged) if judged else None


def good_tokens(model: ModelResult, end_s: float, since_s: float = 0.0) -> int:
    """Output tokens of the requests that came since `since_s` and whose TTFT and mean ITL are within the model's limits
    (of unfinished ones those made so far)."""
    asked = model.requests
    until_s = np.where(np.isfinite(asked.finish_s), asked.finish_s, end_s)
    itl_s = np.where(asked.tokens > 1, (until_s - asked.first_token_s) / np.maximum(asked.tokens - 1, 1), 0.0)
    good = np.isfinite(asked.first_token_s) & (asked.arrival_s >= since_s)
    for found_s, limit_s in ((asked.ttft_s, model.target.ttft_p99_s), (itl_s, model.target.itl_p99_s)):
        if limit_s is not None:
            good &= found_s <= limit_s
    return int(asked.tokens[good].sum())


def gain(value: float, reference: float) -> float:
    """How much more than a reference, as a fraction of it."""
    return value / reference - 1.0


def counts_as_gain(violations: float | None, static_violations: float | None, limit: float) -> bool:
    """Whether a gain counts: at a violation rate of at most `limit`, or `static`'s own where that is larger."""
    return (violations or 0.0) <= max(limit, static_violations or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, with its confidence interval."""
    n = len(values)
    mean = fmean(values)
    if n < 2:
        return Estimate(mean, None)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Estimate(mean, float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n))


def estimates(runs: Sequence[Figures]) -> dict[str, Estimate | None]:
    """Each figure over runs of several seeds; None where any run has nothing to say of it."""
    return _of_each(estimate, runs)


def means(values: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The plain mean of each entry over several mappings of the same keys; None where any is None."""
    return _of_each(fmean, values)


def _of_each(found: Callable[[list[float]], T], values: Sequence[Mapping[str, Any]]) -> dict[str, T | None]:
    columns = {key: [one[key] for one in values] for key in (values[0] if values else ())}
    return {key: None if any(v is None for v in column) else found(column) for key, column in columns.items()}


def _service(models: Sequence[ModelResult], result: RunResult, since_s: float) -> Figures:
    """Violations and latencies of these models together."""
    ttft_s = np.concatenate([_ttft_s(model, result.duration_s, since_s) for model in models])
    itl_counts = np.sum([model.itl_counts for model in models], axis=0)
    return {
        "violation_rate": violation_rate(models, since_s),
        "ttft_p50_s": _quantile(ttft_s, 0.5),
        "ttft_p99_s": _quantile(ttft_s, 0.99),
        "itl_p50_s": quantile_s(itl_counts, 0.5),
        "itl_p99_s": quantile_s(itl_counts, 0.99),
    }


def _ttft_s(model: ModelResult, end_s: float, since_s: float) -> FloatArray:
    asked = model.requests
    ttft_s = np.where(np.isfinite(asked.first_token_s), asked.ttft_s, end_s - asked.arrival_s)
    return np.asarray(ttft_s[asked.arrival_s >= since_s])


def _after(result: RunResult, since_s: float, rate: NDArray[np.floating[Any]]) -> float:
    """A rate's integral from `since_s` on: a series' values are means over the interval before their time."""
    counted = result.time_s > since_s + 1e-9
    lengths_s = np.diff(result.time_s, prepend=0.0)[counted]
    return float(np.asarray(rate, dtype=np.float64)[counted] @ lengths_s)


def _quantile(values: FloatArray, q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None
