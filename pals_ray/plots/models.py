"""Pictures of a fitted replica, of the virtual GPUs' curves, and of a fleet that follows a signal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pals_ray.models.fitting.sample_checks import SampleTable
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.power_model import FloatArray, PowerModel
from pals_ray.plots.picture import picture, shades

_CURVES = 9


def plot_surface(model: PowerModel, table: SampleTable, path: Path, title: str) -> None:
    """Throughput, draw, ITL and tokens/J against the batch, a curve per cap, with the measured points on them."""
    cells = table.merged()
    caps = np.unique(cells.cap_w)
    shown = caps[np.unique(np.linspace(0, len(caps) - 1, min(_CURVES, len(caps))).round().astype(int))]
    batches = np.geomspace(cells.batch.min(), cells.batch.max(), 200)
    itl_s = cells.latency.get("itl_p50_s", np.full(len(cells), np.nan))
    title = f"{title}\npoints: samples; curves: fit; bands: two standard deviations"
    with picture(path, title, (11, 8), 2, 2) as axes:
        for cap, color in zip(caps, shades(len(caps)), strict=True):
            said, here = model.predict(cap, batches), cells.cap_w == cap
            rate, power_w = cells.throughput_tokens_per_s[here], cells.power_w[here]
            panels: dict[str, tuple[FloatArray, FloatArray, FloatArray | None]] = {
                "tokens/s": (said.throughput_tokens_per_s, rate, said.throughput_rel_std),
                "replica draw, W": (said.power_w, power_w, said.power_rel_std),
                "ITL p50, ms": (said.itl_p50_s * 1e3, itl_s[here] * 1e3, None),
                "tokens/J (GPU)": (said.throughput_tokens_per_s / said.power_w, rate / power_w, None),
            }
            for axis, (line, points, std) in zip(axes.flat, panels.values(), strict=True):
                style = {"color": color, "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.5}
                axis.plot(cells.batch[here], points, "o", **style)
                if cap in shown:
                    axis.plot(batches, line, color=color, label=f"{cap:g} W")
                    if std is not None:
                        band = line * (1 - 2 * std), line * (1 + 2 * std)
                        axis.fill_between(batches, *band, color=color, alpha=0.12, lw=0)
        for axis, label in zip(axes.flat, panels, strict=True):
            axis.set_xscale("log", base=2)
            axis.set(xlabel="batch limit", ylabel=label, ylim=(0, None))
            axis.grid(alpha=0.25)
        axes[0, 0].legend(title="power cap per GPU", fontsize=8)


def plot_virtual_curves(groups: dict[str, GroupPhysics], prefill: StepWork, decode: StepWork, path: Path) -> None:
    """Speed relative to uncapped, and draw, against the cap for a prefill and a decode step, one column per GPU."""
    title = f"Modelled: {next(iter(groups.values())).model.name} on virtual GPUs"
    with picture(path, title, (4.2 * len(groups), 7), 2, len(groups), dpi=100) as axes:
        for (speed, draw), (name, physics) in zip(axes.T, groups.items(), strict=True):
            caps = np.linspace(physics.gpu.min_limit_w, physics.gpu.max_limit_w, 121)
            for work, label, color in ((prefill, "prefill", "tab:red"), (decode, "decode", "tab:blue")):
                steps = [physics.step(work, float(cap)) for cap in caps]
                uncapped_s = physics.locked_step(work, 1.0)[0]
                speed.plot(caps, [uncapped_s / step.duration_s for step in steps], color=color, label=label)
                draw.plot(caps, [step.power_w for step in steps], color=color, label=label)
            draw.plot(caps, caps, color="grey", lw=0.8, ls="--", label="cap")
            speed.set(title=name, ylim=(0, 1.05))
            draw.set(xlabel="power cap, W", ylim=(0, None))
            for axis in (speed, draw):
                axis.grid(alpha=0.25)
                axis.legend(fontsize=8)
        axes[0, 0].set_ylabel("speed relative to uncapped")
        axes[1, 0].set_ylabel("mean draw, W")


def plot_following(target_w: FloatArray, drawn_w: FloatArray, sample_s: float, title: str, path: Path) -> None:
    """Draw against target, means of `sample_s` each, over minutes."""
    minutes = (np.arange(len(drawn_w)) + 0.5) * sample_s / 60
    with picture(path, "", (11, 4.5), dpi=120) as axes:
        axis = axes[0, 0]
        axis.step(minutes, target_w, where="mid", color="0.35", linewidth=1.2, label="target")
        axis.plot(minutes, drawn_w, color="tab:blue", linewidth=1.4, label="drawn (modelled)")
        axis.set(xlabel="minutes", ylabel=f"W, means of {sample_s:g} s", title=title)
        axis.legend(loc="upper right", frameon=False)
