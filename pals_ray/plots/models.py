"""Pictures of a fitted replica and of the virtual GPUs' curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.power_model import FloatArray, PowerModel

_CURVES = 9


def plot_surface(model: PowerModel, table: SampleTable, path: Path, title: str) -> None:
    """Throughput, draw, ITL and tokens/J against the batch, a curve per cap, with the measured points on them."""
    cells = table.merged()
    caps = np.unique(cells.cap_w)
    shown = caps[np.unique(np.linspace(0, len(caps) - 1, min(_CURVES, len(caps))).round().astype(int))]
    batches = np.geomspace(cells.batch.min(), cells.batch.max(), 200)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    colors = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(caps)))
    for cap, color in zip(caps, colors, strict=True):
        said = model.predict(cap, batches)
        here = cells.cap_w == cap
        b, rate, power = cells.batch[here], cells.throughput_tokens_per_s[here], cells.power_w[here]
        curves: list[tuple[FloatArray, FloatArray]] = [
            (said.throughput_tokens_per_s, rate),
            (said.power_w, power),
            (
                said.itl_p50_s * 1e3,
                cells.latency["itl_p50_s"][here] * 1e3 if "itl_p50_s" in cells.latency else b * np.nan,
            ),
            (said.throughput_tokens_per_s / said.power_w, rate / power),
        ]
        stds = (said.throughput_rel_std, said.power_rel_std, None, None)
        for axis, (line, points), std in zip(axes.flat, curves, stds, strict=True):
            axis.plot(b, points, "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.5)
            if cap not in shown:
                continue
            axis.plot(batches, line, color=color, label=f"{cap:g} W")
            if std is not None:
                axis.fill_between(batches, line * (1 - 2 * std), line * (1 + 2 * std), color=color, alpha=0.12, lw=0)
    labels = ("tokens/s", "replica draw, W", "ITL p50, ms", "tokens/J (GPU)")
    for axis, label in zip(axes.flat, labels, strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch limit")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(title="power cap per GPU", fontsize=8)
    figure.suptitle(f"{title}\npoints: samples; curves: fit; bands: two standard deviations", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_virtual_curves(groups: dict[str, GroupPhysics], prefill: StepWork, decode: StepWork, path: Path) -> None:
    """Speed relative to uncapped, and draw, against the cap for a prefill and a decode step, one column per GPU."""
    figure, axes = plt.subplots(2, len(groups), figsize=(4.2 * len(groups), 7), constrained_layout=True, squeeze=False)
    for column, (name, physics) in enumerate(groups.items()):
        gpu = physics.gpu
        caps = np.linspace(gpu.min_limit_w, gpu.max_limit_w, 121)
        for work, label, color in ((prefill, "prefill", "tab:red"), (decode, "decode", "tab:blue")):
            steps = [physics.step(work, float(cap)) for cap in caps]
            uncapped_s = physics.locked_step(work, 1.0)[0]
            axes[0, column].plot(caps, [uncapped_s / s.duration_s for s in steps], color=color, label=label)
            axes[1, column].plot(caps, [s.power_w for s in steps], color=color, label=label)
        axes[1, column].plot(caps, caps, color="grey", lw=0.8, ls="--", label="cap")
        axes[0, column].set_title(name)
        axes[0, column].set_ylim(0, 1.05)
        axes[1, column].set_ylim(bottom=0)
        axes[1, column].set_xlabel("power cap, W")
        for axis in axes[:, column]:
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("speed relative to uncapped")
    axes[1, 0].set_ylabel("mean draw, W")
    figure.suptitle(f"Modelled: {next(iter(groups.values())).model.name} on virtual GPUs", fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_following(target_w: FloatArray, drawn_w: FloatArray, sample_s: float, title: str, path: Path) -> None:
    """Draw against target, means of `sample_s` each, over minutes."""
    minutes = (np.arange(len(drawn_w)) + 0.5) * sample_s / 60
    figure, axes = plt.subplots(figsize=(11, 4.5), constrained_layout=True)
    axes.step(minutes, target_w, where="mid", color="0.35", linewidth=1.2, label="target")
    axes.plot(minutes, drawn_w, color="tab:blue", linewidth=1.4, label="drawn (modelled)")
    axes.set(xlabel="minutes", ylabel=f"W, means of {sample_s:g} s", title=title)
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
