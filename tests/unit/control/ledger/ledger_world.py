"""A fleet in miniature: GPUs that hold limits, the cores of agents and managers, a disk, and a bad network.

What is true here is kept apart from what a ledger believes: `World.potential_w` is what the GPUs have in force, or may
yet get by the messages under way without any further decision of a manager.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from pals_ray.control.agent import commands as agent_commands
from pals_ray.control.agent.agent_core import AgentCore
from pals_ray.control.charge import ChargeTerms
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.manager import commands as manager_commands
from pals_ray.control.manager.deployment import DeployedModel, Deployment
from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.control.manager.manager_core import ManagerCore
from pals_ray.control.messages import (
    AgentReport,
    Answer,
    Beat,
    GpuHeldError,
    LedgerError,
    ManagedGpu,
    NodeGpu,
    NodeInfo,
    ParkOrder,
    ReplicaSpec,
    StaleEpochError,
)
from pals_ray.control.replica.replica_controller import ReplicaController
from pals_ray.control.snapshot import Domain, FleetSnapshot, Overhead, Share
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import GpuInfo, Grant, Provenance, Target

MAX_BATCH = 32
FAIL_SAFE_W = 150.0
SLACK_W = 1e-3


class BrokenError(AssertionError):
    """What must always hold did not."""


def ensure(condition: bool, words: str) -> None:
    """Fail with these words unless the condition holds."""
    if not condition:
        raise BrokenError(words)


@dataclass
class Device:
    """One GPU: the limit set in band, one set out of band, and whether calls to set it fail at present."""

    uuid: str
    in_band_w: float
    min_w: float = 100.0
    max_w: float = 400.0
    floor_w: float = 0.0
    out_of_band_w: float = math.inf
    failing: bool = False

    @property
    def limit_w(self) -> float:
        """The limit in force."""
        return min(self.in_band_w, self.out_of_band_w)

    def set(self, limit_w: float) -> None:
        """Order a limit; nothing happens where calls fail."""
        ensure(self.min_w - 1e-9 <= limit_w <= self.max_w + 1e-9, f"{self.uuid}: {limit_w} W is outside its range")
        if not self.failing:
            self.in_band_w = limit_w


@dataclass(eq=False)
class Host:
    """A node's hardware. `node_id` changes when Ray starts on it again; `known_as` are all it ever had."""

    node_id: str
    domain: str | None
    overhead: Overhead
    devices: dict[str, Device]
    known_as: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.known_as.add(self.node_id)

    def occupied_w(self, bounds_w: dict[str, float]) -> float:
        """Node watts with its GPUs at these limits."""
        gpu_w = sum(max(bounds_w[uuid], device.floor_w) for uuid, device in self.devices.items())
        return (1.0 + self.overhead.b) * gpu_w + self.overhead.a_w

    def info(self) -> NodeInfo:
        """How an agent describes it now."""
        gpus = tuple(ManagedGpu(d.uuid, d.min_w, d.max_w, d.limit_w, d.floor_w) for d in self.devices.values())
        return NodeInfo(self.node_id, gpus, self.domain, self.overhead)


@dataclass
class Claim:
    """An agent's claim of the GPUs that its ranks hold."""

    replica_id: str
    session: int
    limits_w: dict[str, float]


@dataclass
class Goodbye:
    """An agent's last report."""

    report: AgentReport


class Agent:
    """One agent: the real core, on devices that answer at once."""

    def __init__(self, world: World, replica_id: str, host: Host, num_gpus: int, uuids: tuple[str, ...] = ()) -> None:
        self.world = world
        self.replica_id = replica_id
        self.host = host
        self.num_gpus = num_gpus
        self.alive = True
        self.clock_s = 0.0
        self.core = AgentCore(replica_id, host.node_id, num_gpus, ReplicaController(num_gpus))
        self.core.managed = {
            uuid: NodeGpu(GpuInfo(uuid, "", d.min_w, d.max_w, Provenance.MODELLED), d.limit_w, 0.0, True, ())
            for uuid, d in host.devices.items()
        }
        self.uuids: tuple[str, ...] = ()
        if uuids:
            self.hold(uuids)

    @property
    def now_s(self) -> float:
        """Its own monotonic clock, whatever that is worth."""
        return self.world.now_s + self.clock_s

    @property
    def session(self) -> int:
        """The session that a manager has given it."""
        return self.core.session

    def hold(self, uuids: tuple[str, ...]) -> None:
        """Its replica's ranks hold these GPUs."""
        self.uuids = uuids
        self.do(self.core.claimed(uuids, MAX_BATCH, self.now_s))

    def speak(self) -> None:
        """Two beats: one of two is told the manager; hello until a session is given."""
        if not self.core.session:
            self.do(self.core.beat_due(None, self.now_s), tells=False)
            self.do(self.core.greet(self.now_s))
            return
        self.do(self.core.beat_due(None, self.now_s), tells=False)
        self.tell()
        if self.uuids and self.core.terms is None:
            self.world.to_managers(self, Claim(self.replica_id, self.core.session, self.core.limits_w))

    def tell(self) -> None:
        """Send a beat."""
        self.world.to_managers(self, self.core.beat())

    def do(self, commands: tuple[agent_commands.Command, ...], *, tells: bool = True) -> None:
        """Carry its core's commands out."""
        for command in commands:
            match command:
                case agent_commands.ReadLimits(uuids):
                    read_w = {uuid: self.host.devices[uuid].limit_w for uuid in uuids}
                    self.do(self.core.limits_read(read_w, self.now_s), tells=tells)
                case agent_commands.SetLimits(limits_w):
                    self.do(self.core.limits_set(self.set(limits_w), self.now_s), tells=tells)
                case agent_commands.SetGroupCap(now_w, cap_w):
                    self.do(self.core.limits_set(self.set(dict.fromkeys(now_w, cap_w)), self.now_s), tells=tells)
                case agent_commands.SayHello(hello):
                    self.world.to_managers(self, (hello, self.host.info()))
                case agent_commands.SendBeat() if tells:
                    self.tell()

    def set(self, limits_w: Mapping[str, float]) -> dict[str, float]:
        """Order limits; what is in force then."""
        for uuid, limit_w in limits_w.items():
            self.host.devices[uuid].set(limit_w)
        return {uuid: self.host.devices[uuid].limit_w for uuid in limits_w}

    def key(self) -> tuple[int, int]:
        """(epoch, seq) of the grant in hand."""
        grant = self.core._lease.grant
        return (grant.epoch, grant.seq) if grant else (0, 0)

    def newer(self, grant: Grant | None) -> bool:
        """Whether a grant is one to obey, by the rules and not by the code under test."""
        return (
            grant is not None and grant.epoch >= self.core._lease.fence_epoch and (grant.epoch, grant.seq) > self.key()
        )

    def hear(self, message: Answer | Grant | ParkOrder) -> None:
        """Obey a message, or not."""
        core = self.core
        before_w, may_rise = core.allowed_cap_w, True
        if isinstance(message, Answer):
            may_rise = self.newer(message.reply.grant)
            self.do(core.answered(message, self.now_s))
        elif isinstance(message, Grant):
            may_rise = self.newer(message)
            self.do(core.granted(message, self.now_s))
        else:
            self.do(core.park_ordered(message, self.now_s))
        if not may_rise and before_w:
            ensure(core.allowed_cap_w <= before_w + 1e-9, f"a late or repeated message raised a cap: {message}")

    def stop(self) -> None:
        """Replica and agent are gone."""
        self.alive = False
        self.world.stopped.add(self.replica_id)

    def leave(self) -> None:
        """Lower its GPUs, say goodbye and end."""
        self.do(self.core.replica_gone(self.now_s))
        self.world.to_managers(self, Goodbye(self.core.report()))
        self.stop()


@dataclass
class Disk:
    """What managers have written down."""

    record: FleetRecord
    budget_w: float
    domains: tuple[Domain, ...]
    slow: bool = False


class Manager:
    """A manager: the real core, on a disk that may be slow while others act."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.clock_s = 1000.0
        self.sent: dict[str, Grant] = {}
        self.asked = self.on_disk = 0
        self.writing: tuple[int, FleetRecord] | None = None
        #: What goes once the disk has what was asked before it.
        self.later: list[tuple[int, Callable[[], None]]] = []
        disk = world.disk
        disk.record = replace(disk.record, epoch=disk.record.epoch + 1)
        self.core = ManagerCore(disk.record)
        self.wishes_w = [0]
        deployment = Deployment(
            budget_w=disk.budget_w,
            policy_name="wishes",
            policy=self.wished,
            models={"m": DeployedModel(Target())},
            ledger=world.config,
            domains=disk.domains,
            fail_safe_cap_w=FAIL_SAFE_W,
        )
        self.core.open(deployment, disk.budget_w, self.now_s)
        self.core.registry.restore(disk.record.agents, self.now_s)

    @property
    def now_s(self) -> float:
        """Its own monotonic clock."""
        return self.world.now_s + self.clock_s

    @property
    def ledger(self) -> Ledger:
        """Its ledger."""
        return self.core.ledger

    def do(self, commands: tuple[manager_commands.Command, ...]) -> None:
        """Carry its core's commands out."""
        for command in commands:
            match command:
                case manager_commands.PushGrant(grant):
                    self.note_sent(grant)
                    self.world.to_agent(grant.replica_id, grant)
                case manager_commands.PushParking(order):
                    self.world.to_agent(order.executor, order)
                case manager_commands.WriteState(number):
                    self.asked = number
                    if not self.world.disk.slow:
                        self.write_all()
                case manager_commands.WhenWritten(rest):
                    self.when_written(partial(self.do, rest))
                case manager_commands.RaiseAt():
                    self.do(self.core.raise_released(self.now_s))

    def when_written(self, go: Callable[[], None]) -> None:
        """Have this done once the disk has all that was asked so far."""
        if self.on_disk >= self.asked:
            go()
        else:
            self.later.append((self.asked, go))

    def write(self) -> None:
        """The disk begins a write, or ends the one under way; a newer manager's file is left alone."""
        disk = self.world.disk
        if self.writing is None:
            if self.on_disk < self.asked:
                self.writing = self.asked, self.core.record
        elif disk.record.epoch == self.writing[1].epoch:
            self.on_disk, disk.record = self.writing
            self.writing = None
            self.core.written(self.on_disk)
            covered = [go for number, go in self.later if number <= self.on_disk]
            self.later = [entry for entry in self.later if entry[0] > self.on_disk]
            for go in covered:
                go()

    def write_all(self) -> None:
        """The disk is quick."""
        while self.on_disk < self.asked and self.world.disk.record.epoch == self.core.record.epoch:
            self.write()

    def note_sent(self, grant: Grant) -> None:
        """Remember the newest grant that an agent was sent."""
        before = self.sent.get(grant.replica_id)
        if before is None or grant.seq > before.seq:
            self.sent[grant.replica_id] = grant

    def answer(self, agent: Agent, answer: Answer, commands: tuple[manager_commands.Command, ...]) -> None:
        """Answer an agent."""
        reply = answer.reply

        def go() -> None:
            if agent.alive:
                if reply.grant is not None:
                    self.note_sent(reply.grant)
                if reply.terms is not None:
                    self.world.terms[agent.replica_id] = reply.terms
                self.world.network.append((agent, answer))

        self.do(commands)
        self.when_written(go)

    def divide(self, wishes_w: list[int]) -> None:
        """Divide as these wishes say."""
        self.wishes_w = wishes_w
        self.do(self.core.divide(self.now_s))

    def wished(self, snapshot: FleetSnapshot, models: object) -> dict[str, Share]:
        """A policy that asks for anything at all."""
        return {
            row.replica_id: Share(float(self.wishes_w[number % len(self.wishes_w)] * row.num_gpus), "wanted")
            for number, row in enumerate(snapshot.replicas)
        }

    def hear(self, sender: Agent, message: object) -> None:
        """Pass a message on to the core."""
        core = self.core
        try:
            if isinstance(message, Beat):
                self.answer(sender, *core.heard(message, self.now_s))
            elif isinstance(message, Claim):
                spec = replace(spec_of(sender), gpus=sender.uuids)
                self.answer(sender, *core.claim(spec, message.session, message.limits_w, self.now_s))
            elif isinstance(message, Goodbye):
                self.do(core.left(message.report, self.now_s))
            else:
                hello, info = message  # type: ignore[misc]
                core.add_node(info, self.now_s)
                answer, commands = core.hello(hello, self.now_s)
                if answer.reply.session:
                    core.registry.take_in(spec_of(sender), (), None, self.now_s)
                self.answer(sender, answer, commands)
        except GpuHeldError as error:
            if error.holder not in self.world.agents or not self.world.agents[error.holder].alive:
                self.bury(error.holder)
        except (StaleEpochError, LedgerError, InfeasibleBudget):
            pass

    def bury(self, replica_id: str) -> None:
        """A replica is gone for certain, and said no goodbye."""
        self.do(self.core.left(AgentReport(replica_id, 0, 0, 0, (0, 0), {}), self.now_s))


def spec_of(agent: Agent) -> ReplicaSpec:
    """What a manager knows an agent's replica by."""
    return ReplicaSpec(agent.replica_id, "m", agent.num_gpus, agent.host.node_id, max_batch=MAX_BATCH)


class World:
    """Hosts, agents, managers, and the messages between them."""

    config = LedgerConfig(reserve_w=20.0)

    def __init__(self, hosts: Iterable[Host], budget_w: float, domains: tuple[Domain, ...]) -> None:
        self.now_s = 0.0
        self.hosts = list(hosts)
        self.agents: dict[str, Agent] = {}
        self.stopped: set[str] = set()
        self.switched_off: set[str] = set()
        self.disk = Disk(FleetRecord(), budget_w, domains)
        self.managers = [Manager(self)]
        self.network: list[tuple[Agent | Manager, object]] = []
        self.replicas_made = 0
        self.reach_w: dict[str, float] = {}
        self.terms: dict[str, ChargeTerms] = {}
        self.last_w: dict[str | None, float] = dict.fromkeys([None, *(domain.name for domain in domains)], math.inf)
        self.counted: set[Host] = set()
        self.joined: set[Host] = set()
        self.check()

    # -- messages --------------------------------------------------------------------------------------------------

    @property
    def manager(self) -> Manager:
        """The manager in charge; any before it in the list are old ones that do not know it."""
        return self.managers[-1]

    def to_managers(self, sender: Agent, message: object) -> None:
        """Send to every manager that lives: agents cannot tell an old one."""
        self.network.extend((manager, (sender, message)) for manager in self.managers)

    def to_agent(self, replica_id: str, message: object) -> None:
        """Send to a replica's agent."""
        agent = self.agents.get(replica_id)
        if agent is not None and agent.alive:
            self.network.append((agent, message))

    def deliver(self, index: int, *, keep: bool = False) -> None:
        """Deliver any message under way; `keep` it to be delivered again."""
        receiver, message = self.network[index] if keep else self.network.pop(index)
        if isinstance(receiver, Manager):
            if receiver in self.managers:
                receiver.hear(*message)  # type: ignore[misc]
        elif receiver.alive:
            receiver.hear(message)  # type: ignore[arg-type]

    def deliver_all(self) -> None:
        """Deliver all that is under way now, in order, answers not included."""
        for _ in range(len(self.network)):
            self.deliver(0)

    # -- replicas --------------------------------------------------------------------------------------------------

    def living(self) -> list[Agent]:
        """Agents that live."""
        return [agent for agent in self.agents.values() if agent.alive]

    def unheld(self, host: Host) -> list[str]:
        """GPUs that no running replica holds, as the raylet sees it."""
        held = {uuid for name, agent in self.agents.items() if name not in self.stopped for uuid in agent.uuids}
        return [uuid for uuid in host.devices if uuid not in held]

    def start_replica(self, host: Host, num_gpus: int) -> Agent:
        """A new replica's agent appears."""
        self.replicas_made += 1
        agent = Agent(self, f"r{self.replicas_made}", host, num_gpus)
        self.agents[agent.replica_id] = agent
        agent.speak()
        return agent

    def start_engine(self, agent: Agent) -> None:
        """A replica's ranks take GPUs, once the manager lets its engine start and there are any."""
        unheld = self.unheld(agent.host)
        if agent.alive and not agent.uuids and agent.session and len(unheld) >= agent.num_gpus:
            ready, _ = self.manager.ledger.may_start(agent.replica_id, self.manager.now_s)
            if ready:
                agent.hold(tuple(unheld[: agent.num_gpus]))

    def replace_agent(self, agent: Agent) -> None:
        """A dead agent's replica gets another one, which knows nothing but the GPUs."""
        self.agents[agent.replica_id] = Agent(self, agent.replica_id, agent.host, agent.num_gpus, agent.uuids)

    def count_out(self) -> None:
        """The manager learns which nodes are gone for good; again, if one before it wrote nothing of it down."""
        manager = self.manager
        for node_id in self.switched_off & {view.node_id for view in manager.ledger.nodes()}:
            manager.do(manager.core.node_gone(node_id))

    def bury(self) -> None:
        """The manager learns which replicas are gone for certain."""
        for view in self.manager.ledger.replicas(self.manager.now_s):
            if view.replica_id in self.stopped and not self.agents[view.replica_id].alive:
                self.manager.bury(view.replica_id)

    # -- what is true ----------------------------------------------------------------------------------------------

    def budget_w(self, domain: str | None) -> float:
        """The budget in charge, less the reserve."""
        if domain is None:
            return self.disk.budget_w - self.config.reserve_w
        return next(entry.budget_w for entry in self.disk.domains if entry.name == domain)

    def in_domain(self, host: Host, domain: str | None) -> bool:
        """Whether a host's watts count in a domain."""
        names = {entry.name: entry.parent for entry in self.disk.domains}
        at = host.domain
        while at is not None and at != domain:
            at = names[at]
        return at == domain

    def agent_reach_w(self, agent: Agent) -> float:
        """The highest cap that an agent may set without any further decision of a manager."""
        coming = [message for receiver, message in self.network if receiver is agent]
        replies = [message.reply for message in coming if isinstance(message, Answer)]
        # An agent that replaced another may take a grant before it has the terms, and act on it when they come.
        terms = agent.core.terms or self.terms.get(agent.replica_id)
        if terms is None:
            return 0.0
        grants = [*(reply.grant for reply in replies), *(message for message in coming if isinstance(message, Grant))]
        # A grant that was lost is sent again with the answer to the next report.
        grants += [manager.sent.get(agent.replica_id) for manager in self.managers if agent.session]
        caps_w = [terms.cap_w(grant.charge_w) for grant in grants if grant is not None and agent.newer(grant)]
        lease = agent.core._lease
        held = lease.grant
        held_w = agent.core.allowed_cap_w
        # A grant in hand is acted on once terms are there. One whose lease has ended keeps its watts: its manager does
        # not know yet, and whatever it sends next may restore as much, until the agent obeys another manager.
        if held is not None and (agent.core.terms is None or (lease.expired and lease.fence_epoch == held.epoch)):
            held_w = max(held_w, terms.cap_w(held.charge_w))
        return max([held_w, *caps_w])

    def potential_w(self, host: Host) -> float:
        """Node watts that a host has, or may get by what is under way."""
        return host.occupied_w({uuid: self.reach_w[uuid] for uuid in host.devices})

    def look(self) -> None:
        """Find out what every GPU has or may get."""
        self.reach_w = {device.uuid: device.in_band_w for host in self.hosts for device in host.devices.values()}
        for agent in self.living():
            if agent.uuids:
                reach_w = self.agent_reach_w(agent)
                for uuid in agent.uuids:
                    self.reach_w[uuid] = max(self.reach_w[uuid], reach_w)

    def check(self) -> None:
        """No watts rise above a budget: what has come down to it stays, what is above it only falls."""
        self.look()
        ledger = self.manager.ledger
        nodes = ledger.nodes()
        names = {view.node_id for view in nodes}
        # Once a manager has taken a host in, its watts count, whether a later manager remembers it or not.
        counted = [host for host in self.hosts if host.known_as & names or host in self.counted]
        joined = {host for host in self.hosts if any(view.joined and view.node_id in host.known_as for view in nodes)}
        for domain, before_w in self.last_w.items():
            inside = [host for host in counted if self.in_domain(host, domain)]
            true_w = sum(host.occupied_w({u: d.limit_w for u, d in host.devices.items()}) for host in inside)
            total_w = sum(self.potential_w(host) for host in inside)
            # A host that joins brings the limits it was found with; it is inside the budget once its GPUs are parked.
            found_w = sum(self.potential_w(host) for host in inside if host not in self.counted)
            joins = any(self.in_domain(host, domain) for host in joined - self.joined)
            allowed_w = self.budget_w(domain) if joins else max(self.budget_w(domain), before_w + found_w)
            ensure(true_w <= total_w + SLACK_W, f"{true_w} W in force where {total_w} W are possible in {domain}")
            ensure(total_w <= allowed_w + SLACK_W, f"{total_w:.3f} W in {domain} where {allowed_w:.3f} W are allowed")
            self.last_w[domain] = total_w
            self.check_reservations(domain, total_w)
        self.counted, self.joined = set(counted), joined

    def check_reservations(self, domain: str | None, total_w: float) -> None:
        """The ledger in charge reserves at least what is possible."""
        reserved_w = self.manager.ledger.reserved_w(domain)
        ensure(reserved_w >= total_w - SLACK_W, f"{reserved_w:.3f} W reserved for {total_w:.3f} W in {domain}")
