"""The operator's handle on a running fleet, sync and async."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
from ray._private.utils import read_ray_address
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from pals_ray.config.budget_files import load_schedule, load_signal, parse_schedule
from pals_ray.config.operator_requests import followed
from pals_ray.config.policy_path import PolicyInfo, list_policies
from pals_ray.control.budget.regulation import Signal
from pals_ray.control.budget.schedule import Schedule
from pals_ray.errors import PalsError
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE
from pals_ray.types import BudgetChange, BudgetSource, FleetStatus, Target

CONNECT_TIMEOUT_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class NotRunning(PalsError):
    """There is no Ray cluster to reach, or no pals-ray fleet on it."""


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise our own errors as themselves, not as the RayTaskError with a remote traceback that carries them."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, PalsError):
            raise error.cause from None
        raise
    except (ActorDiedError, ActorUnavailableError) as error:
        raise NotRunning(
            "the fleet's manager has just died; Ray restarts it within seconds, so ask again: "
            f"agents keep their grants meanwhile ({error})"
        ) from error


def _blocking(ask: Callable[P, Awaitable[T]]) -> Callable[P, T]:
    """Make an operation, which asks the manager, wait for the answer and return it."""

    @wraps(ask)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_errors():
            answer: T = ray.get(ask(*args, **kwargs))
        return answer

    return call


def _async_twin(blocking: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The same operation for an event loop: it awaits the answer instead of blocking."""
    ask: Callable[P, Awaitable[T]] = blocking.__wrapped__  # type: ignore[attr-defined]

    @wraps(ask)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_errors():
            return await ask(*args, **kwargs)

    return call


class Fleet:
    """A running fleet. `..._async` is the same inside an event loop."""

    @property
    def _manager(self) -> Any:
        """Looked up each time: a manager that was killed is another actor afterwards."""
        try:
            return ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
        except ValueError as error:
            raise NotRunning(
                "this Ray cluster runs no pals-ray fleet; start one with `serve run deployments:app`"
            ) from error

    def _ask(self, operation: str, *args: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = getattr(self._manager, operation).remote(*args)
        return answer

    @_blocking
    def status(self) -> Awaitable[FleetStatus]:
        """Budget, charge, draw, and each replica's operating point, target and reason."""
        return self._ask("status")

    @_blocking
    def set_budget(self, budget_w: float) -> Awaitable[BudgetChange]:
        """Set the fleet's budget, W at node level. Returns when every cap is in force.

        Ends a schedule or a followed signal. Raises `InfeasibleBudget` with the watts needed where even the lowest caps
        draw more; nothing changes then.
        """
        return self._ask("set_budget", budget_w)

    @_blocking
    def schedule_budget(self, schedule: Schedule | str | Path | Mapping[str, Any]) -> Awaitable[BudgetSource]:
        """Have a schedule move the budget until the next `set_budget`: a file, or the content of one (docs/budgets.md).

        Returns when what it asks for now is in force. Raises `ConfigError` naming what cannot be used.
        """
        return self._ask("move_budget", scheduled(schedule))

    @_blocking
    def follow_signal(
        self, signal: str | Path | Signal, *, base_w: float, range_w: float, ceiling_w: float
    ) -> Awaitable[BudgetSource]:
        """Have the fleet's draw follow `base_w + range_w * signal`, W, from now until the next `set_budget`.

        The signal lies in [-1, 1], or names a CSV file of one (docs/budgets.md). The budget never passes the ceiling.
        Returns when what the signal asks for now is in force. Raises `ConfigError` naming what cannot be used.
        """
        values = signal if isinstance(signal, Signal) else load_signal(signal)
        plan = followed(values, base_w=base_w, range_w=range_w, ceiling_w=ceiling_w)
        return self._ask("move_budget", plan)

    @_blocking
    def set_target(self, model: str, **changes: float | None) -> Awaitable[Target]:
        """Change what is wanted of a model: fields of `Target` and its `Slo` by name, None for no limit.

        The rest stays as it is. Returns the whole target. Raises `ConfigError` naming the value, or the models that
        there are.
        """
        return self._ask("set_target", model, changes)

    status_async = _async_twin(status)
    set_budget_async = _async_twin(set_budget)
    schedule_budget_async = _async_twin(schedule_budget)
    follow_signal_async = _async_twin(follow_signal)
    set_target_async = _async_twin(set_target)

    def policies(self) -> tuple[PolicyInfo, ...]:
        """Every policy of ours, and the one in use."""
        return list_policies(self.status().policy)

    async def policies_async(self) -> tuple[PolicyInfo, ...]:
        """`policies` for an event loop."""
        return list_policies((await self.status_async()).policy)

    def stop(self) -> None:
        """Delete our Serve applications, wait for their engines, restore every limit and end the manager."""
        from pals_ray.runtime.stop import stop_fleet  # imports Ray Serve, which nothing else here needs

        with own_errors():
            stop_fleet(self._manager)


def scheduled(schedule: Schedule | str | Path | Mapping[str, Any]) -> Schedule:
    """What the manager is asked to keep to: a schedule's file, or the content of one. Raises `ConfigError`."""
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str | Path):
        return load_schedule(schedule)
    return parse_schedule(dict(schedule), "the schedule")


def connect(address: str = "auto") -> Fleet:
    """A handle on the fleet of the Ray cluster at `address` (by default the one this machine belongs to).

    Raises `NotRunning` where there is no cluster or no fleet on it.
    """
    if not ray.is_initialized():
        _refuse_unreachable(address)
        try:
            _join(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise NotRunning(
                f"no Ray cluster answers at {address!r} ({error}); start the fleet with `serve run deployments:app`, "
                "or set RAY_ADDRESS"
            ) from error
    return connect_from_actor()


def _join(address: str) -> None:
    join = partial(ray.init, address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        join()
    except ConnectionAbortedError:  # under load the head fails to start Ray's server for a client once in some 20 times
        join()


def _refuse_unreachable(address: str) -> None:
    """Try the address first: `ray.init` would go on trying for minutes where nobody listens. Raises `NotRunning`."""
    named = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    host, _, port = ((read_ray_address() if named in {None, "auto"} else named) or "").rpartition(":")
    if not host or "//" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise NotRunning(
            f"no Ray cluster answers at {host}:{port} ({error}); start the fleet with `serve run deployments:app`, or "
            "set RAY_ADDRESS to a cluster that runs one"
        ) from error


def connect_from_actor() -> Fleet:
    """A handle on the fleet, inside a process that belongs to the cluster already. Raises `NotRunning`."""
    fleet = Fleet()
    _ = fleet._manager
    return fleet
