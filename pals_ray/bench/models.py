"""`make bench-models`: every accuracy figure of the models, on measurements of others, into `docs/models.md`."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
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
from pals_ray.bench.caps.report import a100_section, rtx_section
from pals_ray.bench.measured_data import (
    Curve,
    StepResponse,
    gridpilot_caps,
    gridpilot_steps,
    load_mlenergy,
    load_mmbt,
    zeus_groups,
)
from pals_ray.errors import PalsError
from pals_ray.models.fitting.accuracy import evaluate_chosen, leave_batches_out
from pals_ray.models.fitting.fit import Posterior
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.physics.cap_settling import settled_cap_w
from pals_ray.models.physics.constants import CONSTANTS, provenance_of
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.plots.tables import markdown_table, replace_between

ZEUS_POINTS = 12
LOOKUPS = 10_000
_BEGIN, _END = "<!-- bench-models: begin -->", "<!-- bench-models: end -->"
_SEED = 0
#: A decode step for the virtual GPUs' curves: 64 sequences of 600 tokens.
DECODE = StepWork(decode_seqs=64, kv_tokens=64 * 600)


@dataclass(frozen=True, slots=True)
class ZeusRow:
    """Mean absolute relative errors of one Zeus group: columns throughput and power.

    Rows are ours, a random forest on the same points, and one on most of the grid; ours alone without baselines.
    """

    name: str
    cells: int
    errors: FloatArray


def _forest(train: SampleTable, test: SampleTable) -> list[float]:
    """A random forest over (cap, batch), as PALS fits one; scikit-learn is a development dependency."""
    from sklearn.ensemble import RandomForestRegressor

    out = []
    for name in ("throughput_tokens_per_s", "power_w"):
        forest = RandomForestRegressor(n_estimators=200, random_state=_SEED)
        forest.fit(np.stack([train.cap_w, train.batch], axis=1), getattr(train, name))
        said = forest.predict(np.stack([test.cap_w, test.batch], axis=1))
        out.append(float(np.mean(np.abs(said / getattr(test, name) - 1.0))))
    return out


def zeus_errors(groups: Iterable[tuple[str, SampleTable]], with_baselines: bool = True) -> list[ZeusRow]:
    """Cap x batch: fit 12 points chosen by the rule, test on all other cells of the group."""
    rows = []
    generator = np.random.default_rng(_SEED)
    for name, table in groups:
        evaluation, _, chosen = evaluate_chosen(table, ZEUS_POINTS)
        errors = [[evaluation.errors[quantity].mean() for quantity in ("throughput", "power")]]
        if with_baselines:
            taken = {(c, b) for c, b in zip(chosen.cap_w, chosen.batch, strict=True)}
            rest = [i for i in range(len(table)) if (table.cap_w[i], table.batch[i]) not in taken]
            order = generator.permutation(len(table))
            most = round(0.8 * len(table))
            errors.append(_forest(chosen, table.take(rest)))
            errors.append(_forest(table.take(order[:most]), table.take(order[most:])))
        rows.append(ZeusRow(name, len(table), np.array(errors)))
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


def batch_errors(curves: Sequence[Curve], with_baselines: bool = True) -> dict[str, dict[str, FloatArray]]:
    """Batch alone: leave each inner batch of every curve with at least 7 out in turn.

    Absolute relative errors by model and GPU type, a row per left-out point: throughput, power, median ITL.
    """
    out: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for curve in curves:
        table = curve.table
        if len(table) < 7:
            continue
        errors = leave_batches_out(table, find_model(curve.model_id)).errors
        ours = np.stack([errors[quantity] for quantity in ("throughput", "power", "itl_p50")], axis=1)
        out["ours"][curve.gpu] += ours.tolist()
        if not with_baselines:
            continue
        log2 = np.log2(table.batch)
        quantities = (table.throughput_tokens_per_s, table.power_w, table.latency["itl_p50_s"])
        for i in range(1, len(log2) - 1):
            out["logistic"][curve.gpu].append([_logistic_error(log2, q, i) for q in quantities])
            rest = np.flatnonzero(np.arange(len(log2)) != i)
            out["random forest"][curve.gpu].append(_forest(table.take(rest), table.take([i])))
    return {name: {gpu: np.array(rows) for gpu, rows in by_gpu.items()} for name, by_gpu in out.items()}


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


def cap_law_errors(path: Path) -> dict[str, FloatArray]:
    """GridPilot E1: given the 300 and 200 W cells, errors at 250 and 150 W by kernel: rows throughput, power."""
    out = {}
    for kernel, table in gridpilot_caps(path):
        given, asked = (table.take(np.flatnonzero(np.isin(table.cap_w, caps))) for caps in ([200, 300], [150, 250]))
        said = np.exp(Posterior(given).mean_logs(asked.cap_w, asked.batch)[:2])
        out[kernel] = np.abs(said / np.stack([asked.throughput_tokens_per_s, asked.power_w]) - 1.0)
    return out


STEP_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95)


def step_lags_s(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """(share, s measured, s modelled) of the virtual V100's step response against GridPilot's E2."""
    out = {}
    since_s = np.asarray(np.arange(0.0, 1.0, 1e-3), dtype=np.float64)
    for way, seen in gridpilot_steps(path).items():
        before_w, after_w = (280.0, 200.0) if way == "down" else (200.0, 280.0)
        caps_w = np.array([settled_cap_w(before_w, after_w, float(t)) for t in since_s])
        virtual = StepResponse(since_s, caps_w, before_w, after_w)
        out[way] = [(share, seen.reached_s(share), virtual.reached_s(share)) for share in STEP_SHARES]
    return out


# -- the report


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * v:.2f} %" if abs(v) < 0.1 else f"{100 * v:.1f} %" for v in values]


def _zeus_section(rows: Sequence[ZeusRow]) -> list[str]:
    body = [[r.name, str(r.cells), *_percent(r.errors.flat)] for r in rows]
    means = np.mean([r.errors for r in rows], axis=0)
    body.append(["**mean**", "", *(f"**{x}**" for x in _percent(means.flat))])
    return [
        "### Cap x batch on A40 and V100 (Zeus, NSDI'23)",
        "",
        f"{ZEUS_POINTS} points chosen by the rule; error over all other cells. Forest: on the same points, and on a",
        "random 80 % of the grid, as PALS did.",
        "",
        *markdown_table(
            ["group", "cells", "throughput", "power", "forest T", "forest P", "forest 80 % T", "forest 80 % P"], body
        ),
    ]


def _batch_section(errors: dict[str, dict[str, FloatArray]]) -> list[str]:
    body = []
    for name, by_gpu in errors.items():
        both = np.concatenate(list(by_gpu.values()))
        rows = [(f"{gpu}, mean", by_gpu[gpu], by_gpu[gpu].mean(axis=0)) for gpu in sorted(by_gpu)]
        rows += [("all, mean", both, both.mean(axis=0)), ("all, median", both, np.median(both, axis=0))]
        for over, points, errors_there in rows:
            values = _percent(errors_there)
            body.append([name, over, str(len(points)), *values, *["-"] * (3 - len(values))])
    return [
        "### Batch on H100 and B200 (ML.ENERGY Benchmark v3)",
        "",
        "Every curve with at least 7 batch limits, each inner one left out in turn; the forest predicts no ITL here.",
        "",
        *markdown_table(["model", "over", "points", "throughput", "power", "median ITL"], body),
    ]


def _prior_section(errors: dict[str, FloatArray]) -> list[str]:
    def row(name: str, e: FloatArray) -> list[str]:
        return [name, str(e.shape[1]), *_percent(np.median(e, axis=1)), *_percent(np.percentile(e, 90, axis=1))]

    body = [row(family, e) for family, e in errors.items()]
    body.append(row("**all**", np.concatenate(list(errors.values()), axis=1)))
    head = ["left-out family", "points", "T median", "P median", "ITL median", "T 90th", "P 90th", "ITL 90th"]
    return ["### The prior on families it has never seen (ML.ENERGY)", "", *markdown_table(head, body)]


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
        *markdown_table(["kernel", "T 250 W", "T 150 W", "P 250 W", "P 150 W"], body),
        "Virtual V100 after a change of cap between 280 W and 200 W: ms until a share of the change is done.",
        "",
        *markdown_table(["way", "share", "E2", "virtual"], steps),
        "### The virtual H100 under a cap, compute-bound (FACTS)",
        "",
        *markdown_table(["cap, W", "clock, MHz", "virtual", "off by", "throughput", "virtual"], capped),
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
    longest = max((c.table for c in curves), key=len)
    constants = markdown_table(["GPU", "constants"], [[name, provenance_of(name)] for name in CONSTANTS])
    lines = [
        *_zeus_section(zeus_errors(zeus_groups(data / "zeus_nsdi23"))),
        *_batch_section(batch_errors(curves)),
        *_prior_section(prior_errors(curves)),
        *_cap_section(data),
        *a100_section(),
        *rtx_section(load_mmbt(data / "mmbt_rtx_pro_6000" / "sweep.csv")),
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
        raise PalsError(f"no folder {data}: it holds the measured data (README, ../shared/data)")
    text = report(data)
    replace_between(docs / "models.md", _BEGIN, _END, text)

    from pals_ray.plots.models import plot_virtual_curves

    model = find_model("Llama-3.1-8B")
    groups = {name: GroupPhysics(find_gpu(name), model, Parallelism()) for name in ("V100-SXM2", "H100-SXM")}
    plot_virtual_curves(groups, COMPUTE_BOUND, DECODE, docs / "virtual_gpus.png")
    typer.echo(text)
