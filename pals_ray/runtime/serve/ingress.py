"""Ray Serve LLM's OpenAI ingress, with the power API beside it on the same port."""

from __future__ import annotations

import hmac
import os
from typing import Any

from fastapi import HTTPException, Request
from pydantic import BaseModel
from ray import serve
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, OpenAiIngress, make_fastapi_ingress

from pals_ray.config.budget_files import ScheduleFile
from pals_ray.config.fleet import Watts
from pals_ray.config.operator_requests import FollowRequest
from pals_ray.config.policy_path import PolicyInfo
from pals_ray.config.reader import ConfigError, StrictModel
from pals_ray.errors import InfeasibleBudget
from pals_ray.runtime.actors import ensure_manager
from pals_ray.runtime.client import connect_from_actor
from pals_ray.types import BudgetSource, FleetStatus, Target

TOKEN_VARIABLE = "PALS_POWER_TOKEN"


class BudgetRequest(StrictModel):
    """The body of `PUT /power/budget`."""

    budget_w: Watts


class BudgetAnswer(BaseModel):
    """What `PUT /power/budget` answers once every cap is in force."""

    budget_w: float
    settled_s: float


class PowerIngress(OpenAiIngress):  # type: ignore[misc]
    """OpenAI API under /v1, power API under /power. Its `user_config` carries the fleet's configuration to the manager,
    so that a redeploy with another budget restarts nothing."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Give the deployed configuration and its version to the manager. Calling it again changes nothing."""
        manager = await ensure_manager(user_config["config"]["storage_path"])
        app = serve.get_replica_context().app_name
        await manager.configure.remote(user_config["config"], user_config["version"], app)

    async def power(self) -> FleetStatus:
        """`GET /power`: the fleet's status."""
        return await connect_from_actor().status_async()

    async def set_power_budget(self, body: BudgetRequest, request: Request) -> BudgetAnswer:
        """`PUT /power/budget`: answers when every cap is in force; 409 with the watts needed where that cannot be."""
        _authorise(request)
        try:
            change = await connect_from_actor().set_budget_async(body.budget_w)
        except InfeasibleBudget as error:
            raise HTTPException(409, {"message": str(error), "needed_w": error.needed_w}) from error
        return BudgetAnswer(budget_w=change.budget_w, settled_s=change.settled_s)

    async def set_power_schedule(self, body: ScheduleFile, request: Request) -> BudgetSource:
        """`PUT /power/schedule`: a schedule, as in a file of one, moves the budget until the next PUT of a budget."""
        _authorise(request)
        return await connect_from_actor().schedule_budget_async(body.schedule())

    async def set_power_signal(self, body: FollowRequest, request: Request) -> BudgetSource:
        """`PUT /power/signal`: the fleet's draw follows a signal from now until the next PUT of a budget."""
        _authorise(request)
        watts = {"base_w": body.base_w, "range_w": body.range_w, "ceiling_w": body.ceiling_w}
        return await connect_from_actor().follow_signal_async(body.plan().signal(), **watts)

    async def set_power_target(self, model: str, body: dict[str, Any], request: Request) -> Target:
        """`PUT /power/targets/{model}`: change values of a model's target and SLO, null for no limit."""
        _authorise(request)
        try:
            return await connect_from_actor().set_target_async(model, **body)
        except ConfigError as error:
            raise HTTPException(400, str(error)) from error

    async def power_policies(self) -> tuple[PolicyInfo, ...]:
        """`GET /power/policies`: every policy of ours, and the one in use."""
        return await connect_from_actor().policies_async()


def _authorise(request: Request) -> None:
    expected = os.environ.get(TOKEN_VARIABLE)
    if not expected:
        raise HTTPException(
            403,
            f"changing anything by HTTP is off: start Ray with {TOKEN_VARIABLE} set, and send it as a bearer token",
        )
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), expected.encode()):
        raise HTTPException(401, f"send the value of {TOKEN_VARIABLE} as `Authorization: Bearer ...`")


def make_ingress_class() -> Any:
    """The deployable class: Ray's OpenAI routes plus ours."""
    endpoints = {
        **DEFAULT_ENDPOINTS,
        "power": lambda app: app.get("/power", response_model=FleetStatus),
        "set_power_budget": lambda app: app.put("/power/budget", response_model=BudgetAnswer),
        "set_power_schedule": lambda app: app.put("/power/schedule", response_model=BudgetSource),
        "set_power_signal": lambda app: app.put("/power/signal", response_model=BudgetSource),
        "set_power_target": lambda app: app.put("/power/targets/{model:path}", response_model=Target),
        "power_policies": lambda app: app.get("/power/policies", response_model=tuple[PolicyInfo, ...]),
    }
    return make_fastapi_ingress(PowerIngress, endpoint_map=endpoints)
