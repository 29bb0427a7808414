"""Reads published measurements (`../shared/data`, see its README) into tables to fit and test models on."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, find_gpu, find_model

#: Throughput in Zeus's files is one over the time of an epoch; only ratios within a group mean anything.
_ZEUS_MIN_CELLS = 20


def zeus_groups(folder: Path) -> Iterator[tuple[str, SampleTable]]:
    """Zeus's (GPU, dataset, network) groups with at least 20 cells: a cell is the mean over optimizers."""
    for gpu in ("a40", "v100"):
        cells: dict[tuple[str, str], dict[tuple[float, float], list[tuple[float, float]]]] = defaultdict(dict)
        with (folder / f"summary_power_{gpu}.csv").open() as file:
            for row in csv.DictReader(file):
                cell = (float(row["power_limit"]), float(row["batch_size"]))
                values = (float(row["time_per_epoch"]), float(row["average_power"]))
                cells[row["dataset"], row["network"]].setdefault(cell, []).append(values)
        for (dataset, network), group in sorted(cells.items()):
            if len(group) < _ZEUS_MIN_CELLS:
                continue
            at = np.array(sorted(group))
            mean = np.array([np.mean(group[float(c), float(b)], axis=0) for c, b in at])
            table = SampleTable(at[:, 0], at[:, 1], 1.0 / mean[:, 0], mean[:, 1])
            yield f"{gpu.upper()} {dataset} {network}", table


@dataclass(frozen=True, slots=True)
class Curve:
    """One served configuration of the ML.ENERGY file, swept over batch: arrays by batch."""

    model_id: str
    family: str
    gpu: str
    num_gpus: int
    parallelism: Parallelism
    batch: FloatArray
    throughput_tokens_per_s: FloatArray
    power_w: FloatArray
    itl_p50_s: FloatArray


def load_mlenergy(path: Path) -> list[Curve]:
    """The ML.ENERGY file as curves; several rows of one batch are averaged."""
    rows: dict[tuple[Any, ...], dict[int, list[tuple[float, float, float]]]] = {}
    for c in json.loads(path.read_text())["configurations"]:
        key = (c["model_id"], c["gpu_model"], c["num_gpus"], c["tensor_parallel"], c["expert_parallel"])
        values = (c["output_throughput_tokens_per_sec"], c["avg_power_watts"], c["median_itl_ms"] / 1e3)
        rows.setdefault(key, {}).setdefault(c["max_num_seqs"], []).append(values)
    curves = []
    for (model_id, gpu, num_gpus, tensor, expert), by_batch in sorted(rows.items()):
        batches = sorted(by_batch)
        mean = np.array([np.mean(by_batch[b], axis=0) for b in batches])
        parallelism = Parallelism(tensor, expert)
        curves.append(
            Curve(
                model_id,
                find_model(model_id).family,
                find_gpu(gpu).name,
                num_gpus,
                parallelism,
                np.array(batches, dtype=np.float64),
                mean[:, 0],
                mean[:, 1],
                mean[:, 2],
            )
        )
    return curves


def curve_table(curve: Curve) -> SampleTable:
    """One ML.ENERGY curve as a table at the GPU's default limit."""
    cap_w = np.full(len(curve.batch), find_gpu(curve.gpu).default_limit_w)
    latency = {"itl_p50_s": curve.itl_p50_s}
    return SampleTable(cap_w, curve.batch, curve.throughput_tokens_per_s, curve.power_w, curve.num_gpus, latency)


def load_gridpilot_e1(path: Path) -> dict[str, list[tuple[float, float, float]]]:
    """E1 by kernel: (mean SM clock MHz, mean W, iterations/s) of each (cap, locked clock), but for 405 MHz.

    At 405 MHz the memory clock falls too, which no cap in the range brings about.
    """
    out: dict[str, list[tuple[float, float, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            if float(row["sm_target_mhz"]) > 405.0:
                point = (float(row["sm_mean_mhz"]), float(row["power_mean_w"]), float(row["iters_per_s"]))
                out.setdefault(row["workload"], []).append(point)
    return out


def gridpilot_caps(path: Path) -> Iterator[tuple[str, SampleTable]]:
    """GridPilot E1's kernels at 1380 MHz: iterations/s and W against the cap, at one (arbitrary) batch."""
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            if float(row["sm_target_mhz"]) == 1380.0:
                point = (float(row["pcap_w"]), float(row["iters_per_s"]), float(row["power_mean_w"]))
                rows[row["workload"]].append(point)
    for kernel, points in sorted(rows.items()):
        at = np.array(sorted(points))
        yield kernel, SampleTable(at[:, 0], np.ones(len(at)), at[:, 1], at[:, 2])


@dataclass(frozen=True, slots=True)
class StepResponse:
    """Draw after a change of cap: s since the order, W, and the levels before and after."""

    since_s: FloatArray
    power_w: FloatArray
    before_w: float
    after_w: float

    def reached_s(self, share: float) -> float:
        """When this share of the change was first done, s."""
        done = (self.power_w - self.before_w) / (self.after_w - self.before_w)
        return float(self.since_s[np.flatnonzero(done >= share)[0]])


def gridpilot_steps(path: Path) -> dict[str, StepResponse]:
    """GridPilot E2's two changes of cap: down (280 to 200 W) and up (200 to 280 W).

    The file has no order times. Its script changes the cap every 10 s: up at 20.0 s; down at the last sample before
    the clock falls, 9.97 s.
    """
    with path.open() as file:
        rows = [(float(r["t_s"]), float(r["power_w"])) for r in csv.DictReader(file)]
    time_s, power_w = np.array(rows).T

    def response(order_s: float, before: tuple[float, float], after: tuple[float, float]) -> StepResponse:
        here = (time_s >= order_s) & (time_s < order_s + 1.0)
        levels = [float(np.mean(power_w[(time_s >= a) & (time_s < b)])) for a, b in (before, after)]
        return StepResponse(time_s[here] - order_s, power_w[here], levels[0], levels[1])

    return {
        "down": response(9.968, (9.0, 9.9), (10.2, 10.7)),
        "up": response(20.0, (19.0, 20.0), (20.6, 21.2)),
    }
