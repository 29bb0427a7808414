"""What a run is judged by: energy, latency, violations, budget kept, signal followed; and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from pals_ray.control.budget.regulation import FloatArray, Signal, sample_means, score
from pals_ray.control.budget.signal_following import Following
from pals_ray.control.slo import QosConfig
from pals_ray.simulation.results.run_result import ModelResult, RunResult, quantile_s

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers; at node level unless the name says GPU. None: nothing to say it of.

    Rates are fractions of judged intervals. Latencies are over all requests (TTFT) and all tokens (ITL) of all models;
    a request without a first token by the end counts with the time that it has waited.
    Goodput counts the output tokens of requests whose TTFT and mean ITL are within their model's limits. Decisions and
    cap changes are per replica. `settle_s` and `settle_over_w` are the longest and the highest over all budget cuts.
    """

    tokens_per_joule: float
    tokens_per_joule_gpu: float
    tokens_per_s: float
    power_w: float
    power_gpu_w: float
    goodput_tokens_per_s: float
    goodput_tokens_per_joule: float
    violation_rate: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    over_budget_s: float
    over_budget_max_w: float
    charge_over_s: float
    settle_s: float | None
    settle_over_w: float | None
    stranded_w: float
    binding_share: float
    decisions_per_min: float
    cap_changes_per_min: float
    preemptions: float
    tracking_error: float | None = None
    aqa_error: float | None = None
    pjm_score: float | None = None
    precision: float | None = None


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model of a run in numbers."""

    priority: int
    tokens_per_s: float
    violation_rate: float | None
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and half its 95 % confidence interval (Student's t; None for a single seed)."""

    mean: float
    half_width: float | None
    n: int


def figures(result: RunResult, since_s: float = 0.0) -> Figures:
    """The figures of a run that followed no signal, from `since_s` on: what came before is warming up.

    ITL percentiles, preemptions, decisions, stranded watts and what concerns the budget are of the whole run.
    """
    minutes, length_s = result.duration_s / 60.0, result.duration_s - since_s
    models = list(result.models.values())
    ttft_s = np.concatenate([_ttft_s(model, result.duration_s, since_s) for model in models])
    itl_counts = sum((model.itl_counts for model in models[1:]), models[0].itl_counts)
    good = sum(good_tokens(model, result.duration_s, since_s) for model in models)
    tokens = sum(_after(result, since_s, replica.tokens_per_s) for replica in result.replicas)
    energy_j, node_energy_j = (_after(result, since_s, watts) for watts in (result.power_w, result.node_power_w))
    replicas = max(len(result.replicas), 1)
    settled = [cut.settled_s if cut.settled_s is not None else result.duration_s - cut.at_s for cut in result.cuts]
    return Figures(
        tokens_per_joule=tokens / node_energy_j,
        tokens_per_joule_gpu=tokens / energy_j,
        tokens_per_s=tokens / length_s,
        power_w=node_energy_j / length_s,
        power_gpu_w=energy_j / length_s,
        goodput_tokens_per_s=good / length_s,
        goodput_tokens_per_joule=good / node_energy_j,
        violation_rate=violation_rate(models, since_s),
        ttft_p50_s=_quantile(ttft_s, 0.5),
        ttft_p99_s=_quantile(ttft_s, 0.99),
        itl_p50_s=quantile_s(itl_counts, 0.5),
        itl_p99_s=quantile_s(itl_counts, 0.99),
        over_budget_s=result.over_budget_s,
        over_budget_max_w=result.over_budget_max_w,
        charge_over_s=result.charge_over_s,
        settle_s=max(settled, default=None),
        settle_over_w=max((cut.most_over_w for cut in result.cuts), default=None),
        stranded_w=result.stranded_w,
        binding_share=_binding_share(result),
        decisions_per_min=sum(r.decisions for r in result.replicas) / replicas / minutes,
        cap_changes_per_min=sum(r.cap_changes for r in result.replicas) / replicas / minutes,
        preemptions=sum(r.preemptions for r in result.replicas),
    )


def regulation_figures(result: RunResult, following: Following, signal: Signal) -> tuple[float, float, float, float]:
    """(relative tracking error, AQA error, PJM score, precision) of a run's draw against a signal, over its length."""
    start_s, end_s = float(signal.time_s[0]), min(signal.end_s, result.duration_s)
    # A series' watts are means over the interval before their time: they hold from the time before.
    since_s = np.concatenate(([0.0], result.time_s[:-1]))
    power_w = sample_means(since_s, np.asarray(result.node_power_w, dtype=np.float64), start_s, end_s)
    y = sample_means(signal.time_s, signal.value, start_s, end_s)
    found = score(y, power_w, following.base_w, following.range_w)
    return found.tracking_error, found.aqa_error, found.pjm, found.precision


def model_figures(result: RunResult, since_s: float = 0.0) -> dict[str, ModelFigures]:
    """Each model's own figures, by name; `since_s` as in `figures`."""
    out = {}
    for name, model in result.models.items():
        ttft_s = _ttft_s(model, result.duration_s, since_s)
        tokens = sum(_after(result, since_s, r.tokens_per_s) for r in result.replicas if r.model == name)
        out[name] = ModelFigures(
            priority=model.target.priority,
            tokens_per_s=tokens / (result.duration_s - since_s),
            violation_rate=violation_rate([model], since_s),
            ttft_p50_s=_quantile(ttft_s, 0.5),
            ttft_p99_s=_quantile(ttft_s, 0.99),
            itl_p50_s=quantile_s(model.itl_counts, 0.5),
            itl_p99_s=quantile_s(model.itl_counts, 0.99),
        )
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
    started = np.isfinite(asked.first_token_s)
    ttft_s = np.where(started, asked.ttft_s, np.inf)
    until_s = np.where(np.isfinite(asked.finish_s), asked.finish_s, end_s)
    with np.errstate(invalid="ignore", divide="ignore"):
        gaps = np.maximum(asked.tokens - 1, 0)
        itl_s = np.where(gaps > 0, (until_s - asked.first_token_s) / gaps, 0.0)
    good = started & (asked.arrival_s >= since_s)
    if model.target.ttft_p99_s is not None:
        good = good & (ttft_s <= model.target.ttft_p99_s)
    if model.target.itl_p99_s is not None:
        good = good & (itl_s <= model.target.itl_p99_s)
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
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Estimate(mean, float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n), n)


def estimates(runs: Sequence[Figures]) -> dict[str, Estimate | None]:
    """Each figure over runs of several seeds; None where any run has nothing to say of it."""
    out: dict[str, Estimate | None] = {}
    for field in fields(Figures):
        values = [getattr(run, field.name) for run in runs]
        out[field.name] = None if any(v is None for v in values) else estimate(values)
    return out


def means(values: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The plain mean of each entry over several mappings of the same keys; None where any is None."""
    out: dict[str, float | None] = {}
    for key in values[0] if values else ():
        column = [v[key] for v in values]
        known = [v for v in column if v is not None]
        out[key] = math.fsum(known) / len(known) if len(known) == len(column) else None
    return out


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


def _binding_share(result: RunResult) -> float:
    """Share of time that caps held clocks down, the mean over replicas."""
    if not result.replicas or not len(result.time_s):
        return 0.0
    return float(np.mean([r.binding.mean() for r in result.replicas]))
