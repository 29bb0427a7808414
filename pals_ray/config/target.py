"""What an operator wants from a model, as written in files or asked for by call: an SLO, tokens/s, a priority."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any

from pydantic import Field, model_validator

from pals_ray.config.reader import ConfigError, StrictModel, check
from pals_ray.types import Slo, Target

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SLO_KEYS = tuple(part.name for part in fields(Slo))
#: Limits of a target in earlier versions.
_OLD_KEYS = ("ttft_p99_s", "itl_p99_s")


class SloConfig(StrictModel):
    """What is promised of a model's requests; see `pals_ray.types.Slo`."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    attainment: float = Field(0.99, gt=0, lt=1, allow_inf_nan=False)
    window_s: float = Field(300.0, ge=10, allow_inf_nan=False)
    itl_p99_s: Seconds | None = None


class TargetConfig(StrictModel):
    """What the operator wants from a model; see `pals_ray.types.Target`."""

    slo: SloConfig = SloConfig()
    throughput_tokens_per_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    priority: int = Field(0, ge=0)
    min_share: float = Field(0.0, ge=0, le=1)
    burst_floor_w: float = Field(0.0, ge=0, allow_inf_nan=False)
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _no_old_keys(cls, given: Any) -> Any:
        old = [key for key in _OLD_KEYS if isinstance(given, Mapping) and key in given]
        if old:
            raise ValueError(
                f"{' and '.join(old)} {'is' if len(old) == 1 else 'are'} no longer known: limit a request's time to "
                "first token by slo.ttft_s, its time per output token by slo.tpot_s, and gaps between tokens by "
                "slo.itl_p99_s (docs/slo.md)"
            )
        return given

    def target(self) -> Target:
        return Target(**self.model_dump(exclude={"slo"}), slo=Slo(**self.slo.model_dump()))


class TargetedModel(StrictModel):
    """The part of a model's entry that says what is wanted of it."""

    target: TargetConfig = TargetConfig()

    @model_validator(mode="before")
    @classmethod
    def _slo_inside_target(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "slo" in given:
            raise ValueError("an SLO belongs to the target: write target: {slo: {...}}")
        return given


def with_changes(target: Target, changes: Mapping[str, Any], refused: str) -> Target:
    """A target with some values changed, those of its SLO by their own names (`ttft_s`).

    Raises `ConfigError`: `refused`, and what is wrong with them.
    """
    if "slo" in changes:
        raise ConfigError(f"{refused}:\n  slo: change its values by their own names, {', '.join(SLO_KEYS)}")
    before = asdict(target)
    slo = before.pop("slo") | {name: value for name, value in changes.items() if name in SLO_KEYS}
    others = before | {name: value for name, value in changes.items() if name not in SLO_KEYS}
    return check(TargetedModel, {"target": {**others, "slo": slo}}, refused).target.target()
