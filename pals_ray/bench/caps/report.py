"""The part of `docs/models.md` on serving under caps: the virtual A100 and RTX PRO 6000 beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pals_ray.bench.caps.serving import A100_CAPS_W, A100_CELLS, a100_cells, fit_rtx_pro_6000, rtx_cells
from pals_ray.models.physics.constants import CONSTANTS, SiliconConstants
from pals_ray.models.power_model import FloatArray
from pals_ray.plots.tables import markdown_table

#: The caps that a fit is given when the others are predicted.
GIVEN_CAPS_W = (600.0, 400.0, 300.0)

Sweep = Mapping[tuple[str, float], FloatArray]


def rtx_errors(sweep: Sweep, constants: SiliconConstants) -> dict[tuple[str, float], FloatArray]:
    """By curve, relative errors of tokens/s (over those at the highest cap), W and SM clock, shape 3 x caps."""
    out = {}
    for (model, seqs), rows in sweep.items():
        said, seen = rtx_cells(model, seqs, rows[:, 0], constants), rows[:, 1:].T.copy()
        said[0] /= said[0, 0]
        seen[0] /= seen[0, 0]
        out[model, seqs] = said / seen - 1.0
    return out


def left_out_errors(sweep: Sweep) -> FloatArray:
    """Absolute errors as of `rtx_errors` at all caps that a fit to `GIVEN_CAPS_W` has not seen, shape 3 x points."""
    given = {curve: rows[np.isin(rows[:, 0], GIVEN_CAPS_W)] for curve, rows in sweep.items()}
    errors = rtx_errors(sweep, fit_rtx_pro_6000(CONSTANTS["H100-SXM"], given))
    parts = [errors[curve][:, ~np.isin(rows[:, 0], GIVEN_CAPS_W)] for curve, rows in sweep.items()]
    return np.abs(np.concatenate(parts, axis=1))


def a100_section() -> list[str]:
    """FACTS's cells of the PALS author's sweep beside the virtual A100."""
    body = []
    for cells in A100_CELLS:
        tokens, power_w = a100_cells(cells.model, CONSTANTS["A100-SXM"])
        for cap_w, seen, said in zip(A100_CAPS_W, cells.relative_tokens, tokens[1, 1:5] / tokens[1, 5], strict=True):
            quantity = f"tokens/s at {cap_w:.0f} W over 400 W, batch 64"
            body.append([cells.model, quantity, f"{seen:.2f}", f"{said:.3f}", f"{said - seen:+.3f}"])
        for quantity, seen, said in (
            ("natural W, batch 64", cells.natural_w, power_w[1, 5]),
            ("natural W, batch 1", cells.single_w, power_w[0, 5]),
        ):
            body.append([cells.model, quantity, f"{seen:.0f}", f"{said:.0f}", f"{said / seen - 1.0:+.1%}"])
        for name, row in (("1", 0), ("64", 1)):
            collapse = f"{tokens[row, 0] / tokens[row, 1]:.2f}"
            body.append([cells.model, f"W at a cap of 100 W, batch {name}", "98 to 102", f"{power_w[row, 0]:.1f}", ""])
            body.append([cells.model, f"tokens/s at 100 W over 150 W, batch {name}", ".2 to .5", collapse, ""])
    return [
        "### The virtual A100 under a cap, serving (FACTS, PALS's first author's sweep)",
        "",
        "TP 4, prompts of 190 and answers of 5 tokens. Its constants are fitted to these cells, so this says how well",
        "the form follows them. FACTS gives batch 1 to within 5 W.",
        "",
        *markdown_table(["model", "quantity", "FACTS", "virtual", "off by"], body),
    ]


def rtx_section(sweep: Sweep) -> list[str]:
    """MMBT's sweep beside the virtual RTX PRO 6000, fitted to all of it, and fitted to three of its caps."""
    caps_w = next(iter(sweep.values()))[:, 0]
    body = [
        [model, f"{seqs:.0f}", quantity, *(f"{100 * error:+.1f} %" for error in row)]
        for (model, seqs), errors in rtx_errors(sweep, CONSTANTS["RTX PRO 6000"]).items()
        for quantity, row in zip(("tokens/s", "W", "clock"), errors, strict=True)
    ]
    left_out = left_out_errors(sweep)
    given = ", ".join(f"{cap_w:.0f}" for cap_w in GIVEN_CAPS_W)
    shown = [
        [quantity, f"{100 * row.mean():.1f} %", f"{100 * row.max():.1f} %"]
        for quantity, row in zip(("tokens/s", "W", "clock"), left_out, strict=True)
    ]
    return [
        "### vLLM under a cap (MMBT, RTX PRO 6000)",
        "",
        "Decode of 1 and 32 concurrent requests with their prefill, a dense and an MoE model, both AWQ. Errors of the",
        "fit; tokens/s are those over the highest cap's. The absolute speed of the MoE at 32 is off by half: all",
        "requests are one prompt, so they share experts, which independent ones would not.",
        "",
        *markdown_table(["model", "requests", "quantity", *(f"{cap_w:.0f} W" for cap_w in caps_w)], body),
        f"The same fitted to {given} W alone: absolute error at the other caps.",
        "",
        *markdown_table(["quantity", "mean", "largest"], shown),
    ]
