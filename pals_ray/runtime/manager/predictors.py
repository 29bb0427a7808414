"""What predicts a replica: the profile that its model's entry names, else the roofline prior of a known model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pals_ray.config.fleet import FleetConfig, ModelConfig
from pals_ray.config.reader import ConfigError
from pals_ray.control.messages import Registration
from pals_ray.errors import PalsError
from pals_ray.models.lookup import LoadedModel, tabulated
from pals_ray.models.physics.constants import provenance_of
from pals_ray.models.physics.roofline import RooflineModel, known_prior
from pals_ray.models.specs import Parallelism, find_gpu
from pals_ray.types import Provenance

if TYPE_CHECKING:  # a fit imports scipy, which only a manager with profiles should load
    from pals_ray.models.profile import Profile

#: A prior's table covers every possible batch limit, so that one table serves any engine.
MOST_BATCH = 4096

log = logging.getLogger("pals.manager")


class Predictors:
    """The models of one configuration, each made when the first replica needs it (a prior takes some 50 ms)."""

    def __init__(self, config: FleetConfig) -> None:
        self._config = config
        self._models = {model.model_id: model for model in config.models}
        self._made: dict[tuple[str, str, int], LoadedModel | None] = {}
        self._missing: dict[str, str] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which models nothing predicts, and what would help."""
        return tuple(self._missing.values())

    def of_new(self, registration: Registration) -> LoadedModel | None:
        """The model of a replica that says hello (None: nothing predicts it). Slow where a profile has to be fitted."""
        if not registration.managed:
            return None
        gpu, spec = registration.managed[0].info, registration.spec
        return self.of(spec.model, gpu.product, spec.num_gpus, virtual=gpu.provenance is Provenance.MODELLED)

    def of(self, model_id: str, product: str, num_gpus: int, *, virtual: bool) -> LoadedModel | None:
        """The model of a replica on `num_gpus` GPUs of this product name; None where there is none (see `notes`)."""
        key = (model_id, product, num_gpus)
        if key not in self._made:
            model = self._models.get(model_id)
            if model is None:  # a replica of the previous deployment, which is about to leave
                return None
            try:
                self._made[key] = _load(model, product, num_gpus, self._config.time_scale if virtual else 1.0)
            except PalsError as error:
                log.warning("nothing predicts %s: %s", model_id, error)
                self._made[key] = None
                self._missing[model_id] = f"nothing predicts {model_id}, it runs at its grant: {error}"
        return self._made[key]


def read_profile(path: str, time_scale: float) -> Profile:
    """A profile for a deployment at this time scale. Raises `ConfigError` or `ProfileError` naming the file."""
    from pals_ray.models.profile import profile_from_json

    try:
        text = Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error
    profile = profile_from_json(text, path)
    profile.check_time_scale(time_scale)
    return profile


def _load(model: ModelConfig, product: str, num_gpus: int, time_scale: float) -> LoadedModel:
    if model.profile is None:
        prior, source = _prior(model, product, num_gpus, time_scale)
        gpu = find_gpu(product)
        return LoadedModel(source, tabulated(prior, gpu.min_limit_w, gpu.max_limit_w, MOST_BATCH, num_gpus))
    profile = read_profile(model.profile, time_scale)
    measured, here = find_gpu(profile.gpu).name, find_gpu(product).name
    if (measured, profile.num_gpus) != (here, num_gpus):
        raise ConfigError(
            f"profile {model.profile} is of {profile.num_gpus} {measured}, but a replica of {model.model_id} has "
            f"{num_gpus} {here}: profile it there"
        )
    if profile.model != model.model_id:
        log.warning("%s is predicted by a profile of %s: %s", model.model_id, profile.model, model.profile)
    try:
        shape, _ = _prior(model, product, num_gpus, time_scale)
    except PalsError:
        fitted = profile.surface()
    else:
        fitted = profile.surface(shape.physics.model, shape)
    samples = len(profile.samples)
    return LoadedModel(f"profile {model.profile} ({samples} samples, {profile.samples[0].provenance})", fitted)


def _prior(model: ModelConfig, product: str, num_gpus: int, time_scale: float) -> tuple[RooflineModel, str]:
    if num_gpus != model.tensor_parallel:
        raise ConfigError(
            f"no prior knows pipeline parallelism ({model.tensor_parallel} of {num_gpus} GPUs are tensor parallel): "
            "give it a `profile`"
        )
    prior = known_prior(model.known_as, product, Parallelism(model.tensor_parallel, model.expert_parallel), time_scale)
    spec, gpu = prior.physics.model.name, prior.physics.gpu.name
    return prior, f"roofline prior of {spec} on {num_gpus} {gpu} ({provenance_of(gpu)})"
