"""A fleet in miniature for the ledger's tests: GPUs that hold limits, agents, managers with a disk, a bad network.

What is true here is kept apart from what a ledger believes: `World.potential_w` is what the GPUs have in force, or may
yet get by the messages under way without any further decision of a manager.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from pals_ray.control.ledger.charge import ChargeTerms
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.lease import LeaseState, Outcome, accept, ceiling_w, fence, tick
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.messages import (
    AgentReport,
    Commands,
    GpuHeldError,
    Hello,
    LedgerError,
    ManagedGpu,
    NodeInfo,
    NodeMemo,
    ParkOrder,
    Reply,
    StaleEpochError,
)
from pals_ray.control.snapshot import Domain, Overhead, Share
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import Grant

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


@dataclass(eq=False)
class Agent:
    """One agent, as the runtime's is meant to be: one order at a time, limits read after they were set."""

    world: World
    replica_id: str
    host: Host
    num_gpus: int
    uuids: tuple[str, ...] = ()
    alive: bool = True
    lease: LeaseState = field(default_factory=LeaseState)
    terms: ChargeTerms | None = None
    park: ParkOrder | None = None
    session: int = 0
    number: int = 0
    clock_s: float = 0.0
    applied: tuple[int, int] = (0, 0)

    @property
    def now_s(self) -> float:
        """Its own monotonic clock, whatever that is worth."""
        return self.world.now_s + self.clock_s

    def key(self) -> tuple[int, int]:
        """(epoch, seq) of the grant in hand."""
        return (self.lease.grant.epoch, self.lease.grant.seq) if self.lease.grant else (0, 0)

    def ceiling_w(self) -> float:
        """The cap that it may go up to now; 0 without a grant that it could turn into one."""
        if self.terms is None:
            return 0.0
        return ceiling_w(self.lease, self.terms)[0] or 0.0

    def limits_w(self) -> dict[str, float]:
        """Limits in force of its own GPUs."""
        return {uuid: self.host.devices[uuid].limit_w for uuid in self.uuids}

    def apply(self) -> None:
        """Let the lease age and bring all GPUs to what it allows."""
        if self.uuids:
            in_force_w = min(self.limits_w().values())
            self.lease, _ = tick(self.lease, self.now_s, in_force_w=in_force_w, fail_safe_w=FAIL_SAFE_W)
        if self.ceiling_w():
            for uuid in self.uuids:
                self.host.devices[uuid].set(self.ceiling_w())
        if self.park is not None:
            for uuid, limit_w in self.park.limits_w.items():
                if self.host.devices[uuid].in_band_w > limit_w:
                    self.host.devices[uuid].set(limit_w)
        self.applied = self.key()

    def report(self) -> AgentReport:
        """What it finds in force."""
        self.number += 1
        parked = self.park.limits_w if self.park else {}
        return AgentReport(
            replica_id=self.replica_id,
            session=self.session,
            number=self.number,
            fence_epoch=self.lease.fence_epoch,
            obeyed=self.applied,
            limits_w=self.limits_w(),
            parking=(self.park.epoch, self.park.seq) if self.park else (0, 0),
            parked_w={uuid: self.host.devices[uuid].limit_w for uuid in parked},
            expired=self.lease.expired,
        )

    def speak(self) -> None:
        """One beat: set, read, report; hello until a session is given."""
        self.apply()
        if not self.session:
            hello = Hello(
                replica_id=self.replica_id,
                node_id=self.host.node_id,
                num_gpus=self.num_gpus,
                fence_epoch=self.lease.fence_epoch,
                limits_w=self.limits_w(),
                ceiling_w=self.ceiling_w(),
            )
            self.world.to_managers(self, (hello, self.host.info()))
            return
        self.world.to_managers(self, self.report())
        if self.uuids and self.terms is None:
            self.world.to_managers(self, Claim(self.replica_id, self.session, self.limits_w()))

    def newer(self, grant: Grant | None) -> bool:
        """Whether a grant is one to obey, by the rules and not by the code under test."""
        return grant is not None and grant.epoch >= self.lease.fence_epoch and (grant.epoch, grant.seq) > self.key()

    def hear(self, message: Reply | Grant | ParkOrder) -> None:
        """Obey a message, or not."""
        before_w, may_rise = self.ceiling_w(), True
        if isinstance(message, Reply):
            if message.epoch < self.lease.fence_epoch:
                return
            fenced = message.epoch > self.lease.fence_epoch
            self.lease = fence(self.lease, message.epoch)
            if message.session == 0 or fenced:
                self.session = 0
                if message.session == 0:
                    return
            if message.session < self.session:
                return
            if message.session > self.session:
                self.session, self.number = message.session, 0
            self.terms, self.park = message.terms or self.terms, message.park
            may_rise = self.newer(message.grant)
            if message.grant is not None:
                self.take(message.grant)
        elif isinstance(message, Grant):
            may_rise = self.newer(message)
            self.take(message)
        elif self.park is None or (message.epoch, message.seq) > (self.park.epoch, self.park.seq):
            self.park = message
            self.apply()
        if not may_rise and before_w:
            ensure(self.ceiling_w() <= before_w + 1e-9, f"a late or repeated message raised a cap: {message}")

    def take(self, grant: Grant) -> None:
        """A grant that reached it."""
        self.lease, outcome, _ = accept(self.lease, grant, self.now_s)
        if outcome is Outcome.OBEY:
            self.apply()

    def stop(self) -> None:
        """Replica and agent are gone."""
        self.alive = False
        self.world.stopped.add(self.replica_id)

    def leave(self) -> None:
        """Lower its GPUs, say goodbye and end."""
        self.lease = replace(self.lease, grant=None)
        for uuid in self.uuids:
            self.host.devices[uuid].set(self.host.devices[uuid].min_w)
        self.applied = (0, 0)
        self.world.to_managers(self, Goodbye(self.report()))
        self.stop()


@dataclass
class Disk:
    """What managers have written down."""

    epoch: int
    budget_w: float
    domains: tuple[Domain, ...]
    memos: tuple[NodeMemo, ...] = ()
    slow: bool = False


class Manager:
    """A manager around a ledger, reduced to what concerns the budget. Others act while its disk is slow."""

    def __init__(self, world: World, ledger_class: type[Ledger]) -> None:
        self.world = world
        self.clock_s = 1000.0
        self.sent: dict[str, Grant] = {}
        self.noted = False
        self.writing: tuple[NodeMemo, ...] | None = None
        #: What goes once the disk has what was noted; so much of it with the write that is under way.
        self.later: list[Callable[[], None]] = []
        self.covered = 0
        disk = world.disk
        disk.epoch += 1
        self.ledger = ledger_class(
            world.config,
            epoch=disk.epoch,
            budget_w=disk.budget_w,
            domains=disk.domains,
            known=disk.memos,
            now_s=self.now_s,
        )

    @property
    def now_s(self) -> float:
        """Its own monotonic clock."""
        return self.world.now_s + self.clock_s

    @property
    def is_written(self) -> bool:
        """Whether nothing that was noted is still to be written."""
        return not self.noted and self.writing is None

    def when_written(self, go: Callable[[], None]) -> None:
        """Have this done once the disk has all that is to outlive this manager."""
        if self.ledger.unsaved:
            self.noted = True
            self.ledger.saved()
        if self.is_written:
            go()
            return
        self.later.append(go)
        if not self.world.disk.slow:
            self.write_all()

    def write(self) -> None:
        """The disk begins a write, or ends the one under way; a newer manager's file is left alone."""
        if self.writing is None:
            if self.noted:
                self.noted, self.writing, self.covered = False, self.ledger.memo(), len(self.later)
        elif self.world.disk.epoch == self.ledger.epoch:
            self.world.disk.memos, self.writing = self.writing, None
            covered, self.later = self.later[: self.covered], self.later[self.covered :]
            for go in covered:
                go()

    def write_all(self) -> None:
        """The disk is quick."""
        while not self.is_written and self.world.disk.epoch == self.ledger.epoch:
            self.write()

    def send(self, commands: Commands) -> None:
        """Push orders to agents: those at once that need not wait for the disk."""
        at_once = [grant for grant in commands.cuts if self.is_written or self.ledger.lowers(grant)]
        self.push(at_once)
        grants = [grant for grant in (*commands.cuts, *commands.raises) if grant not in at_once]

        def go() -> None:
            self.push(grants)
            for order in commands.parks:
                self.world.to_agent(order.executor, order)

        self.when_written(go)

    def push(self, grants: Iterable[Grant]) -> None:
        """Push grants to their agents."""
        for grant in grants:
            self.note_sent(grant)
            self.world.to_agent(grant.replica_id, grant)

    def note_sent(self, grant: Grant) -> None:
        """Remember the newest grant that an agent was sent."""
        before = self.sent.get(grant.replica_id)
        if before is None or grant.seq > before.seq:
            self.sent[grant.replica_id] = grant

    def answer(self, agent: Agent, reply: Reply) -> None:
        """Answer an agent."""

        def go() -> None:
            if agent.alive:
                if reply.grant is not None:
                    self.note_sent(reply.grant)
                if reply.terms is not None:
                    self.world.terms[agent.replica_id] = reply.terms
                self.world.network.append((agent, reply))

        self.when_written(go)

    def hear(self, sender: Agent, message: object) -> None:
        """Pass a message on to the ledger."""
        ledger = self.ledger
        try:
            if isinstance(message, AgentReport):
                self.answer(sender, ledger.report(message, self.now_s))
                if ledger.raise_due:
                    self.send(ledger.plan(None, self.now_s))
            elif isinstance(message, Claim):
                reply, commands = ledger.claim(message.replica_id, message.session, message.limits_w, self.now_s)
                self.answer(sender, reply)
                self.send(commands)
            elif isinstance(message, Goodbye):
                self.send(ledger.leave(message.report.replica_id, self.now_s, message.report))
            else:
                hello, info = message  # type: ignore[misc]
                ledger.add_node(info, self.now_s)
                self.answer(sender, ledger.hello(hello, self.now_s))
        except GpuHeldError as error:
            if error.holder not in self.world.agents or not self.world.agents[error.holder].alive:
                self.send(ledger.leave(error.holder, self.now_s))
        except (StaleEpochError, LedgerError, InfeasibleBudget):
            pass


class World:
    """Hosts, agents, managers, and the messages between them."""

    config = LedgerConfig(reserve_w=20.0)

    def __init__(
        self, hosts: Iterable[Host], budget_w: float, domains: tuple[Domain, ...], ledger: type[Ledger]
    ) -> None:
        self.now_s = 0.0
        self.hosts = list(hosts)
        self.agents: dict[str, Agent] = {}
        self.stopped: set[str] = set()
        self.switched_off: set[str] = set()
        self.disk = Disk(0, budget_w, domains)
        self.ledger_class = ledger
        self.managers = [Manager(self, ledger)]
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
                agent.uuids = tuple(unheld[: agent.num_gpus])

    def replace_agent(self, agent: Agent) -> None:
        """A dead agent's replica gets another one, which knows nothing but the GPUs."""
        self.agents[agent.replica_id] = Agent(self, agent.replica_id, agent.host, agent.num_gpus, agent.uuids)

    def count_out(self) -> None:
        """The manager learns which nodes are gone for good; again, if one before it wrote nothing of it down."""
        ledger = self.manager.ledger
        for node_id in self.switched_off & {view.node_id for view in ledger.nodes()}:
            ledger.node_gone(node_id)
        self.manager.when_written(lambda: None)

    def bury(self) -> None:
        """The manager learns which replicas are gone for certain."""
        for view in self.manager.ledger.replicas(self.manager.now_s):
            if view.replica_id in self.stopped and not self.agents[view.replica_id].alive:
                self.manager.send(self.manager.ledger.leave(view.replica_id, self.manager.now_s))

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
        replies = [message for message in coming if isinstance(message, Reply)]
        # An agent that replaced another may take a grant before it has the terms, and act on it when they come.
        terms = agent.terms or self.terms.get(agent.replica_id)
        if terms is None:
            return 0.0
        grants = [*(reply.grant for reply in replies), *(message for message in coming if isinstance(message, Grant))]
        # A grant that was lost is sent again with the answer to the next report.
        grants += [manager.sent.get(agent.replica_id) for manager in self.managers if agent.session]
        caps_w = [terms.cap_w(grant.charge_w) for grant in grants if grant is not None and agent.newer(grant)]
        held = agent.lease.grant
        held_w = agent.ceiling_w()
        # A grant in hand is acted on once terms are there. One whose lease has ended keeps its watts: its manager does
        # not know yet, and whatever it sends next may restore as much, until the agent obeys another manager.
        if held is not None and (
            agent.terms is None or (agent.lease.expired and agent.lease.fence_epoch == held.epoch)
        ):
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
            self.check_books(domain, total_w)
        self.counted, self.joined = set(counted), joined

    def check_books(self, domain: str | None, total_w: float) -> None:
        """The ledger in charge reserves at least what is possible."""
        reserved_w = self.manager.ledger.reserved_w(domain)
        ensure(reserved_w >= total_w - SLACK_W, f"{reserved_w:.3f} W on the books for {total_w:.3f} W in {domain}")


def shares_for(ledger: Ledger, now_s: float, wishes_w: list[int]) -> dict[str, Share]:
    """A policy that asks for anything at all."""
    views = [view for view in ledger.replicas(now_s) if view.uuids]
    return {
        view.replica_id: Share(float(wishes_w[number % len(wishes_w)] * view.num_gpus), "wanted")
        for number, view in enumerate(views)
    }
