"""Measuring one live replica: hold it at a point, load it until it is steady, read it, and release it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayActorError

from pals_ray.control.allocation.measurement_holds import HoldRefused
from pals_ray.control.manager.measurement import MeasurementSubject
from pals_ray.control.telemetry import Reading, between
from pals_ray.errors import PalsError
from pals_ray.models.profile import ProfileSample
from pals_ray.profiling.load import ClosedLoop, loaded
from pals_ray.profiling.steady import SteadyRule, first_tokens, steady_window
from pals_ray.runtime.client import own_errors
from pals_ray.runtime.messages import MANAGER_NAME, NAMESPACE, Measurement, agent_name
from pals_ray.types import OperatingPoint, ReplicaTelemetry

RENEW_S = 1.0
READ_S = 1.0
IN_FORCE_DEADLINE_S = 20.0
IDLE_DEADLINE_S = 30.0
POINT_DEADLINE_S = 90.0
_SAME_CAP_W = 0.5


class MeasuringError(PalsError):
    """A point that could not be measured: says what stood in the way."""


class NotSteady(MeasuringError):
    """A replica that did not become steady at a point in time."""


class HeldReplica:
    """A replica that this profiler holds at a point. A task renews the hold; without it the policy decides again."""

    def __init__(self, subject: MeasurementSubject, owner: str, manager: Any) -> None:
        self.subject = subject
        self._owner = owner
        self._manager = manager
        self._agent = ray.get_actor(agent_name(subject.replica.replica_id), namespace=NAMESPACE)
        self._point: OperatingPoint | None = None
        self._refused: PalsError | None = None

    async def hold(self, point: OperatingPoint) -> None:
        """Bring a point's cap into force. Raises `HoldRefused`, or `MeasuringError` where that takes too long.

        The batch limit is not waited for: the scheduler reads it with its next step, and an idle engine makes none.
        """
        with own_errors():
            await self._manager.hold.remote(self.subject.replica.replica_id, self._owner, point)
        self._point = point
        await self._until(
            lambda read: _at_cap(read, point),
            IN_FORCE_DEADLINE_S,
            f"is not at {point.cap_w:g} W after {IN_FORCE_DEADLINE_S:g} s: `pals status` says what holds it",
        )

    async def read(self) -> Measurement:
        """A fresh reading. Raises what has refused the hold meanwhile."""
        if self._refused is not None:
            raise self._refused
        with own_errors():
            read: Measurement | None = await self._agent.measure.remote()
        if read is None or read.reading.engine is None:
            raise MeasuringError(f"{self.subject.replica.replica_id} cannot be read: `pals status` says why")
        return read

    def in_force(self, read: Measurement) -> bool:
        """Whether the point held is in force on all GPUs and in the engine's scheduler."""
        engine, point = read.reading.engine, self._point
        return bool(engine and point and engine.batch_limit == point.batch_limit and _at_cap(read, point))

    async def idle(self) -> None:
        """Wait until no request runs or waits. Raises `MeasuringError`."""
        await self._until(
            lambda read: _requests(read.reading) == 0,
            IDLE_DEADLINE_S,
            "serves other requests: measuring takes the replica for itself, so send them elsewhere meanwhile",
        )

    async def _until(self, holds: Callable[[Measurement], bool], deadline_s: float, otherwise: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while not holds(await self.read()):
                    await asyncio.sleep(0.1)
                return
        raise MeasuringError(f"{self.subject.replica.replica_id} {otherwise}")

    async def renew(self) -> None:
        """Renew the hold for ever; a manager that is away may come back within the lease."""
        while True:
            await asyncio.sleep(RENEW_S)
            if self._point is None:
                continue
            try:
                with own_errors():
                    await self._manager.hold.remote(self.subject.replica.replica_id, self._owner, self._point)
            except HoldRefused as error:
                self._refused = error
                return
            except (PalsError, RayActorError):
                continue

    async def release(self) -> None:
        """Give the replica back to the policy."""
        self._point = None
        with suppress(PalsError, RayActorError), own_errors():
            await self._manager.release.remote(self.subject.replica.replica_id, self._owner)


@asynccontextmanager
async def held(model: str) -> AsyncIterator[HeldReplica]:
    """A model's replica for measuring; on leaving, however that comes about, it is the policy's again.

    Needs a connected Ray (`pals_ray.connect`). Raises `HoldRefused`.
    """
    manager = ray.get_actor(MANAGER_NAME, namespace=NAMESPACE)
    with own_errors():
        subject: MeasurementSubject = await manager.subject.remote(model)
    replica = HeldReplica(subject, uuid.uuid4().hex, manager)
    renewing = asyncio.create_task(replica.renew())
    try:
        yield replica
    finally:
        renewing.cancel()
        await replica.release()


async def measure(
    replica: HeldReplica,
    point: OperatingPoint,
    load: ClosedLoop,
    tell: Callable[[float, str], None],
) -> ProfileSample:
    """Measure one point under a load of as many requests as the batch limit. Raises `MeasuringError`, `HoldRefused`.

    Readings count from when every sequence of the batch has had its first token, while the point is in force and
    nobody else's request runs. `tell` is called with the share that is done and what is waited for.
    """
    await replica.idle()
    await replica.hold(point)
    begun = first_tokens((await replica.read()).reading)
    readings: list[Reading] = []
    reason = "first tokens of the whole batch"
    async with loaded(load):
        try:
            async with asyncio.timeout(POINT_DEADLINE_S):
                while True:
                    await asyncio.sleep(READ_S)
                    if load.result.failures:
                        raise MeasuringError(f"a request of the load failed: {load.result.failures[0]}")
                    read = await replica.read()
                    if not replica.in_force(read) or _requests(read.reading) > point.batch_limit:
                        readings, reason = [], "the point in force, and no other requests"
                    elif first_tokens(read.reading) - begun >= point.batch_limit:
                        readings.append(read.reading)
                        first, reason = steady_window(readings)
                        if first is not None:
                            return _sample(between(first, read.reading), point, replica.subject)
                    elapsed_s = readings[-1].time_s - readings[0].time_s if readings else 0.0
                    tell(min(elapsed_s / SteadyRule().least_s, 0.95), reason)
        except TimeoutError:
            raise NotSteady(
                f"{replica.subject.replica.replica_id} at {point.cap_w:g} W, batch limit {point.batch_limit} was not "
                f"steady within {POINT_DEADLINE_S:g} s: {reason}"
            ) from None


def _at_cap(read: Measurement, point: OperatingPoint) -> bool:
    return all(abs(cap_w - point.cap_w) < _SAME_CAP_W for cap_w in read.caps_w)


def _requests(reading: Reading) -> int:
    return reading.engine.running + reading.engine.waiting if reading.engine else 0


def _sample(seen: ReplicaTelemetry, point: OperatingPoint, subject: MeasurementSubject) -> ProfileSample:
    return ProfileSample(
        power_cap_w=point.cap_w,
        batch_limit=point.batch_limit,
        throughput_tokens_per_s=seen.throughput_tokens_per_s,
        power_w=seen.power_w,
        itl_p50_s=seen.itl.p50_s,
        itl_p99_s=seen.itl.p99_s,
        ttft_p50_s=seen.ttft.p50_s,
        ttft_p99_s=seen.ttft.p99_s,
        provenance=subject.gpu.provenance,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
