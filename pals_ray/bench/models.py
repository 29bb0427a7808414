"""`make bench-models`: every accuracy figure of the models, on measurements of others, into `docs/models.md`."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.optimize import OptimizeWarning, curve_fit

from pals_ray.bench.calibrate import (
    COMPUTE_BOUND,
    H100_CAPS_W,
    H100_CLOCKS_MHZ,
    H100_THROUGHPUT,
    fit_serving,
    h100_capped,
    log_errors,
)
from pals_ray.bench.measured_data import (
    Curve,
    StepResponse,
    curve_table,
    gridpilot_caps,
    gridpilot_steps,
    load_mlenergy,
    zeus_groups,
)
from pals_ray.models.fitting.accuracy import evaluate_chosen, leave_batches_out
from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.physics.cap_settling import settled_cap_w
from pals_ray.models.physics.constants import CONSTANTS, provenance_of
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, find_gpu, find_model

ZEUS_POINTS = 12
LOOKUPS = 10_000
_BEGIN, _END = "<!-- bench-models: begin -->", "<!-- bench-models: end -->"
_SEED = 0
#: A decode step for the virtual GPUs' curves: 64 sequences of 600 tokens.
DECODE = StepWork(decode_seqs=64, kv_tokens=64 * 600)


@dataclass(frozen=True, slots=True)
class ZeusRow:
    """Mean absolute relative errors of one Zeus group: (throughput, power) of ours and of random forests."""

    name: str
    cells: int
    ours: tuple[float, float]
    forest: tuple[float, float]
    forest_most: tuple[float, float]


@dataclass(frozen=True, slots=True)
class BatchErrors:
    """Absolute relative errors per left-out point by GPU type: columns throughput, power, median ITL."""

    ours: dict[str, FloatArray]
    logistic: dict[str, FloatArray]
    forest: dict[str, FloatArray]


def _forest(train: SampleTable, test: SampleTable) -> tuple[float, float]:
    """A random forest over (cap, batch), as PALS fits one; scikit-learn is a development dependency."""
    from sklearn.ensemble import RandomForestRegressor

    out = []
    for name in ("throughput_tokens_per_s", "power_w"):
        forest = RandomForestRegressor(n_estimators=200, random_state=_SEED)
        forest.fit(np.stack([train.cap_w, train.batch], axis=1), getattr(train, name))
        said = forest.predict(np.stack([test.cap_w, test.batch], axis=1))
        out.append(float(np.mean(np.abs(said / getattr(test, name) - 1.0))))
    return out[0], out[1]


def zeus_errors(groups: Iterable[tuple[str, SampleTable]], with_baselines: bool = True) -> list[ZeusRow]:
    """Cap x batch: fit 12 points chosen by the rule, test on all other cells of the group."""
    rows = []
    generator = np.random.default_rng(_SEED)
    for name, table in groups:
        evaluation, _, chosen = evaluate_chosen(table, ZEUS_POINTS)
        ours = (float(evaluation.errors["throughput"].mean()), float(evaluation.errors["power"].mean()))
        forest = forest_most = (np.nan, np.nan)
        if with_baselines:
            taken = {(c, b) for c, b in zip(chosen.cap_w, chosen.batch, strict=True)}
            rest = [i for i in range(len(table)) if (table.cap_w[i], table.batch[i]) not in taken]
            forest = _forest(chosen, table.take(rest))
            order = generator.permutation(len(table))
            most = round(0.8 * len(table))
            forest_most = _forest(table.take(order[:most]), table.take(order[most:]))
        rows.append(ZeusRow(name, len(table), ours, forest, forest_most))
    return rows


def _logistic_error(log2: FloatArray, values: FloatArray, left_out: int) -> float:
    """A four-parameter logistic in log2(batch), fitted without one point, judged there."""

    def curve(x: FloatArray, low: float, high: float, middle: float, width: float) -> FloatArray:
        exponent = np.clip(-(x - middle) / width, -50.0, 50.0)
        return np.asarray(low + (high - low) / (1.0 + np.exp(exponent)))

    keep = np.arange(len(log2)) != left_out
    start = (values[keep].min(), values[keep].max(), float(np.median(log2)), 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)
        try:
            found, _ = curve_fit(curve, log2[keep], values[keep], p0=start, maxfev=20000)
        except RuntimeError:
            found = np.array(start)
    return float(abs(curve(log2[[left_out]], *found)[0] / values[left_out] - 1.0))


def batch_errors(curves: Sequence[Curve], with_baselines: bool = True) -> BatchErrors:
    """Batch alone: leave each inner batch of every curve with at least 7 out in turn."""
    ours: dict[str, list[FloatArray]] = {}
    logistic: dict[str, list[list[float]]] = {}
    forest: dict[str, list[list[float]]] = {}
    for curve in curves:
        if len(curve.batch) < 7:
            continue
        table = curve_table(curve)
        found = leave_batches_out(table, find_model(curve.model_id))
        ours.setdefault(curve.gpu, []).append(
            np.stack([found.errors[q] for q in ("throughput", "power", "itl_p50")], axis=1)
        )
        if not with_baselines:
            continue
        log2 = np.log2(curve.batch)
        quantities = (curve.throughput_tokens_per_s, curve.power_w, curve.itl_p50_s)
        for i in range(1, len(log2) - 1):
            logistic.setdefault(curve.gpu, []).append([_logistic_error(log2, q, i) for q in quantities])
            keep = np.arange(len(log2)) != i
            both = _forest(table.take(np.flatnonzero(keep)), table.take([i]))
            forest.setdefault(curve.gpu, []).append(list(both))
    return BatchErrors(
        {gpu: np.concatenate(parts) for gpu, parts in ours.items()},
        {gpu: np.array(parts) for gpu, parts in logistic.items()},
        {gpu: np.array(parts) for gpu, parts in forest.items()},
    )


def prior_errors(curves: Sequence[Curve], families: Iterable[str] | None = None) -> dict[str, FloatArray]:
    """Absolute relative errors of the roofline prior on families (all, unless named) left out of its fit.

    By family: rows throughput, power, median ITL; a column per point.
    """
    out = {}
    for family in sorted({c.family for c in curves}) if families is None else families:
        constants = fit_serving([c for c in curves if c.family != family])
        parts = [log_errors(constants[c.gpu], [c]) for c in curves if c.family == family]
        out[family] = np.abs(np.exp(np.concatenate(parts, axis=1)) - 1.0)
    return out


def cap_law_errors(path: Path) -> dict[str, tuple[FloatArray, FloatArray]]:
    """GridPilot E1: given the 300 and 200 W cells, errors at 250 and 150 W of (throughput, power) by kernel."""
    out = {}
    for kernel, table in gridpilot_caps(path):
        given, asked = (table.take(np.flatnonzero(np.isin(table.cap_w, caps))) for caps in ([200, 300], [150, 250]))
        rate, power, _ = Posterior(given).mean_logs(asked.cap_w, asked.batch)
        out[kernel] = (
            np.abs(np.exp(rate) / asked.throughput_tokens_per_s - 1.0),
            np.abs(np.exp(power) / asked.power_w - 1.0),
        )
    return out


def virtual_step_response(before_w: float, after_w: float) -> StepResponse:
    """The effective cap of a virtual GPU after a change, every ms."""
    since_s = np.asarray(np.arange(0.0, 1.0, 1e-3), dtype=np.float64)
    caps = np.array([settled_cap_w(before_w, after_w, float(t)) for t in since_s])
    return StepResponse(since_s, caps, before_w, after_w)


STEP_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95)


def step_lags_s(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """(share, s measured, s modelled) of the virtual V100's step response against GridPilot's E2."""
    caps = {"down": (280.0, 200.0), "up": (200.0, 280.0)}
    return {
        way: [(s, seen.reached_s(s), virtual_step_response(*caps[way]).reached_s(s)) for s in STEP_SHARES]
        for way, seen in gridpilot_steps(path).items()
    }


# -- the report


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * v:.2f} %" if abs(v) < 0.1 else f"{100 * v:.1f} %" for v in values]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _zeus_section(rows: Sequence[ZeusRow]) -> list[str]:
    columns: tuple[Callable[[ZeusRow], tuple[float, float]], ...] = (
        lambda r: r.ours,
        lambda r: r.forest,
        lambda r: r.forest_most,
    )
    body = [[r.name, str(r.cells), *(x for column in columns for x in _percent(column(r)))] for r in rows]
    means = [np.mean([column(r) for r in rows], axis=0) for column in columns]
    body.append(["**mean**", "", *(f"**{x}**" for mean in means for x in _percent(mean))])
    return [
        "### Cap x batch on A40 and V100 (Zeus, NSDI'23)",
        "",
        f"{ZEUS_POINTS} points chosen by the rule; error over all other cells. Forest: on the same points, and on a",
        "random 80 % of the grid, as PALS did.",
        "",
        *_table(
            ["group", "cells", "throughput", "power", "forest T", "forest P", "forest 80 % T", "forest 80 % P"], body
        ),
    ]


def _batch_section(errors: BatchErrors) -> list[str]:
    body = []
    for name, found in (("ours", errors.ours), ("logistic", errors.logistic), ("random forest", errors.forest)):
        for gpu in sorted(found):
            mean = _percent(found[gpu].mean(axis=0))
            body.append([name, f"{gpu}, mean", str(len(found[gpu])), *mean, *["-"] * (3 - len(mean))])
        both = np.concatenate(list(found.values()))
        for word, statistic in (("mean", np.mean), ("median", np.median)):
            values = _percent(statistic(both, axis=0))
            body.append([name, f"all, {word}", str(len(both)), *values, *["-"] * (3 - len(values))])
    return [
        "### Batch on H100 and B200 (ML.ENERGY Benchmark v3)",
        "",
        "Every curve with at least 7 batch limits, each inner one left out in turn; the forest predicts no ITL here.",
        "",
        *_table(["model", "over", "points", "throughput", "power", "median ITL"], body),
    ]


def _prior_section(errors: dict[str, FloatArray]) -> list[str]:
    def row(name: str, e: FloatArray) -> list[str]:
        return [name, str(e.shape[1]), *_percent(np.median(e, axis=1)), *_percent(np.percentile(e, 90, axis=1))]

    body = [row(family, e) for family, e in errors.items()]
    body.append(row("**all**", np.concatenate(list(errors.values()), axis=1)))
    head = ["left-out family", "points", "T median", "P median", "ITL median", "T 90th", "P 90th", "ITL 90th"]
    return ["### The prior on families it has never seen (ML.ENERGY)", "", *_table(head, body)]


def _cap_section(data: Path) -> list[str]:
    laws = cap_law_errors(data / "gridpilot" / "E1_summary_table.csv")
    body = [[kernel, *_percent([t[1], t[0], p[1], p[0]])] for kernel, (t, p) in laws.items()]
    means = _percent([float(np.mean([law[i] for law in laws.values()])) for i in (0, 1)])
    lags = step_lags_s(data / "gridpilot" / "E2_telemetry.csv")
    steps = [
        [way, f"{share:.0%}", f"{1e3 * seen:.0f}", f"{1e3 * said:.0f}"]
        for way, points in lags.items()
        for share, seen, said in points
    ]
    clocks, rates = h100_capped(CONSTANTS["H100-SXM"])
    capped = [
        [f"{cap:.0f}", f"{seen:.0f}", f"{said:.0f}", f"{said / seen - 1:+.1%}", f"{rate:.3f}", f"{own:.3f}"]
        for cap, seen, said, rate, own in zip(H100_CAPS_W, H100_CLOCKS_MHZ, clocks, H100_THROUGHPUT, rates, strict=True)
    ]
    return [
        "### The cap law (GridPilot E1 and E2, V100-SXM2)",
        "",
        "Given a kernel's 300 W and 200 W cells, error at the other two caps "
        f"(mean {means[0]} throughput, {means[1]} power):",
        "",
        *_table(["kernel", "T 250 W", "T 150 W", "P 250 W", "P 150 W"], body),
        "Virtual V100 after a change of cap between 280 W and 200 W: ms until a share of the change is done.",
        "",
        *_table(["way", "share", "E2", "virtual"], steps),
        "### The virtual H100 under a cap, compute-bound (FACTS)",
        "",
        *_table(["cap, W", "clock, MHz", "virtual", "off by", "throughput", "virtual"], capped),
    ]


def lookup_ms(table: SampleTable) -> float:
    """Median time, ms, in which a fit of a table answers `LOOKUPS` points in one call."""
    surface, random = fit_surface(table), np.random.default_rng(_SEED)
    cap_w = random.uniform(table.cap_w.min() / 2, table.cap_w.max(), LOOKUPS)
    batch = random.uniform(1, table.batch.max(), LOOKUPS)
    took_ms = []
    for _ in range(30):
        begin_s = time.perf_counter()
        surface.predict(cap_w, batch)
        took_ms.append(1e3 * (time.perf_counter() - begin_s))
    return float(np.median(took_ms))


def report(data: Path) -> str:
    """The generated part of `docs/models.md`."""
    curves = load_mlenergy(data / "mlenergy" / "lm-arena-chat.json")
    longest = curve_table(max(curves, key=lambda c: len(c.batch)))
    constants = _table(["GPU", "constants"], [[name, provenance_of(name)] for name in CONSTANTS])
    lines = [
        *_zeus_section(zeus_errors(zeus_groups(data / "zeus_nsdi23"))),
        *_batch_section(batch_errors(curves)),
        *_prior_section(prior_errors(curves)),
        *_cap_section(data),
        "### Speed",
        "",
        f"{LOOKUPS:,} random points in one call: {lookup_ms(longest):.1f} ms (median of 30 calls).",
        "",
        "### Where the constants come from",
        "",
        *constants,
    ]
    return "\n".join(lines)


def models(
    data: Annotated[Path, typer.Option(help="Folder of the measured data.")] = Path("../shared/data"),
    docs: Annotated[Path, typer.Option(help="Folder of the docs to update.")] = Path("docs"),
) -> None:
    """Measure the models on other people's data; write the tables into docs/models.md and the picture beside it."""
    if not data.is_dir():
        sys.stderr.write(f"pals bench models: no folder {data}: it holds the measured data (README, ../shared/data)\n")
        raise typer.Exit(1)
    text = report(data)
    page = docs / "models.md"
    before, _, rest = page.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n\n{text}\n{_END}{after}")

    from pals_ray.plots.models import plot_virtual_curves

    model = find_model("Llama-3.1-8B")
    groups = {name: GroupPhysics(find_gpu(name), model, Parallelism()) for name in ("V100-SXM2", "H100-SXM")}
    plot_virtual_curves(groups, COMPUTE_BOUND, DECODE, docs / "virtual_gpus.png")
    typer.echo(text)
