"""From a fleet file to a Ray Serve application."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.llm._internal.serve.constants import RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.llm._internal.serve.core.server.builder import build_llm_deployment
from ray.serve import Application
from ray.serve.llm import LLMConfig

from pals_ray.config.fleet import FleetConfig, ModelConfig, load_fleet_config, parse_fleet_config
from pals_ray.config.policy_path import load_policy
from pals_ray.config.reader import ConfigError, check
from pals_ray.gpus.driver_choice import HardwareSpec, choose_kind
from pals_ray.gpus.gpu_protocol import GpuError
from pals_ray.runtime.manager.predictors import read_profile
from pals_ray.runtime.serve.ingress import PowerIngress, make_ingress_class
from pals_ray.runtime.serve.router import ROUTER_CONFIG
from pals_ray.runtime.serve.server import TINY_FOLDER, TINY_MODELS, PowerLLMServer, PowerOptions, engine_hooks

EXAMPLES = Path(__file__).parent / "examples"
DEFAULT_CONFIG = EXAMPLES / "tiny.yaml"

#: What a replica on virtual GPUs reserves in Ray: very little CPU, so that many fit on a small machine.
_CPU_BUNDLE = {"CPU": 0.2}
_CPU_ACTOR = {"num_cpus": 0.1}

#: The ingress runs on the head node, as the manager does, so that no dying worker node takes the APIs with it.
_ON_HEAD = {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}

_SCALE_KEYS = ("num_replicas", "autoscaling_config")


def build(args: dict[str, str]) -> Application:
    """The application of the fleet file `args["config"]`; without one, two tiny models on four virtual A100s.

    It has one deployment a model, and the ingress that carries the power API.

    Raises `ConfigError` with one message that says what is wrong and what is possible.
    """
    unknown = set(args) - {"config"}
    if unknown:
        raise ConfigError(f"unknown argument {', '.join(sorted(unknown))}; possible is config=PATH")
    if RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING:
        raise ConfigError(
            "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING=1 leaves no room for the power API: requests would bypass the "
            "ingress that carries it. Unset it, and start Ray again without it."
        )
    fleet = load_fleet_config(args.get("config", DEFAULT_CONFIG))
    load_policy(fleet.policy)
    fleet = _settled(fleet)
    kind = fleet.hardware.kind
    for model in fleet.models:
        if model.profile is not None:
            read_profile(model.profile, fleet.time_scale if kind == "virtual" else 1.0)
    virtual = fleet.hardware.virtual
    hardware = HardwareSpec("nvml") if kind == "nvml" else HardwareSpec("virtual", virtual.gpu, virtual.count)
    configs = [_llm_config(model, hardware) for model in fleet.models]
    deployments = {}
    for model, config in zip(fleet.models, configs, strict=True):
        options = PowerOptions(
            num_gpus=model.num_gpus,
            hardware=hardware,
            storage_path=fleet.storage_path,
            stands_for=model.stands_for,
            time_scale=fleet.time_scale,
            tiny_model=TINY_MODELS.get(model.model_source),
        )
        deployment = build_llm_deployment(config, bind_kwargs={"power": options}, override_serve_options=_scale(model))
        deployments[model.model_id] = _pin_version(deployment, model.llm_config | {"deployment_config": {}}, options)
    ingress_options = PowerIngress.get_deployment_options(configs)
    ingress_options["ray_actor_options"] = dict(_ON_HEAD)
    ingress_options["autoscaling_config"] = None
    ingress_options["num_replicas"] = 1
    ingress_options["user_config"] = {"config": fleet.model_dump(mode="json"), "version": version_of(fleet)}
    ingress = serve.deployment(make_ingress_class(), **ingress_options).bind(
        llm_deployments=deployments,
        model_cards={config.model_id: to_model_metadata(config.model_id, config) for config in configs},
        lora_paths={},
    )
    return _pin_version(ingress, [model.llm_config["model_loading_config"] for model in fleet.models])


def _settled(fleet: FleetConfig) -> FleetConfig:
    """The fleet with `auto` hardware replaced by what it means on this machine, and checked again."""
    try:
        kind, _ = choose_kind(fleet.hardware.kind)
    except GpuError as error:
        raise ConfigError(str(error)) from error
    content = fleet.model_dump(mode="json")
    content["hardware"]["kind"] = kind
    return parse_fleet_config(content, "the fleet file, on this machine's hardware,")


def version_of(fleet: FleetConfig) -> str:
    """When this deployment was built, and a digest of its content. A later build wins; equal content is no change."""
    return f"{time.time_ns():020d}-{_digest(fleet.model_dump(mode='json'))}"


def _digest(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=asdict).encode()).hexdigest()[:12]


def _pin_version(application: Application, *content: Any) -> Application:
    """Have Serve restart replicas only when what they are made from has changed, or this package has.

    `serve run` gives every deployment a random version each time, which would restart all engines for a new budget.
    Serve has no option for it any more, but still reads this attribute.
    """
    application._bound_deployment._version = _digest(importlib.metadata.version("pals-ray"), *content)
    return application


def _scale(model: ModelConfig) -> dict[str, Any]:
    """How many replicas. Not in the LLMConfig, since that is a constructor argument whose change restarts replicas."""
    deployment = model.llm_config.get("deployment_config", {})
    return {key: deployment[key] for key in _SCALE_KEYS if key in deployment}


def _llm_config(model: ModelConfig, hardware: HardwareSpec) -> LLMConfig:
    content: dict[str, Any] = json.loads(json.dumps(model.llm_config))
    content["server_cls"] = PowerLLMServer
    placement = content.setdefault("placement_group_config", {})
    placement["strategy"] = "STRICT_PACK"
    virtual = hardware.kind == "virtual"
    if not placement.get("bundles"):
        placement.setdefault("bundle_per_worker", dict(_CPU_BUNDLE) if virtual else {"GPU": 1})
    deployment = content.setdefault("deployment_config", {})
    if virtual:
        content.setdefault("accelerator_config", {"kind": "cpu"})
        deployment["ray_actor_options"] = {**_CPU_ACTOR, **deployment.get("ray_actor_options", {})}
    for key in _SCALE_KEYS:
        deployment.pop(key, None)
    deployment.setdefault("health_check_period_s", 2)
    # Serve gives a replica up after three of these. After a link was down for 30 s, TCP may stay silent for 55 s.
    deployment.setdefault("health_check_timeout_s", 25)
    deployment.setdefault("request_router_config", dict(ROUTER_CONFIG))
    deployment.setdefault("max_constructor_retry_count", 2)
    # Set here and not in the replica, because Serve LLM fixes the engine's arguments when the application is built.
    # A worker class that the file names stays; on virtual GPUs it must claim them, as ours do.
    engine = content.setdefault("engine_kwargs", {})
    engine.update(engine_hooks(hardware) | {key: engine[key] for key in ("worker_cls",) if key in engine})
    source = model.model_source
    if source in TINY_MODELS:
        content["model_loading_config"]["model_source"] = str(TINY_FOLDER / TINY_MODELS[source])
    else:
        _refuse_missing_folder(model.model_id, source)
    return check(LLMConfig, content, f"llm_config of {model.model_id} cannot be used")


def _refuse_missing_folder(model_id: str, source: str) -> None:
    if source.startswith(("/", ".", "~")) and not (Path(source).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"{model_id}: model_source {source} holds no config.json; name a folder with a model in it (on every "
            f"node), a model id of the hub, or one of our own: {', '.join(TINY_MODELS)}"
        )
