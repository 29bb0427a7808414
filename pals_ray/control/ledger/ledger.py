"""The ledger: what makes the budget hard. It lowers first, waits for the limits in force, and only then raises.

Pure: no I/O, no clock (`now_s` is the manager's monotonic clock); one owner, not thread-safe. The calls in order:

    ledger = Ledger(config, epoch=e, budget_w=2400, domains=(), known=memos_on_disk, now_s=t)   # e: larger than ever

    # A node's first agent: its GPUs are charged as found, and ordered to their lowest limits.
    ledger.add_node(NodeInfo(...), t)                      # InfeasibleBudget: no room for its parked charge
    # Every agent at its start, again after a new manager, or when it replaces another (the agent before it is dead).
    reply = ledger.hello(Hello(...), t)                    # reply.session == 0: fence to reply.epoch, hello again
    ok, reason = ledger.may_start(replica_id, t)           # may its engine start?
    reply, commands = ledger.claim(replica_id, reply.session, {uuid: limit_w}, t)   # the ranks' GPUs, now its own

    reply = ledger.report(AgentReport(...), t)             # every beat, after every change; the reply renews the lease
    commands = ledger.plan(shares, t)                      # every beat with the policy's shares; plan(None, t), the
                                                           # last shares, when a report left `ledger.raise_due` set
    commands = ledger.set_budget(450, t)                   # cuts at once, InfeasibleBudget says what is needed
    ledger.in_force(t)                                     # has every limit come down to it?
    commands = ledger.leave(replica_id, t, goodbye)        # its agent has stopped for good
    ledger.node_lost(node_id); ledger.node_gone(node_id)

Before anything is sent, replies included: `if ledger.unsaved: write(ledger.memo()); ledger.saved()`, together with the
epoch, and only while no larger epoch is on disk; where that fails nothing is sent. It lets the next manager charge in
full whoever it cannot reach, and stops two managers from both raising. Then push `commands.cuts` to their agents,
`commands.raises`, and `commands.parks` to the agents of their `executor`. The reply to the next report repairs a lost
push. Cuts alone need not wait for the disk: what is on it charges their agents no less. But while a raise waits for it,
a cut of the same replica does too, unless it `lowers` what is in force.

What is reserved for a replica is, on each GPU, the highest of the limit last read there and the caps of all grants
that its agent may still act on: those not yet superseded by one that it has confirmed. Silence changes nothing. A
lost node keeps its charge until someone who knows says that it is gone, or until a new node shows the same GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pals_ray.control.charge import EPS_W
from pals_ray.control.ledger import feasible_charges, gpu_parking, membership, saved_state
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.grants import GrantIssuer
from pals_ray.control.ledger.ledger_queries import LedgerQueries
from pals_ray.control.ledger.reservations import Node, Replica, readings_w
from pals_ray.control.messages import (
    AgentReport,
    Commands,
    Hello,
    LedgerError,
    NodeInfo,
    NodeMemo,
    ParkOrder,
    Reply,
    StaleEpochError,
)
from pals_ray.control.snapshot import Domain, Share
from pals_ray.errors import InfeasibleBudget


class Ledger(LedgerQueries):
    """Grants watts so that what is reserved, silent replicas and parked GPUs included, is within every budget."""

    def __init__(
        self,
        config: LedgerConfig,
        *,
        epoch: int,
        budget_w: float,
        now_s: float,
        domains: Iterable[Domain] = (),
        known: Iterable[NodeMemo] = (),
    ) -> None:
        """`known` is the memo of the manager before: until all of it is heard, or `rebuild_s` passed, nothing rises."""
        super().__init__(config, budget_w, domains)
        self.epoch = epoch
        self.raise_due = False
        self._granting = GrantIssuer(self._accounts, epoch, config.lease_s, config.least_raise_w)
        self._sessions = 0
        self._shares: Mapping[str, Share] | None = None
        self._superseded_by: int | None = None
        saved_state.restore(self._accounts, known, epoch, now_s, config.lease_s)
        self._rebuild_until_s: float | None = now_s + config.rebuild_s if self._accounts.replicas else None
        self._strangers_until_s: float | None = None

    # -- nodes ---------------------------------------------------------------------------------------------------

    def add_node(self, info: NodeInfo, now_s: float) -> None:
        """Take a node's GPUs into the budget; a known node is left as it is.

        Raises `InfeasibleBudget` where its parked charge does not fit even with everyone else at the least,
        `LedgerError` where a GPU belongs to another node whose agents still speak. GPUs of a dead node come back
        with whatever they were charged, until they are confirmed parked.
        """
        if info.node_id in self._accounts.nodes:
            self._accounts.nodes[info.node_id].lost = False
            return
        node, charged_before = membership.take_over(self._accounts, info, now_s, self.config.silent_s)
        gpu_parking.free(self._accounts, node, node.free, self.epoch, now_s, self.config.silent_s)
        if not charged_before:
            try:
                self._check_budgets(now_s, f"with the parked GPUs of node {info.node_id}")
            except InfeasibleBudget:
                self._accounts.remove_node(node)
                raise
        self._accounts.unsaved = True

    def node_lost(self, node_id: str) -> None:
        """A node cannot be reached. Nothing more is granted there and all of it stays charged as last known.

        Cut off or dead looks the same from here, and a dead host's GPUs keep the limits they had: only a message from
        one of its agents, `add_node` with the same GPUs, or `node_gone` changes that.
        """
        if node_id in self._accounts.nodes:
            self._accounts.nodes[node_id].lost = True

    def node_gone(self, node_id: str) -> None:
        """Somebody who knows says that a node draws nothing any more (switched off, given back): forget its charge."""
        if node_id in self._accounts.nodes:
            self._accounts.remove_node(self._accounts.nodes[node_id])
            self._accounts.unsaved = self.raise_due = True

    # -- agents --------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, now_s: float) -> Reply:
        """Hear a new agent: register its replica, or take up where the agent or the manager before left off.

        The agent before it must be dead (Ray's actor names see to that). What is granted never lifts a limit: a new
        replica gets its least charge, a known one what all its GPUs have in force already. Nor does a hello release
        anything: it may be late, so that takes a report. Raises `LedgerError` where the node has no free GPUs for it,
        `StaleEpochError` where the agent obeys a newer manager.
        """
        self._heard_epoch(hello.fence_epoch)
        if self._superseded_by is not None:
            raise StaleEpochError(self.epoch, self._superseded_by)
        if hello.fence_epoch < self.epoch:
            return self._stranger(f"obey epoch {self.epoch}, read the limits, then say hello again")
        node = self._accounts.nodes.get(hello.node_id)
        if node is None:
            raise LedgerError(f"node {hello.node_id} is unknown: add it first")
        limits_w = readings_w(hello.limits_w)
        replica = self._accounts.replicas.get(hello.replica_id)
        if replica is not None:
            membership.check_same(replica, hello)
        else:
            replica = membership.register(self._accounts, hello, node, self.epoch, self.config.lease_s)
            if limits_w and self._strangers_until_s is None:
                # What the last manager wrote down is lost: others that it granted may obey it until their leases end.
                self._strangers_until_s = now_s + self.config.lease_s
        if limits_w and not replica.gpus:
            try:
                membership.take(self._accounts, replica, limits_w)
            except LedgerError:
                if replica.session == 0:
                    self._accounts.remove_replica(replica)
                raise
        self._sessions += 1
        replica.session, replica.number, replica.heard_s = self._sessions, 0, now_s
        node.lost = False
        for gpu in replica.gpus:
            gpu.limit_w = max(gpu.limit_w, limits_w.get(gpu.info.uuid, 0.0))
        replica.add_oldest_order(hello.ceiling_w)
        lowest_w = min((limits_w.get(gpu.info.uuid, gpu.limit_w) for gpu in replica.gpus), default=0.0)
        reason = "taken over at the limits in force" if replica.gpus else "least charge: no GPUs claimed yet"
        self._granting.adopt(replica, now_s, reason, lowest_w)
        gpu_parking.order(self._accounts, node, self.epoch, now_s, self.config.silent_s)
        self._accounts.unsaved = True
        return self._reply(replica, "welcome", now_s)

    def may_start(self, replica_id: str, now_s: float) -> tuple[bool, str]:
        """Whether a replica's engine may start: not before its node's free GPUs are parked inside the budget."""
        replica = self._accounts.replicas.get(replica_id)
        if replica is None:
            return False, f"replica {replica_id} is not registered"
        rebuilding, reason = self.rebuilding(now_s)
        if rebuilding:
            return False, reason
        self._settle(replica.node, now_s)
        if not replica.node.joined:
            return False, f"the GPUs of node {replica.node.info.node_id} are not yet parked inside the budget"
        return True, "its node's GPUs are parked inside the budget"

    def claim(
        self, replica_id: str, session: int, limits_w: Mapping[str, float], now_s: float
    ) -> tuple[Reply, Commands]:
        """Give a registered replica the free GPUs that its ranks hold, {uuid: limit in force, W}, at the least charge.

        Only after this it can be raised. Raises `GpuHeldError` where one belongs to another replica, `LedgerError`
        where it is not a managed GPU of the node, or the GPUs cannot have one common cap.
        """
        replica = self._accounts.replicas.get(replica_id)
        if replica is None or replica.session != session:
            return self._stranger("say hello first"), Commands(reason="an unknown agent claims GPUs")
        replica.heard_s = now_s
        if replica.gpus:
            membership.check_held(replica, limits_w, "claims")
        else:
            membership.take(self._accounts, replica, limits_w)
            self._granting.issue(replica, replica.terms.least_charge_w, "least charge: its GPUs are claimed", now_s)
            gpu_parking.order(self._accounts, replica.node, self.epoch, now_s, self.config.silent_s)
            self._accounts.unsaved = True
        parks = self._parks([replica.node], now_s)
        return self._reply(replica, "claimed", now_s), Commands(parks=parks, reason=f"{replica_id} claimed its GPUs")

    def report(self, report: AgentReport, now_s: float) -> Reply:
        """Take note of what is in force. Late, repeated and strangers' reports change nothing."""
        self._heard_epoch(report.fence_epoch)
        replica = self._accounts.replicas.get(report.replica_id)
        if replica is None or replica.session != report.session:
            return self._stranger("unknown to this manager: fence, read the limits and say hello")
        if report.number <= replica.number:
            return self._reply(replica, "late or repeated report: ignored", now_s)
        node = replica.node
        confirmed, reserved_w = replica.confirmed, replica.reserved_w + node.parked_w
        replica.number, replica.heard_s, node.lost = report.number, now_s, False
        self._granting.read(replica, report, now_s)
        gpu_parking.read(self._accounts, node, report, self.epoch, now_s)
        self._settle(node, now_s)
        released = replica.reserved_w + node.parked_w < reserved_w - EPS_W or replica.confirmed > confirmed
        self.raise_due = self.raise_due or (released and bool(self._waiting))
        expired = report.expired and report.obeyed == (self.epoch, replica.grant.seq)
        if expired and self._superseded_by is None and not self.rebuilding(now_s)[0]:
            self._granting.renew_expired(replica, now_s)
        return self._reply(replica, "noted", now_s)

    def leave(self, replica_id: str, now_s: float, goodbye: AgentReport | None = None) -> Commands:
        """A replica is gone, and its agent will never set a limit again: say this only when both are certain.

        With the agent's own last report its GPUs are charged what that read, else the highest they may have, until
        another agent of the node has them parked.
        """
        replica = self._accounts.replicas.get(replica_id)
        if replica is None:
            return Commands(reason=f"replica {replica_id} is not known: nothing to do")
        node, gpus = replica.node, list(replica.gpus)
        self._accounts.remove_replica(replica)
        if goodbye is not None and goodbye.session == replica.session != 0 and goodbye.number > replica.number:
            limits_w = readings_w(goodbye.limits_w)
            for gpu in gpus:
                gpu.limit_w = limits_w.get(gpu.info.uuid, gpu.limit_w)
        self._waiting.pop(replica_id, None)
        gpu_parking.free(self._accounts, node, gpus, self.epoch, now_s, self.config.silent_s)
        self._accounts.unsaved = True
        self.raise_due = self.raise_due or bool(self._waiting)
        return Commands(parks=self._parks([node], now_s), reason=f"{replica_id} left: its GPUs are to be parked")

    # -- decisions -----------------------------------------------------------------------------------------------

    def plan(self, shares: Mapping[str, Share] | None, now_s: float) -> Commands:
        """Order the policy's shares (None: the last ones): cuts at once, raises out of watts that are free now.

        Shares that do not fit are squeezed. Raises are tried in the order of `shares` and may be partial; what cannot
        be had yet waits for reports that confirm a release (`raise_due`), or for the next call.
        """
        if shares is not None:
            self._shares = dict(shares)
        if self._superseded_by is not None:
            return Commands(reason=f"a manager of epoch {self._superseded_by} is in charge")
        self._accounts.resum()
        rebuilding, reason = self.rebuilding(now_s)
        self.raise_due, self._waiting = False, {}
        cuts, raises = [], []
        for want in feasible_charges.wanted_charges(self._accounts, self._shares, now_s, self.config, keep=rebuilding):
            if want.replica.session == 0:
                # What the last manager granted is known only by its bound: a cut from there could still be a raise.
                self._waiting[want.replica.replica_id] = "its agent has not been heard since this manager started"
            elif want.target_w < want.replica.grant.charge_w - EPS_W:
                cuts.append(self._granting.issue(want.replica, want.target_w, want.reason, now_s, want.share))
            elif not rebuilding:
                grant, why_not = self._granting.raise_(want, now_s)
                if grant is not None:
                    raises.append(grant)
                if why_not is not None:
                    self._waiting[want.replica.replica_id] = why_not
        for node in self._accounts.nodes.values():
            self._settle(node, now_s)
            gpu_parking.order(self._accounts, node, self.epoch, now_s, self.config.silent_s)
        if not rebuilding:
            reason = f"{len(cuts)} cuts, {len(raises)} raises, {len(self._waiting)} waiting"
        return Commands(tuple(cuts), tuple(raises), self._parks(self._accounts.nodes.values(), now_s), reason)

    def set_budget(self, budget_w: float, now_s: float, domain: str | None = None) -> Commands:
        """Change the fleet's budget (reserve included), or a domain's (less its reserve), W, and cut at once.

        Raises `InfeasibleBudget` with the watts needed where it cannot be kept, `LedgerError` where it is not a number
        of watts or the domain is unknown; nothing changes then.
        """
        if domain not in self._accounts.budgets_w:
            raise LedgerError(f"no domain {domain!r}; there are: {sorted(self._accounts.domains) or 'none'}")
        if not (math.isfinite(budget_w) and budget_w > 0.0):
            raise LedgerError(f"a budget is a positive number of watts, not {budget_w}")
        before_w = self._accounts.budgets_w[domain]
        self._accounts.budgets_w[domain] = budget_w - (self.config.reserve_w if domain is None else 0.0)
        try:
            self._check_budgets(now_s, "with everything at its lowest cap", domain)
        except InfeasibleBudget:
            self._accounts.budgets_w[domain] = before_w
            raise
        if domain is None:
            self._budget_w = budget_w
        return self.plan(None, now_s)

    # -- for the next manager ------------------------------------------------------------------------------------

    def rebuilding(self, now_s: float) -> tuple[bool, str]:
        """Whether agents of the manager before are still to be heard: meanwhile nothing rises, nothing is parked."""
        if self._strangers_until_s is not None and now_s < self._strangers_until_s:
            left_s = self._strangers_until_s - now_s
            return True, f"rebuilding without a record of who was granted what: for {left_s:.1f} s, until leases end"
        if self._rebuild_until_s is None:
            return False, "rebuilt"
        missing = [name for name, replica in self._accounts.replicas.items() if replica.session == 0]
        if missing and now_s < self._rebuild_until_s:
            return True, f"rebuilding: {len(missing)} replicas not heard yet ({', '.join(missing[:5])})"
        self._rebuild_until_s = None
        return False, "rebuilt"

    @property
    def superseded_by(self) -> int | None:
        """The epoch of a newer manager that agents obey, where there is one: this ledger must not be used any more."""
        return self._superseded_by

    @property
    def unsaved(self) -> bool:
        """Whether the `memo` must be written to disk before anything more is sent."""
        return self._accounts.unsaved

    def memo(self) -> tuple[NodeMemo, ...]:
        """What to write to disk; once it is there, call `saved`."""
        return saved_state.memo(self._accounts)

    def saved(self) -> None:
        """The memo is on disk, and no larger epoch was; or nothing is sent before it is, cuts aside.

        Where writing failed, don't call this, and send nothing.
        """
        self._accounts.unsaved = False

    # -- how -----------------------------------------------------------------------------------------------------

    def _heard_epoch(self, fence_epoch: int) -> None:
        if fence_epoch > self.epoch:
            self._superseded_by = max(self._superseded_by or 0, fence_epoch)

    def _stranger(self, reason: str) -> Reply:
        return Reply(self.epoch, 0, None, (), None, None, reason)

    def _reply(self, replica: Replica, reason: str, now_s: float) -> Reply:
        uuids = tuple(gpu.info.uuid for gpu in replica.gpus)
        park = next(
            (order for order in self._held([replica.node], now_s) if order.executor == replica.replica_id), None
        )
        grant = replica.grant if self._superseded_by is None else None
        return Reply(self.epoch, replica.session, grant, uuids, replica.terms if uuids else None, park, reason)

    def _held(self, nodes: Iterable[Node], now_s: float) -> list[ParkOrder]:
        """Park orders that agents are to hold: none before it is known who holds which GPU."""
        if self._superseded_by is not None or self.rebuilding(now_s)[0]:
            return []
        return [node.park for node in nodes if node.park is not None]

    def _parks(self, nodes: Iterable[Node], now_s: float) -> tuple[ParkOrder, ...]:
        """Park orders that are not known to be carried out."""
        return tuple(
            order for order in self._held(nodes, now_s) if gpu_parking.due(self._accounts.nodes[order.node_id])
        )

    def _settle(self, node: Node, now_s: float) -> None:
        """A node joins once its GPUs are parked and all of it is within the budgets."""
        if not node.joined and all(gpu.parked for gpu in node.free):
            node.joined = self._accounts.room_w(node) >= -EPS_W or self.unenforced(now_s) is not None

    def _check_budgets(self, now_s: float, what: str, domain: str | None = None) -> None:
        """`InfeasibleBudget` where a budget is under what is needed; looks at the fleet first, or at `domain`."""
        needed = feasible_charges.needed_w(self._accounts, now_s, self.config)
        for name in (domain, *reversed(self._accounts.inner_first)):
            reserve_w = self.config.reserve_w if name is None else 0.0
            budget_w = self._accounts.budgets_w[name]
            if needed[name] > budget_w + EPS_W:
                where = f"in domain {name}" if name is not None else "in the fleet"
                raise InfeasibleBudget(budget_w + reserve_w, needed[name] + reserve_w, f"{what}, {where}")
