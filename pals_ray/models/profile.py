"""The profile file: one JSON per (model, GPU, parallelism) with its samples, where each came from, and the fit.

Only the samples count: the fit is stored for people and for checks, and is made again from the samples on loading.
Functions here take and return text; the caller reads and writes files.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pals_ray.errors import PalsError
from pals_ray.models.fitting.fitted_surface import fit_surface
from pals_ray.models.fitting.sample_checks import LATENCY_COLUMNS, REQUIRED_COLUMNS, SampleTable
from pals_ray.models.lookup import SurfaceModel
from pals_ray.models.power_model import FloatArray, PowerModel
from pals_ray.models.specs import ModelSpec
from pals_ray.types import Provenance

VERSION = 2

_Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class ProfileError(PalsError):
    """A profile file that cannot be used: says what is wrong with it and what would do."""


class ProfileSample(BaseModel, extra="forbid", frozen=True):
    """One measured point; `power_w` is the whole replica's, `power_cap_w` one GPU's."""

    power_cap_w: _Positive
    batch_limit: Annotated[int, Field(ge=1)]
    throughput_tokens_per_s: _Positive
    power_w: _Positive
    itl_p50_s: _Positive | None = None
    itl_p99_s: _Positive | None = None
    ttft_p50_s: _Positive | None = None
    ttft_p99_s: _Positive | None = None
    provenance: Provenance
    measured_at: str | None = None


class ProfileFit(BaseModel, extra="forbid", frozen=True):
    """What the fit found, in the unbounded coordinates of `pals_ray.models.fitting.form`, and what it could not."""

    parameters: dict[str, float]
    undetermined: tuple[str, ...] = ()


class Profile(BaseModel, extra="forbid", frozen=True):
    """A replica's measurements, in wall time: on virtual GPUs those of the slowed device, as the controller sees them.

    `time_scale` is that of the virtual GPUs (1 for real ones), `prompt_tokens` and `output_tokens` what the requests of
    the load looked like on average, where that is known.
    """

    version: Literal[2] = 2
    model: str
    gpu: str
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    expert_parallel: Annotated[int, Field(ge=1)] = 1
    num_gpus: Annotated[int, Field(ge=1)] = 1
    time_scale: _Positive = 1.0
    engine: str = ""
    created_at: str = ""
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    output_tokens: Annotated[int, Field(ge=1)] | None = None
    samples: tuple[ProfileSample, ...]
    fit: ProfileFit | None = None

    def table(self) -> SampleTable:
        """The samples as columns."""

        def column(name: str) -> FloatArray:
            """NaN where a sample has None."""
            return np.array([getattr(s, name) for s in self.samples], dtype=np.float64)

        latency = {name: column(name) for name in LATENCY_COLUMNS}
        cap_w, batch, throughput, power_w = map(column, REQUIRED_COLUMNS)
        return SampleTable(cap_w, batch, throughput, power_w, self.num_gpus, latency)

    def surface(self, spec: ModelSpec | None = None, latency_prior: PowerModel | None = None) -> SurfaceModel:
        """The model fitted to the samples. Raises `SampleError` where they are too few."""
        return fit_surface(self.table(), spec, latency_prior)

    def with_fit(self, surface: SurfaceModel) -> Profile:
        """This profile with what a fit of it found."""
        report = surface.report
        return self.model_copy(update={"fit": ProfileFit(parameters=report.values, undetermined=report.undetermined)})

    def check_time_scale(self, time_scale: float) -> None:
        """Refuse a profile made at another time scale, since its rates are those of another device."""
        if abs(self.time_scale / time_scale - 1.0) > 1e-6:
            raise ProfileError(
                f"profile of {self.model} was made at time_scale {self.time_scale:g}, but the deployment runs at "
                f"{time_scale:g}: profile it again, or set time_scale to {self.time_scale:g}"
            )

    def to_json(self) -> str:
        """The text of the file."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def samples_of(table: SampleTable, provenance: Provenance, measured_at: str | None = None) -> tuple[ProfileSample, ...]:
    """A table's rows as profile samples of one provenance."""
    required = (table.cap_w, table.batch, table.throughput_tokens_per_s, table.power_w)
    columns = {**dict(zip(REQUIRED_COLUMNS, required, strict=True)), **table.latency}
    return tuple(
        ProfileSample(
            **{name: float(values[i]) for name, values in columns.items() if np.isfinite(values[i])},
            provenance=provenance,
            measured_at=measured_at,
        )
        for i in range(len(table))
    )


def profile_from_json(text: str, source: str = "profile") -> Profile:
    """Read a profile of this version or an older one. `source` names the file in messages. Raises `ProfileError`."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProfileError(f"{source}: not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise ProfileError(f"{source}: not a profile: it has no `version`")
    version = raw["version"]
    if type(version) is not int or version < 1:
        raise ProfileError(f"{source}: version is {version!r}, must be a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise ProfileError(
            f"{source}: version {version} is newer than {VERSION}, the newest known here: upgrade pals-ray"
        )
    if version == 1:
        raw = _from_version_1(raw)
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ProfileError(f"{source}: {where}: {first['msg']} ({error.error_count()} problem(s) in all)") from error


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one `provenance` for the file, a `tp` key, and no time scale (it was always 1)."""
    out = {key: value for key, value in raw.items() if key not in ("provenance", "tp", "fit")}
    provenance, samples, tensor = raw.get("provenance", Provenance.MEASURED), raw.get("samples", []), raw.get("tp", 1)
    if isinstance(samples, list):
        samples = [{"provenance": provenance, **s} if isinstance(s, dict) else s for s in samples]
    return {"num_gpus": tensor} | out | {"version": VERSION, "tensor_parallel": tensor, "samples": samples}
