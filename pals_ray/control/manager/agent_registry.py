"""Which agents there are: their replicas and the GPUs that they look after, as the manager last heard of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pals_ray.control.manager.fleet_status import Device, Member
from pals_ray.control.messages import AgentReport, Beat, NodeGpu, ReplicaSpec
from pals_ray.models.correction import CorrectedModel
from pals_ray.models.lookup import LoadedModel
from pals_ray.models.power_model import PowerModel


class AgentRegistry:
    """Members by replica id, devices by UUID; times are s of the manager's clock."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.devices: dict[str, Device] = {}
        self._heard_s: dict[str, float] = {}

    def restore(
        self, specs: Mapping[str, ReplicaSpec], now_s: float, models: Mapping[str, LoadedModel] | None = None
    ) -> None:
        """The agents that the manager before wrote down, and what predicts them, where known: not heard yet."""
        models = models or {}
        self.members = {name: Member(spec, None, models.get(name)) for name, spec in specs.items()}
        self._heard_s = dict.fromkeys(self.members, now_s)

    def take_in(self, spec: ReplicaSpec, managed: Iterable[NodeGpu], model: LoadedModel | None, now_s: float) -> None:
        """An agent that the ledger has welcomed, its replica's first or another one; and what predicts the replica."""
        for gpu in managed:
            known_device = self.devices.get(gpu.info.uuid)
            if known_device is None or known_device.node_id != spec.node_id:  # or its node came back under another id
                self.devices[gpu.info.uuid] = Device(spec.node_id, gpu, gpu.limit_w, 0.0)
        known = self.members.get(spec.replica_id)
        self.members[spec.replica_id] = Member(spec, known.beat if known else None, model)
        self._heard_s[spec.replica_id] = now_s

    def claimed(self, spec: ReplicaSpec) -> None:
        """A member's spec, now with the GPUs that its ranks hold."""
        self.members[spec.replica_id] = replace(self.members[spec.replica_id], spec=spec)

    def hear(self, beat: Beat, now_s: float) -> None:
        """A member's beat."""
        name = beat.report.replica_id
        self.members[name] = replace(self.members[name], beat=beat)
        self._heard_s[name] = now_s
        self.see(beat.report, beat.power_w)

    def see(self, report: AgentReport, power_w: Mapping[str, float]) -> None:
        """Limits in force and draws, W, as an agent read them."""
        for uuid, limit_w in {**report.parked_w, **report.limits_w}.items():
            if uuid in self.devices:
                self.devices[uuid] = replace(self.devices[uuid], limit_w=limit_w)
        for uuid, drawn_w in power_w.items():
            if uuid in self.devices:
                self.devices[uuid] = replace(self.devices[uuid], power_w=drawn_w)

    def forget(self, replica_id: str) -> None:
        """A replica has gone for good."""
        self.members.pop(replica_id, None)
        self._heard_s.pop(replica_id, None)

    def forget_node(self, node_id: str) -> list[str]:
        """A node has gone for good, its replicas and GPUs with it; the replicas that there were."""
        there = [name for name, member in self.members.items() if member.spec.node_id == node_id]
        for name in there:
            self.forget(name)
        self.devices = {uuid: device for uuid, device in self.devices.items() if device.node_id != node_id}
        return there

    def silence_s(self, replica_id: str, now_s: float) -> float:
        """How long a member has not been heard, s."""
        return now_s - self._heard_s[replica_id]

    @property
    def models(self) -> dict[str, PowerModel]:
        """What predicts each replica, corrected by what its agent saw."""
        return {
            name: CorrectedModel(m.model.surface, m.beat.correction, m.spec.num_gpus) if m.beat else m.model.surface
            for name, m in self.members.items()
            if m.model is not None
        }

    @property
    def errors(self) -> tuple[str, ...]:
        """What the agents could not read or set, a sentence each."""
        return tuple(
            f"{name}: {error}"
            for name, member in self.members.items()
            if member.beat
            for error in member.beat.errors.values()
        )
