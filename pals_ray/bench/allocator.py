"""`pals bench allocator`: how long decisions take: dividing a budget, and how far from the optimum it stays; a beat."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from pals_ray.control.agent import commands
from pals_ray.control.agent.agent_core import BEAT_S, AgentCore
from pals_ray.control.allocation.budget_division import divide
from pals_ray.control.allocation.budget_tree import BudgetTree, FloatArray, IntArray
from pals_ray.control.allocation.menu_table import MenuTable
from pals_ray.control.charge import group_terms
from pals_ray.control.messages import Answer, Reply
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.snapshot import Overhead
from pals_ray.control.telemetry import Reading
from pals_ray.models.lookup import tabulated
from pals_ray.models.physics.roofline import RooflineModel
from pals_ray.models.physics.step_cost import GroupPhysics
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.plots.tables import Report, table
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Grant, Slo, Target, Verdicts
from policies import exact

POINTS = 200
CALLS = 30
SIZES = (100, 300, 1_000, 3_000, 10_000)
SMALL_INSTANCES, SMALL_REPLICAS = 200, 12
BEATS = 2000

#: Four rows with two racks each; rack budgets alternate between tight and loose.
ROWS_AND_RACKS = np.array([-1, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
BUDGET_SHARES = np.array([0.5, 0.55, 0.55, 0.55, 0.55, 0.35, 0.8, 0.35, 0.8, 0.35, 0.8, 0.35, 0.8])
THREE_RACKS = np.array([-1, 0, 0, 0])

Curve = Callable[[FloatArray, np.random.Generator], FloatArray]


def noisy_concave(share: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Served share of the target at a share of the watts: diminishing returns, measured with 2 % noise."""
    return np.asarray(np.minimum(_saturating(share, rng) * (1 + rng.normal(0, 0.02, share.shape)), 1.0))


def cliff(share: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Next to nothing below a threshold of its own, nearly everything above it."""
    at = rng.uniform(0.15, 0.85, (len(share), 1))
    return np.where(share < at, 0.15 * share / at, 0.9 + 0.1 * (share - at) / (1 - at))


def clipped(share: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Diminishing returns up to a target, nothing beyond it."""
    return np.asarray(np.minimum(_saturating(share, rng) / rng.uniform(0.4, 1.1, (len(share), 1)), 1.0))


def _saturating(share: FloatArray, rng: np.random.Generator) -> FloatArray:
    least, bend = rng.uniform(0, 0.5, (len(share), 1)), rng.uniform(1, 6, (len(share), 1))
    return np.asarray(least + (1 - least) * np.expm1(-bend * share) / np.expm1(-bend))


KINDS: dict[str, Curve] = {"noisy concave": noisy_concave, "cliff": cliff, "clipped at a target": clipped}


def make_menus(curve: Curve, n: int, rng: np.random.Generator) -> MenuTable:
    """Menus of `POINTS` points at uneven watts, for replicas on one to eight GPUs of ranges of 200 to 800 W."""
    gpu_range_w = rng.choice([200.0, 300.0, 500.0, 800.0], (n, 1)) * rng.uniform(0.8, 1.0, (n, 1))
    range_w = np.round(rng.choice([1, 2, 4, 8], (n, 1)) * gpu_range_w)
    extra_w = np.sort(np.round(rng.uniform(0, 1, (n, POINTS)) * range_w), axis=1)
    extra_w[:, 0], extra_w[:, -1:] = 0.0, range_w
    weight = rng.uniform(0.5, 2.0, (n, 1))
    return MenuTable(extra_w, weight * curve(extra_w / range_w, rng) - 1e-6 * extra_w)


def make_tree(menus: MenuTable, parent: IntArray, shares: FloatArray, rng: np.random.Generator) -> BudgetTree:
    """Replicas spread over the leaf domains at random; each budget a share of the range below it."""
    leaves = np.setdiff1d(np.arange(len(parent)), parent)
    names = tuple(f"domain {v}" for v in range(len(parent)))
    tree = BudgetTree(names, parent, np.zeros(len(parent)), rng.choice(leaves, len(menus)))
    return replace(tree, budget_w=np.floor(shares * tree.subtotals_w(menus.extra_w[:, -1])))


@dataclass(frozen=True, slots=True)
class Timing:
    """One kind at one size, (calls,) each: milliseconds and relative distances from the dual bound or the optimum.

    `cpu_ms` is what the call used of a core: where `ms` is well above it, the machine was busy with something else.
    """

    replicas: int
    kind: str
    ms: FloatArray
    cpu_ms: FloatArray
    gap: FloatArray


def _time(kind: str, instances: Iterable[tuple[MenuTable, BudgetTree]], exactly: bool = False) -> Timing:
    """Divide each instance; its gap is to the dual bound, or `exactly` to the optimum."""
    rows = []
    for menus, tree in instances:
        everyone = np.zeros(len(menus), dtype=np.int64)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        division = divide(menus, tree, everyone, everyone).classes[0]
        took_s, took_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        reference = exact.solve(menus, tree).value if exactly else division.bound
        rows.append((1000 * took_s, 1000 * took_cpu_s, 1 - division.value / reference))
    return Timing(len(menus), kind, *np.array(rows).T)


def time_division(kind: str, n: int, calls: int = CALLS) -> Timing:
    """Divide `calls` new fleets of n replicas in 12 nested domains."""
    rng = np.random.default_rng(n)
    fleets = (make_menus(KINDS[kind], n, rng) for _ in range(calls))
    return _time(kind, ((m, make_tree(m, ROWS_AND_RACKS, BUDGET_SHARES, rng)) for m in fleets))


def compare_with_exact(instances: int = SMALL_INSTANCES) -> Timing:
    """Divide small fleets in three racks, each budget drawn from 10 to 90 % of its range; gaps are to the optimum."""
    rng = np.random.default_rng(SMALL_REPLICAS)
    curves = itertools.islice(itertools.cycle(KINDS.values()), instances)
    fleets = (make_menus(curve, SMALL_REPLICAS, rng) for curve in curves)
    drawn = ((m, make_tree(m, THREE_RACKS, rng.uniform(0.1, 0.9, len(THREE_RACKS)), rng)) for m in fleets)
    return _time("all three", drawn, exactly=True)


def time_beats(beats: int = BEATS) -> FloatArray:
    """Milliseconds of a core that each beat of an agent takes, from its reading to its orders (beats,).

    The replica is on one H100, its engine started at 256 sequences, with an SLO of 2 s and 100 ms; requests/s swing.
    """
    spec, uuids = find_gpu("H100-SXM"), ("gpu",)
    terms = group_terms(Overhead(), 1, ((spec.min_limit_w, spec.max_limit_w),), (0.0,))
    grant = Grant("replica", 1, 1, spec.max_limit_w, float(beats), "")
    answer = Answer(Reply(1, 1, grant, uuids, terms, None, ""), None, Target(Slo(ttft_s=2.0, tpot_s=0.1)))
    controller = ReplicaController(1)
    physics = GroupPhysics(spec, find_model("Llama-3.1-8B"), Parallelism(1))
    controller.take_model(tabulated(RooflineModel(physics), spec.min_limit_w, spec.max_limit_w, 256, 1), "roofline")
    core = AgentCore("replica", "node", 1, controller)

    def obey(asked: Iterable[commands.Command], now_s: float) -> None:
        for command in asked:
            match command:
                case commands.ReadLimits(read):
                    obey(core.limits_read(dict.fromkeys(read, spec.max_limit_w), now_s), now_s)
                case commands.SetGroupCap(_, cap_w):
                    obey(core.limits_set(dict.fromkeys(uuids, cap_w), now_s), now_s)
                case commands.SayHello():
                    obey(core.answered(answer, now_s), now_s)

    obey((*core.claimed(uuids, 256, 0.0), *core.greet(0.0)), 0.0)
    rng, arrived, took_ms = np.random.default_rng(1), 0, []
    for beat in range(1, beats + 1):
        now_s, arrived = beat * BEAT_S, arrived + int(rng.poisson(2.0 + np.sin(beat / 100)))
        ended, running = arrived * 9 // 10, int(rng.integers(10, 40))
        counts = tuple(ended if at in (90, 100) else 0 for at in range(len(LATENCY_EDGES_S) + 1))
        engine = EngineTelemetry(
            now_s, running, 0, 0.1, 1000 * ended, 200 * ended, ended, 0, 256, 256, arrived, Verdicts(good=ended),
            counts, counts, counts,
        )  # fmt: skip
        reading = Reading(now_s, engine, 300.0 * now_s, 300.0, 0.5)
        started_s = time.process_time()
        obey(core.beat_due(reading, now_s), now_s)
        took_ms.append(1000.0 * (time.process_time() - started_s))
    return np.array(took_ms)


def run() -> Report:
    """Time the division over 100 to 10,000 replicas, and measure its distance from the optimum; time a beat."""
    timings = [time_division(kind, n) for n in SIZES for kind in KINDS]
    small = compare_with_exact()
    large = table(
        ("replicas", "menus", "ms median", "ms worst", "CPU ms median", "dual gap median", "dual gap worst"),
        ((f"{t.replicas:,}", t.kind, *_times(t), f"{np.median(t.gap):.4%}", f"{t.gap.max():.4%}") for t in timings),
        left=("menus",),
        title=f"Dividing a budget: menus of {POINTS} points, 12 nested domains, {CALLS} calls each",
    )
    exactly = table(
        ("ms median", "ms worst", "CPU ms median", "gap mean", "gap worst"),
        [(*_times(small), f"{small.gap.mean():.4%}", f"{small.gap.max():.4%}")],
        title=f"Against the optimum: {len(small.ms)} instances of {small.replicas} replicas",
    )
    beat_ms = time_beats()
    beat = {f"beat_p{q}_ms": float(np.percentile(beat_ms, q)) for q in (50, 99)}
    shown = (
        f"an agent's beat: p50 {beat['beat_p50_ms']:.2f} ms, p99 {beat['beat_p99_ms']:.2f} ms of a core ({BEATS} beats)"
    )
    return Report(figures(timings, small) | beat, large, exactly, shown)


def figures(timings: list[Timing], small: Timing) -> dict[str, float]:
    """The figures of the JSON object: the worst kind at 1,000 and 10,000; gaps as fractions."""

    def worst(n: int, name: str, statistic: Callable[[FloatArray], float] = np.median) -> float:
        return max(float(statistic(getattr(t, name))) for t in timings if t.replicas == n)

    return {
        **{f"{name}_{n}": worst(n, name) for name in ("ms", "cpu_ms") for n in (1_000, 10_000)},
        "dual_gap_1000": worst(1_000, "gap"),
        "dual_gap_1000_max": worst(1_000, "gap", np.max),
        "gap_mean": float(small.gap.mean()),
        "gap_max": float(small.gap.max()),
        "ms_12_max": float(small.ms.max()),
    }


def _times(t: Timing) -> tuple[str, str, str]:
    return f"{np.median(t.ms):.1f}", f"{t.ms.max():.1f}", f"{np.median(t.cpu_ms):.1f}"
