"""What a run is judged by: energy, attainment, latency, budget kept, signal followed; and means over seeds."""

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
from pals_ray.control.slo import INTERVAL_S, SERVED, BoolArray
from pals_ray.simulation.results.run_result import ModelResult, RunResult, quantile_s

T = TypeVar("T")

CONFIDENCE = 0.95
#: QoS violations as PALS counts them: the time in which a model's tokens/s, as means over so long, s, are under target.
PALS_UNDER_TARGET = {"under_target_half_s": 0.5, "under_target_5_s": 5.0, "under_target_60_s": 60.0}
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

    Attainment is the share of good requests of those that came until the end, whenever they were judged. Latencies are
    over these requests (TTFT) and all tokens (ITL) of all models; a request without a first token counts with the time
    that it has waited. Goodput counts the output tokens of good ones. `under_target_rate` is of the intervals in which
    work waited at every look, `PALS_UNDER_TARGET` are as PALS counts. Decisions and cap changes are per replica.
    `settle_s` and `settle_over_w` are the longest and the highest over all budget cuts, None where a signal is
    `followed`: its budget falls again before a fall has settled. ITL percentiles, preemptions, decisions, stranded
    watts and what concerns the budget are of the whole run.
    """
    # Share of time that its cap held the clock of each replica down.
    binding = [replica.binding.mean() for replica in result.replicas if len(result.time_s)]
    minutes, length_s = result.duration_s / 60.0, result.duration_s - since_s
    models, replicas = list(result.models.values()), result.replicas
    good = sum(_good_tokens(result, model, since_s) for model in models)
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
        length_s = result.duration_s - since_s
        out[name] = {
            "priority": model.target.priority,
            "tokens_per_s": _tokens(result, model, since_s) / length_s,
            "goodput_tokens_per_s": _good_tokens(result, model, since_s) / length_s,
            **_service([model], result, since_s),
        }
    return out


def priority_figures(result: RunResult, since_s: float = 0.0) -> dict[int, Figures]:
    """Attainment and goodput of each priority class, first class first; `since_s` as in `figures`."""
    classes: dict[int, list[ModelResult]] = {}
    for model in result.models.values():
        classes.setdefault(model.target.priority, []).append(model)
    length_s, found = result.duration_s - since_s, {}
    for number in sorted(classes):
        good, late = _verdicts(classes[number], result, since_s)
        tokens = sum(_good_tokens(result, model, since_s) for model in classes[number])
        found[number] = {"attainment": share_of(good, late), "goodput_tokens_per_s": tokens / length_s}
    return found


def judged(result: RunResult, model: ModelResult, since_s: float = 0.0) -> tuple[BoolArray, BoolArray]:
    """(n,) each: which of a model's requests that came since `since_s` and until the end are good, and which late."""
    good, late = model.requests.verdicts(model.target.slo, result.followed_s)
    came = _came(result, model, since_s)
    return good & came, late & came


def share_of(good: int, late: int) -> float | None:
    """The attainment of so many requests; None where there are none."""
    return good / (good + late) if good + late else None


def _good_tokens(result: RunResult, model: ModelResult, since_s: float) -> float:
    """Output tokens of the good requests that came since `since_s` and until the end; of a model without limits all
    tokens made in that time."""
    if not model.target.slo.judges:
        return _tokens(result, model, since_s)
    return float(model.requests.output_tokens[judged(result, model, since_s)[0]].sum())


def _tokens(result: RunResult, model: ModelResult, since_s: float) -> float:
    return sum(_after(result, since_s, r.tokens_per_s) for r in result.replicas if r.model == model.name)


def _verdicts(models: Sequence[ModelResult], result: RunResult, since_s: float) -> tuple[int, int]:
    """How many of their requests are good, and late."""
    pairs = [judged(result, model, since_s) for model in models]
    good, late = (sum(int(side.sum()) for side in sides) for sides in zip(*pairs, strict=True))
    return good, late


def _came(result: RunResult, model: ModelResult, since_s: float) -> BoolArray:
    arrival_s = model.requests.arrival_s
    return np.asarray((arrival_s >= since_s) & (arrival_s < result.duration_s))


def gain(value: float, reference: float) -> float:
    """How much more than a reference, as a fraction of it."""
    return value / reference - 1.0


def counts_as_gain(attainment: float | None, static_attainment: float | None, least: float) -> bool:
    """Whether a gain counts: at an attainment of at least `least`, or `static`'s own where that is less."""
    return attainment is None or attainment >= min(least, 1.0 if static_attainment is None else static_attainment)


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
    """Attainment and latencies of these models together."""
    ttft_s = np.concatenate([_ttft_s(result, model, since_s) for model in models])
    itl_counts = np.sum([model.itl_counts for model in models], axis=0)
    good, late = _verdicts(models, result, since_s)
    attainment = share_of(good, late)
    return {
        "good_requests": good,
        "late_requests": late,
        "attainment": attainment,
        "late_rate": None if attainment is None else 1.0 - attainment,
        "under_target_rate": _under_target(models, result, since_s, INTERVAL_S, SERVED, waiting=True),
        **{key: _under_target(models, result, since_s, s) for key, s in PALS_UNDER_TARGET.items()},
        "ttft_p50_s": _quantile(ttft_s, 0.5),
        "ttft_p99_s": _quantile(ttft_s, 0.99),
        "itl_p50_s": quantile_s(itl_counts, 0.5),
        "itl_p99_s": quantile_s(itl_counts, 0.99),
    }


def _under_target(
    models: Sequence[ModelResult],
    result: RunResult,
    since_s: float,
    interval_s: float,
    served: float = 1.0,
    *,
    waiting: bool = False,
) -> float | None:
    """The share of intervals in which a model made less than this part of its tokens/s target, of all intervals of the
    models with one; with `waiting` of only those in which its requests waited at every sample."""
    under: list[BoolArray] = []
    for model in models:
        target = model.target.throughput_tokens_per_s
        own = [replica for replica in result.replicas if replica.model == model.name]
        if target is None or not len(result.time_s):
            continue
        samples = round(interval_s / float(result.time_s[0]))
        counted = result.time_s > since_s + 1e-9
        rate, waits = (
            _intervals(np.sum([getattr(replica, name) for replica in own], axis=0)[counted], samples)
            for name in ("tokens_per_s", "waiting")
        )
        under.append((rate.mean(axis=1) < served * target) & (not waiting or (waits > 0).all(axis=1)))
    return float(np.concatenate(under).mean()) if under and sum(map(len, under)) else None


def _intervals(series: FloatArray, samples: int) -> FloatArray:
    """(intervals, samples): a series cut into whole intervals."""
    whole = len(series) // samples * samples
    return np.asarray(series[:whole], dtype=np.float64).reshape(-1, samples)


def _ttft_s(result: RunResult, model: ModelResult, since_s: float) -> FloatArray:
    asked = model.requests
    ttft_s = np.where(np.isfinite(asked.first_token_s), asked.ttft_s, result.followed_s - asked.arrival_s)
    return np.asarray(ttft_s[_came(result, model, since_s)])


def _after(result: RunResult, since_s: float, rate: NDArray[np.floating[Any]]) -> float:
    """A rate's integral from `since_s` on: a series' values are means over the interval before their time."""
    counted = result.time_s > since_s + 1e-9
    lengths_s = np.diff(result.time_s, prepend=0.0)[counted]
    return float(np.asarray(rate, dtype=np.float64)[counted] @ lengths_s)


def _quantile(values: FloatArray, q: float) -> float | None:
    return float(np.quantile(values, q)) if len(values) else None
