"""Which replica a profiler may measure, and holding it at a point."""

from __future__ import annotations

from dataclasses import dataclass

from pals_ray.control.allocation.measurement_holds import HOLD_LEASE_S, Hold, HoldRefused, MeasurementHolds
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.manager.agent_registry import AgentRegistry
from pals_ray.control.manager.deployment import DeployedModel, Deployment
from pals_ray.control.snapshot import FleetSnapshot, ReplicaSnapshot
from pals_ray.types import GpuInfo, OperatingPoint, Provenance


@dataclass(frozen=True, slots=True)
class MeasurementSubject:
    """A replica that may be measured. `most_cap_w`, W per GPU, is what the budget allows beside all others at their
    lowest caps. `gpu` is its first GPU, `time_scale` that of virtual GPUs, and 1 on real ones.
    """

    replica: ReplicaSnapshot
    deployed: DeployedModel
    gpu: GpuInfo
    most_cap_w: float
    time_scale: float


def subject(
    model: str,
    deployment: Deployment,
    ledger: Ledger,
    registry: AgentRegistry,
    holds: MeasurementHolds,
    now: FleetSnapshot,
) -> MeasurementSubject:
    """The one replica of a model. Raises `HoldRefused` where there is none to be measured, or more than one."""
    if model not in deployment.models:
        raise HoldRefused(f"no model {model!r} is deployed; possible are {', '.join(deployment.models)}")
    rows = [row for row in now.replicas if row.model == model]
    if len(rows) != 1:
        raise HoldRefused(
            f"{model} has {len(rows)} serving replicas, but one alone is measured, since Serve spreads the load "
            "over all of them: scale the model to one replica (num_replicas: 1) for the time of measuring"
        )
    (row,) = rows
    gpu = registry.devices[registry.members[row.replica_id].spec.gpus[0]].gpu.info
    terms = ledger.terms(row.replica_id)
    room_w, where = holds.room_w(now, row.replica_id)
    if room_w < terms.least_charge_w:
        raise HoldRefused(f"{where} has no room for {row.replica_id} even at its lowest cap")
    return MeasurementSubject(
        row,
        deployment.models[model],
        gpu,
        most_cap_w=terms.cap_w(min(room_w, terms.most_charge_w)),
        time_scale=deployment.time_scale if gpu.provenance is Provenance.MODELLED else 1.0,
    )


def hold(
    replica_id: str, owner: str, point: OperatingPoint, ledger: Ledger, holds: MeasurementHolds, now: FleetSnapshot
) -> bool:
    """Hold a replica at a point, or renew that; whether the point changed. Raises `HoldRefused`."""
    row = next((row for row in now.replicas if row.replica_id == replica_id), None)
    if row is None:
        raise HoldRefused(f"{replica_id} does not serve: it holds no GPUs that could be capped")
    view = ledger.replica(replica_id, now.now_s)
    if view.fixed:
        raise HoldRefused(f"{replica_id} cannot be moved now: {view.reason}")
    terms = ledger.terms(replica_id)
    if not terms.min_limit_w <= point.cap_w <= terms.max_limit_w or not 1 <= point.batch_limit <= row.max_batch:
        raise HoldRefused(
            f"{replica_id} cannot be held at {point.cap_w:g} W, batch limit {point.batch_limit}: possible are "
            f"{terms.min_limit_w:g} to {terms.max_limit_w:g} W per GPU and 1 to {row.max_batch} sequences"
        )
    until_s = now.now_s + HOLD_LEASE_S
    return holds.take(now, replica_id, Hold(owner, point, terms.charge_w(point.cap_w), until_s))
