"""Reads published measurements (`../shared/data`, see its README) into tables to fit and test models on."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.power_model import FloatArray
from pals_ray.models.specs import Parallelism, UnknownSpecError, find_gpu, find_model

#: Throughput in Zeus's files is one over the time of an epoch; only ratios within a group mean anything.
_ZEUS_MIN_CELLS = 20


def _read(path: Path, group_by: Sequence[str], columns: Sequence[str]) -> dict[tuple[str, ...], FloatArray]:
    """Numbers from a CSV file, a row each, by the text in the columns `group_by`."""
    groups: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            groups[tuple(row[name] for name in group_by)].append([float(row[name]) for name in columns])
    return {key: np.array(rows) for key, rows in groups.items()}


def _cell_means(rows: FloatArray, keys: int) -> FloatArray:
    """One row per distinct value of the first `keys` columns, in their order; the other columns are averaged."""
    cells, which = np.unique(rows[:, :keys], axis=0, return_inverse=True)
    which = which.reshape(-1)
    return np.array([[*cell, *rows[which == i, keys:].mean(axis=0)] for i, cell in enumerate(cells)])


def zeus_groups(folder: Path) -> Iterator[tuple[str, SampleTable]]:
    """Zeus's (GPU, dataset, network) groups with at least 20 cells: a cell is the mean over optimizers."""
    columns = ("power_limit", "batch_size", "time_per_epoch", "average_power")
    for gpu in ("a40", "v100"):
        groups = _read(folder / f"summary_power_{gpu}.csv", ("dataset", "network"), columns)
        for (dataset, network), rows in sorted(groups.items()):
            cap_w, batch, epoch_s, power_w = _cell_means(rows, 2).T
            if len(cap_w) >= _ZEUS_MIN_CELLS:
                yield f"{gpu.upper()} {dataset} {network}", SampleTable(cap_w, batch, 1.0 / epoch_s, power_w)


@dataclass(frozen=True, slots=True)
class Curve:
    """One served configuration of the ML.ENERGY file, swept over batch at the GPU's default limit."""

    model_id: str
    family: str
    gpu: str
    parallelism: Parallelism
    table: SampleTable


def load_mlenergy(path: Path) -> list[Curve]:
    """The ML.ENERGY file as curves; several rows of one batch are averaged."""
    groups: dict[tuple[Any, ...], list[tuple[float, ...]]] = defaultdict(list)
    for c in json.loads(path.read_text())["configurations"]:
        key = (c["model_id"], c["gpu_model"], c["num_gpus"], c["tensor_parallel"], c["expert_parallel"])
        values = (c["output_throughput_tokens_per_sec"], c["avg_power_watts"], c["median_itl_ms"] / 1e3)
        groups[key].append((c["max_num_seqs"], *values))
    curves = []
    for (model_id, gpu_model, num_gpus, tensor, expert), rows in sorted(groups.items()):
        batch, throughput, power_w, itl_s = _cell_means(np.array(rows), 1).T
        gpu = find_gpu(gpu_model)
        cap_w = np.full(len(batch), gpu.default_limit_w)
        table = SampleTable(cap_w, batch, throughput, power_w, num_gpus, {"itl_p50_s": itl_s})
        curves.append(Curve(model_id, find_model(model_id).family, gpu.name, Parallelism(tensor, expert), table))
    return curves


def load_mlenergy_v2(path: Path) -> dict[tuple[str, int], FloatArray]:
    """The ML.ENERGY Leaderboard v2's A100 file: by (model, tensor parallelism) of the models whose shape is known.

    Rows are (mean batch, tokens/s, mean W of all GPUs, mean output tokens) at the default power limit.
    """
    columns = ("mean_batch", "tokens_per_s", "mean_power_w", "mean_output_tokens")
    out = {}
    for (model, tensor, stages), rows in _read(path, ("model", "tp", "pp"), columns).items():
        try:
            name = find_model(model).name
        except UnknownSpecError:
            continue
        if stages == "1":
            out[name, int(tensor)] = rows
    return out


def load_mmbt(path: Path) -> dict[tuple[str, float], FloatArray]:
    """MMBT's sweep of capped vLLM on an RTX PRO 6000: by (model, concurrent requests), falling caps.

    Rows are (cap W, tokens/s, mean W, mean SM clock MHz).
    """
    columns = ("power_cap_w", "tokens_per_s", "mean_power_w", "sm_clock_mhz")
    groups = _read(path, ("model", "concurrency"), columns)
    return {(find_model(model).name, float(seqs)): rows for (model, seqs), rows in groups.items()}


def load_gridpilot_e1(path: Path) -> dict[str, FloatArray]:
    """E1 by kernel: (mean SM clock MHz, mean W, iterations/s) of each (cap, locked clock), but for 405 MHz.

    At 405 MHz the memory clock falls too, which no cap in the range brings about.
    """
    groups = _read(path, ("workload",), ("sm_target_mhz", "sm_mean_mhz", "power_mean_w", "iters_per_s"))
    return {kernel: rows[rows[:, 0] > 405.0, 1:] for (kernel,), rows in groups.items()}


def gridpilot_caps(path: Path) -> Iterator[tuple[str, SampleTable]]:
    """GridPilot E1's kernels at 1380 MHz: iterations/s and W against the cap, at one (arbitrary) batch."""
    groups = _read(path, ("workload",), ("sm_target_mhz", "pcap_w", "iters_per_s", "power_mean_w"))
    for (kernel,), rows in sorted(groups.items()):
        cap_w, rate, power_w = np.array(sorted(rows[rows[:, 0] == 1380.0, 1:].tolist())).T
        yield kernel, SampleTable(cap_w, np.ones(len(cap_w)), rate, power_w)


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
    time_s, power_w = _read(path, (), ("t_s", "power_w"))[()].T

    def response(order_s: float, before: tuple[float, float], after: tuple[float, float]) -> StepResponse:
        here = (time_s >= order_s) & (time_s < order_s + 1.0)
        levels = [float(np.mean(power_w[(time_s >= a) & (time_s < b)])) for a, b in (before, after)]
        return StepResponse(time_s[here] - order_s, power_w[here], levels[0], levels[1])

    return {
        "down": response(9.968, (9.0, 9.9), (10.2, 10.7)),
        "up": response(20.0, (19.0, 20.0), (20.6, 21.2)),
    }
