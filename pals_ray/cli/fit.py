"""`pals fit` and `pals overhead`: fit a replica's surfaces, or a node's overhead, to a file of measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pals_ray.cli.options import AsJson
from pals_ray.config.budget_files import load_node_samples
from pals_ray.control.budget.overhead_fit import fit_overhead
from pals_ray.errors import PalsError
from pals_ray.models.fitting.accuracy import Evaluation, evaluate_chosen, leave_batches_out
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import SampleError
from pals_ray.models.specs import UnknownSpecError, find_model
from pals_ray.plots.tables import Report
from pals_ray.profiling.sample_files import error_report, profile_of, read_samples


def fit(
    samples: Annotated[
        Path, typer.Argument(help="CSV: power_cap_w, batch_limit, throughput_tokens_per_s, power_w, ...")
    ],
    train_points: Annotated[
        int | None, typer.Option(help="Fit only the N points the profiler would choose; test the rest.")
    ] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Leave each inner batch limit out in turn and test on it.")
    ] = False,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(help="Write the profile here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of the surfaces here.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model; a known MoE adds its experts' law.")] = "",
    gpu: Annotated[str, typer.Option(help="Name of the GPU, for the profile.")] = "",
) -> None:
    """Fit a model to measured (cap, batch) points and report its error on points it was not shown."""
    notes = []
    try:
        if train_points is not None and leave_one_out:
            raise SampleError("--train-points and --leave-one-out are two different tests: give one of them")
        table = read_samples(samples)
        try:
            spec = find_model(model) if model else None
        except UnknownSpecError:
            spec = None
            notes.append(f"{model} is none of the models that are known, so nothing of its experts goes into the fit")
        if out is not None and not gpu:
            notes.append("the profile names no GPU, and a fleet takes only one of its own: say --gpu")
        fitted = table.merged()
        if train_points is not None:
            evaluation, surface, fitted = evaluate_chosen(table, train_points, spec)
        else:
            surface = fit_surface(table, spec)
            evaluation = leave_batches_out(table, spec) if leave_one_out else Evaluation(len(fitted), 0, {})
        if out is not None:
            profile = profile_of(fitted, surface, model or samples.stem, gpu or "unknown")
            try:
                out.write_text(profile.to_json())
            except OSError as error:
                raise SampleError(f"cannot write {out}: {error.strerror}") from error
        if plot is not None:
            # matplotlib takes half a second to import: only who asks for a picture waits for it.
            from pals_ray.plots.models import plot_surface

            try:
                plot_surface(surface, fitted, plot, model or samples.stem)
            except (OSError, ValueError) as error:
                raise SampleError(f"cannot write the picture {plot}: {error}") from error
    except PalsError as error:
        typer.echo(f"pals fit: {error}", err=True)
        raise typer.Exit(1) from error
    error_report(evaluation, surface, fitted).print(as_json)
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def overhead(
    file: Annotated[Path, typer.Argument(help="CSV: node_w and gpu_w (all GPUs together), at idle and under load.")],
    as_json: AsJson = False,
) -> None:
    """Fit a node's overhead a + b x GPU watts to measurements, for the fleet file."""
    fit = fit_overhead(load_node_samples(file))
    a_w, b = round(fit.overhead.a_w, 2), round(fit.overhead.b, 5)
    figures = {"a_w": a_w, "b": b, "residual_w": fit.residual_w, "left_out_rows": fit.left_out}
    shown = [
        f"overhead: {{a_w: {a_w:g}, b: {b:g}}}",
        f"# leaves {fit.residual_w:.1f} W (standard deviation) unexplained",
    ]
    if fit.left_out:
        shown.append(f"# too far off to count: lines {', '.join(map(str, fit.left_out))}")
    Report(figures, *shown).print(as_json)
