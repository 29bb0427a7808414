"""The fleet as a policy sees it and as an operator sees it: pure functions of the ledger's and the agents' words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import Beat, NodeGpu, ReplicaSpec, ReplicaView
from pals_ray.control.replica.demand import pooled, toward
from pals_ray.control.slo import by_priority
from pals_ray.control.snapshot import Arrivals, FleetSnapshot, ReplicaCharges, ReplicaSnapshot
from pals_ray.models.lookup import LoadedModel
from pals_ray.types import (
    BudgetSource,
    FleetStatus,
    GpuStatus,
    Provenance,
    ReplicaStatus,
    ReplicaTelemetry,
    SloStatus,
    Stranded,
    Target,
)

#: A cap that binds in fewer samples than this leaves its watts unused: it is not what holds the draw down.
BINDING_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Member:
    """One replica's agent as the manager knows it: what it was made from, its last beat (None before the first), and
    what predicts its replica (None: nothing)."""

    spec: ReplicaSpec
    beat: Beat | None = None
    model: LoadedModel | None = None

    @property
    def telemetry(self) -> ReplicaTelemetry:
        return self.beat.telemetry if self.beat else ReplicaTelemetry()


@dataclass(frozen=True, slots=True)
class Device:
    """One managed GPU as the manager last heard of it: limit in force and draw, W."""

    node_id: str
    gpu: NodeGpu
    limit_w: float
    power_w: float


@dataclass(frozen=True, slots=True)
class FleetFacts:
    """What the status shows beside ledger and agents, under the same names."""

    policy: str
    version: str
    time_scale: float | None
    source: BudgetSource
    over_budget_w: float
    over_budget_s: float
    last_settle_s: float | None
    notes: tuple[str, ...]
    slos: tuple[SloStatus, ...] = ()


def fleet_snapshot(
    ledger: Ledger, members: Mapping[str, Member], targets: Mapping[str, Target], now_s: float
) -> FleetSnapshot:
    """What a policy decides on: replicas that hold GPUs, with the watts that may be divided."""
    replicas = []
    for view in ledger.replicas(now_s):
        member = members.get(view.replica_id)
        if view.uuids and member is not None:
            spec, beat = member.spec, member.beat
            replicas.append(
                ReplicaSnapshot(
                    **{part.name: getattr(view, part.name) for part in fields(ReplicaCharges)},
                    model=spec.model,
                    max_batch=spec.max_batch,
                    overhead=view.overhead,
                    target=targets.get(spec.model, Target()),
                    telemetry=member.telemetry,
                    natural_draw_w=beat.natural_draw_w if beat else None,
                    arrivals=beat.arrivals if beat else None,
                )
            )
    return ledger.snapshot(_with_those_alike(replicas), now_s)


def _with_those_alike(replicas: Sequence[ReplicaSnapshot]) -> list[ReplicaSnapshot]:
    """The same, those of a model on devices of one kind planned for together."""
    kinds: dict[tuple[object, ...], list[Arrivals]] = {}
    for replica in replicas:
        if replica.arrivals is not None and replica.arrivals.per_s > 0.0:
            kinds.setdefault(_kind(replica), []).append(replica.arrivals)
    means = {kind: pooled(alike) for kind, alike in kinds.items()}
    return [replace(r, arrivals=toward(r.arrivals, means[_kind(r)])) if _kind(r) in means else r for r in replicas]


def _kind(replica: ReplicaSnapshot) -> tuple[object, ...]:
    return replica.model, replica.num_gpus, replica.max_batch, replica.min_limit_w, replica.max_limit_w


def measured_w(ledger: Ledger, devices: Mapping[str, Device]) -> float:
    """Draw of all managed GPUs as their devices report it, plus each node's overhead, W."""
    gpu_w: dict[str, float] = {}
    for device in devices.values():
        gpu_w[device.node_id] = gpu_w.get(device.node_id, 0.0) + device.power_w
    return sum(node.overhead.charge_w(gpu_w.get(node.node_id, 0.0), 1, 1) for node in ledger.nodes())


def fleet_notes(ledger: Ledger, source: BudgetSource, configured_w: float | None, now_s: float) -> tuple[str, ...]:
    """What an operator should know of budget and nodes, a sentence each.

    `configured_w` is the budget of the fleet file, W; None where something moves it.
    """
    notes = [] if source.warning is None else [source.warning]
    if configured_w is not None and ledger.budget_w != configured_w:
        notes.append(f"the budget was set to {ledger.budget_w:g} W since; the configuration says {configured_w:g} W")
    rebuilding, why = ledger.rebuilding(now_s)
    if rebuilding:
        notes.append(why)
    lost = [node.node_id[:8] for node in ledger.nodes() if node.lost]
    if lost:
        notes.append(f"node {', '.join(lost)} cannot be reached: its GPUs stay charged what they last had")
    return tuple(notes)


def fleet_status(
    ledger: Ledger,
    members: Mapping[str, Member],
    targets: Mapping[str, Target],
    devices: Mapping[str, Device],
    facts: FleetFacts,
    now_s: float,
) -> FleetStatus:
    """The whole status. `devices` are all managed GPUs of all nodes, by UUID."""
    views = ledger.replicas(now_s)
    replicas = tuple(
        _replica_status(view, members[view.replica_id], targets, devices)
        for view in views
        if view.replica_id in members
    )
    holders = {uuid: view.replica_id for view in views for uuid in view.uuids}
    gpus = tuple(
        GpuStatus(
            uuid=uuid,
            product=device.gpu.info.product,
            node_id=device.node_id,
            limit_w=device.limit_w,
            power_w=device.power_w,
            replica_id=holders.get(uuid),
            enforceable=device.gpu.may_set,
            provenance=device.gpu.info.provenance,
        )
        for uuid, device in devices.items()
    )
    beat_of_node = {member.spec.node_id: member.beat for member in members.values()}
    parked_w = sum(ledger.parked_charge_w(now_s).values())
    drawn_w = measured_w(ledger, devices)
    charge_w = parked_w + sum(view.charge_w for view in views)
    unenforced = ledger.unenforced(now_s)
    facts = replace(facts, notes=facts.notes + ((unenforced,) if unenforced else ()))
    return FleetStatus(
        **{part.name: getattr(facts, part.name) for part in fields(FleetFacts)},
        budget_w=ledger.budget_w,
        reserve_w=ledger.config.reserve_w,
        charge_w=charge_w,
        reserved_w=ledger.reserved_w(),
        parked_w=parked_w,
        measured_w=drawn_w,
        unmanaged_w=sum(beat.unmanaged_w for beat in beat_of_node.values() if beat),
        stranded=_stranded(replicas, charge_w, drawn_w),
        epoch=ledger.epoch,
        enforced=unenforced is None and all(device.gpu.may_set for device in devices.values()),
        provenance=_provenance(devices.values()),
        replicas=replicas,
        gpus=gpus,
        slos_by_priority=by_priority(facts.slos),
    )


def _replica_status(
    view: ReplicaView, member: Member, targets: Mapping[str, Target], devices: Mapping[str, Device]
) -> ReplicaStatus:
    beat, seen = member.beat, member.telemetry
    drawn_w = view.overhead.charge_w(seen.power_w, view.num_gpus, view.node_gpus)
    return ReplicaStatus(
        replica_id=view.replica_id,
        model=member.spec.model,
        node_id=view.node_id,
        gpus=view.uuids,
        num_gpus=view.num_gpus,
        state="silent" if view.silent else "serving" if view.uuids else "starting",
        cap_w=beat.cap_w if beat else None,
        batch_limit=beat.batch_limit if beat else None,
        max_batch=member.spec.max_batch,
        charge_w=view.charge_w,
        grant_w=view.grant_w,
        stranded_w=max(view.charge_w - drawn_w, 0.0) if view.uuids else 0.0,
        target=targets.get(member.spec.model, Target()),
        telemetry=seen,
        tokens_per_joule=seen.throughput_tokens_per_s / seen.power_w if seen.power_w > 0 else None,
        reason=beat.reason if beat else "starting",
        grant_reason=view.reason,
        provenance=_provenance(devices[uuid] for uuid in view.uuids if uuid in devices),
        demand_tokens_per_s=beat.arrivals.tokens_per_s if beat and beat.arrivals else None,
        predicted_by=member.model.source if member.model else None,
        correction=(beat.correction.throughput, beat.correction.power) if beat else (1.0, 1.0),
        expected=beat.expected if beat else None,
    )


def _stranded(replicas: Sequence[ReplicaStatus], charge_w: float, drawn_w: float) -> Stranded:
    """Charge less draw, by cause: what the lowest cap alone costs (parked GPUs too), a cap that does not bind, and the
    headroom under one that does."""
    total_w = max(charge_w - drawn_w, 0.0)
    not_binding_w = headroom_w = 0.0
    for replica in replicas:
        if replica.state != "serving" or "lowest cap" in replica.reason:
            continue
        if replica.telemetry.binding_share < BINDING_SHARE:
            not_binding_w += replica.stranded_w
        else:
            headroom_w += replica.stranded_w
    minimum_cap_w = max(total_w - not_binding_w - headroom_w, 0.0)
    return Stranded(total_w, minimum_cap_w, headroom_w, not_binding_w)


def _provenance(devices: Iterable[Device]) -> Provenance:
    modelled = any(device.gpu.info.provenance is Provenance.MODELLED for device in devices)
    return Provenance.MODELLED if modelled else Provenance.MEASURED
