"""The ledger makes the budget hard: it lowers first, waits for the limits in force, and raises only then.

Pure: no I/O and no clock (`now_s` is the manager's monotonic clock); one owner, not thread-safe. How it is used:

- A manager opens a `Ledger` with an epoch larger than any before, and with the `memo` that the last one saved.
- A node's first agent calls `add_node`: its GPUs are charged as found and ordered to their lowest limits.
- Every agent says `hello` when it starts, replaces a dead one or meets a new manager. A reply without a session (0)
  means: obey no epoch below the reply's, read the limits and say hello again. `may_start` says when its engine may
  start, and `claim` gives it the GPUs that its ranks hold.
- On every beat the agent sends a `report`, whose reply renews its lease and repairs orders that were lost on the way.
- On every beat the manager calls `plan` with the policy's shares, and `plan(None, ...)` for the last shares whenever a
  report has set `raise_due`. `set_budget` cuts at once; `in_force` says whether every limit has come down to it.
- `leave` ends a replica whose agent has stopped for good; `node_lost` and `node_gone` say what became of a node.

Before anything is sent, replies included, `memo` has to be on disk if `unsaved` says so, together with the epoch and
only while no larger epoch is there; then the manager calls `saved`. This lets the next manager charge replicas in full
that it cannot reach, and keeps two managers from both raising. Cuts alone need not wait for the disk, because what is
on it charges their agents no less. But a cut of a replica whose raise waits for the disk waits too, unless it `lowers`
the limits in force. Then `Commands` are sent: cuts and raises to their agents, park orders to their `executor`.

On each GPU of a replica the ledger reserves the highest of the limit last read there and the caps of all grants that
its agent may still act on, which are those not yet superseded by one that it has confirmed. Silence changes nothing. A
lost node keeps its charge until someone who knows says that it is gone, or until a new node shows the same GPUs.

The module is longer than others because it is the ledger's whole interface; the parts beside it do the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pals_ray.control.charge import EPS_W
from pals_ray.control.ledger import feasible_charges, membership, saved_state
from pals_ray.control.ledger.feasible_charges import LedgerConfig
from pals_ray.control.ledger.gpu_parking import GpuParking, is_order_due
from pals_ray.control.ledger.grants import GrantIssuer
from pals_ray.control.ledger.ledger_queries import LedgerQueries
from pals_ray.control.ledger.reservations import Node, Replica, domain_name, readings_w
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
        """`known` is the last manager's memo. Nothing rises until all its agents reported or `rebuild_s` passed."""
        super().__init__(config, budget_w, domains)
        self.epoch = epoch
        self.raise_due = False
        self._grants = GrantIssuer(self._reservations, epoch, config.lease_s, config.least_raise_w)
        self._parking = GpuParking(self._reservations, epoch, config.silent_s)
        self._sessions = 0
        self._shares: Mapping[str, Share] | None = None
        #: The epoch of a newer manager that agents obey: then this ledger must not be used any more.
        self.superseded_by: int | None = None
        saved_state.restore(self._reservations, known, epoch, now_s, config.lease_s)
        self._rebuild_until_s: float | None = now_s + config.rebuild_s if self._reservations.replicas else None
        self._unrecorded_until_s: float | None = None

    # -- nodes ---------------------------------------------------------------------------------------------------

    def add_node(self, info: NodeInfo, now_s: float) -> None:
        """Take a node's GPUs into the budget; a known node is left as it is.

        Raises `InfeasibleBudget` where its parked charge does not fit even with everyone else at the least,
        `LedgerError` where a GPU belongs to another node whose agents still speak. GPUs of a dead node come back
        with whatever they were charged, until they are confirmed parked.
        """
        if info.node_id in self._reservations.nodes:
            self._reservations.nodes[info.node_id].lost = False
            return
        node, charged_before = membership.admit_node(self._reservations, info, now_s, self.config.silent_s)
        self._parking.park(node, node.free, now_s)
        if not charged_before:
            try:
                self._check_budgets(now_s, f"with the parked GPUs of node {info.node_id}")
            except InfeasibleBudget:
                self._reservations.remove_node(node)
                raise
        self._reservations.unsaved = True

    def node_lost(self, node_id: str) -> None:
        """A node cannot be reached: nothing more is granted there, and all of it stays charged as last known.

        It may be dead or only cut off, and a dead host's GPUs keep their limits. Only a message from one of its agents,
        `add_node` with the same GPUs, or `node_gone` changes that.
        """
        if node_id in self._reservations.nodes:
            self._reservations.nodes[node_id].lost = True

    def node_gone(self, node_id: str) -> None:
        """Forget a node's charge: somebody who knows says that it draws nothing any more (switched off, given back)."""
        if node_id in self._reservations.nodes:
            self._reservations.remove_node(self._reservations.nodes[node_id])
            self._reservations.unsaved = self.raise_due = True

    # -- agents --------------------------------------------------------------------------------------------------

    def hello(self, hello: Hello, now_s: float) -> Reply:
        """Welcome an agent: register its replica, or go on from where the agent or the manager before it stopped.

        The agent before it must be dead, which Ray's actor names ensure. The grant raises no limit: a new replica gets
        its least charge, a known one what all its GPUs have in force. A hello may be late, so it releases no watts
        either; only a report does. Raises `LedgerError` where the node has no free GPUs for it, `StaleEpochError` where
        the agent obeys a newer manager.
        """
        self._heard_epoch(hello.fence_epoch)
        if self.superseded_by is not None:
            raise StaleEpochError(self.epoch, self.superseded_by)
        if hello.fence_epoch < self.epoch:
            return self._reply_to_unknown(f"obey epoch {self.epoch}, read the limits, then say hello again")
        node = self._reservations.nodes.get(hello.node_id)
        if node is None:
            raise LedgerError(f"node {hello.node_id} is unknown: add it first")
        limits_w = readings_w(hello.limits_w)
        replica = self._reservations.replicas.get(hello.replica_id)
        if replica is not None:
            membership.check_same(replica, hello)
        else:
            replica = membership.register(self._reservations, hello, node, self.epoch, self.config.lease_s)
            if limits_w and self._unrecorded_until_s is None:
                # The last manager's memo is lost, and other agents may obey its grants until their leases end.
                self._unrecorded_until_s = now_s + self.config.lease_s
        if limits_w and not replica.gpus:
            try:
                membership.assign_gpus(self._reservations, replica, limits_w)
            except LedgerError:
                if replica.session == 0:
                    self._reservations.remove_replica(replica)
                raise
        self._sessions += 1
        replica.session, replica.number, replica.heard_s = self._sessions, 0, now_s
        node.lost = False
        for gpu in replica.gpus:
            gpu.limit_w = max(gpu.limit_w, limits_w.get(gpu.info.uuid, 0.0))
        replica.add_oldest_order(hello.ceiling_w)
        lowest_w = min((limits_w.get(gpu.info.uuid, gpu.limit_w) for gpu in replica.gpus), default=0.0)
        reason = "taken over at the limits in force" if replica.gpus else "least charge: no GPUs claimed yet"
        self._grants.issue_in_force(replica, now_s, reason, lowest_w)
        self._parking.renew_order(node, now_s)
        self._reservations.unsaved = True
        return self._reply(replica, "welcome", now_s)

    def may_start(self, replica_id: str, now_s: float) -> tuple[bool, str]:
        """Whether a replica's engine may start: its node's free GPUs have to be parked inside the budget first."""
        replica = self._reservations.replicas.get(replica_id)
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

        It can be raised only after this. Raises `GpuHeldError` where one belongs to another replica, `LedgerError`
        where it is not a managed GPU of the node, or the GPUs cannot have one common cap.
        """
        replica = self._reservations.replicas.get(replica_id)
        if replica is None or replica.session != session:
            return self._reply_to_unknown("say hello first"), Commands(reason="an unknown agent claims GPUs")
        replica.heard_s = now_s
        if replica.gpus:
            membership.check_held(replica, limits_w, "claims")
        else:
            membership.assign_gpus(self._reservations, replica, limits_w)
            self._grants.issue(replica, replica.terms.least_charge_w, "least charge: its GPUs are claimed", now_s)
            self._parking.renew_order(replica.node, now_s)
            self._reservations.unsaved = True
        parks = self._parks([replica.node], now_s)
        return self._reply(replica, "claimed", now_s), Commands(parks=parks, reason=f"{replica_id} claimed its GPUs")

    def report(self, report: AgentReport, now_s: float) -> Reply:
        """Note what is in force. Reports that are late, repeated or from unknown agents change nothing."""
        self._heard_epoch(report.fence_epoch)
        replica = self._reservations.replicas.get(report.replica_id)
        if replica is None or replica.session != report.session:
            return self._reply_to_unknown("unknown to this manager: fence, read the limits and say hello")
        if report.number <= replica.number:
            return self._reply(replica, "late or repeated report: ignored", now_s)
        node = replica.node
        confirmed, reserved_w = replica.confirmed, replica.reserved_w + node.parked_w
        replica.number, replica.heard_s, node.lost = report.number, now_s, False
        self._grants.note_report(replica, report, now_s)
        self._parking.note_report(node, report, now_s)
        self._settle(node, now_s)
        released = replica.reserved_w + node.parked_w < reserved_w - EPS_W or replica.confirmed > confirmed
        self.raise_due = self.raise_due or (released and bool(self._waiting))
        expired = report.expired and report.obeyed == (self.epoch, replica.grant.seq)
        if expired and self.superseded_by is None and not self.rebuilding(now_s)[0]:
            self._grants.renew_expired(replica, now_s)
        return self._reply(replica, "noted", now_s)

    def leave(self, replica_id: str, now_s: float, goodbye: AgentReport | None = None) -> Commands:
        """Remove a replica. Call this only when it is certain that its agent will never set a limit again.

        Until another agent of the node has parked its GPUs, they are charged what the agent's last report (`goodbye`)
        read, or else the highest limit that they may have.
        """
        replica = self._reservations.replicas.get(replica_id)
        if replica is None:
            return Commands(reason=f"replica {replica_id} is not known: nothing to do")
        node, gpus = replica.node, list(replica.gpus)
        self._reservations.remove_replica(replica)
        if goodbye is not None and goodbye.session == replica.session != 0 and goodbye.number > replica.number:
            limits_w = readings_w(goodbye.limits_w)
            for gpu in gpus:
                gpu.limit_w = limits_w.get(gpu.info.uuid, gpu.limit_w)
        self._waiting.pop(replica_id, None)
        self._parking.park(node, gpus, now_s)
        self._reservations.unsaved = True
        self.raise_due = self.raise_due or bool(self._waiting)
        return Commands(parks=self._parks([node], now_s), reason=f"{replica_id} left: its GPUs are to be parked")

    # -- decisions -----------------------------------------------------------------------------------------------

    def plan(self, shares: Mapping[str, Share] | None, now_s: float) -> Commands:
        """Order the policy's shares (None: the last ones): cuts at once, raises out of watts that are free now.

        Shares that do not fit are shrunk. Raises are tried in the order of `shares` and may be partial; the rest waits
        for reports that confirm a release (`raise_due`), or for the next call.
        """
        if shares is not None:
            self._shares = dict(shares)
        if self.superseded_by is not None:
            return Commands(reason=f"a manager of epoch {self.superseded_by} is in charge")
        self._reservations.resum()
        rebuilding, reason = self.rebuilding(now_s)
        self.raise_due, self._waiting = False, {}
        cuts, raises = [], []
        for want in feasible_charges.wanted_charges(
            self._reservations, self._shares, now_s, self.config, keep=rebuilding
        ):
            if want.replica.session == 0:
                # Of what the last manager granted only an upper bound is known: less than that could still be a raise.
                self._waiting[want.replica.replica_id] = "its agent has not been heard since this manager started"
            elif want.target_w < want.replica.grant.charge_w - EPS_W:
                cuts.append(self._grants.issue(want.replica, want.target_w, want.reason, now_s, want.share))
            elif not rebuilding:
                grant, why_not = self._grants.raise_towards(want, now_s)
                if grant is not None:
                    raises.append(grant)
                if why_not is not None:
                    self._waiting[want.replica.replica_id] = why_not
        for node in self._reservations.nodes.values():
            self._settle(node, now_s)
            self._parking.renew_order(node, now_s)
        if not rebuilding:
            reason = f"{len(cuts)} cuts, {len(raises)} raises, {len(self._waiting)} waiting"
        return Commands(tuple(cuts), tuple(raises), self._parks(self._reservations.nodes.values(), now_s), reason)

    def set_budget(self, budget_w: float, now_s: float, domain: str | None = None) -> Commands:
        """Change the fleet's budget (reserve included), or a domain's (less its reserve), W, and cut at once.

        Raises `InfeasibleBudget` with the watts needed where it cannot be kept, `LedgerError` where it is not a number
        of watts or the domain is unknown; nothing changes then.
        """
        if domain not in self._reservations.budgets_w:
            raise LedgerError(f"no domain {domain!r}; there are: {sorted(self._reservations.domains) or 'none'}")
        if not (math.isfinite(budget_w) and budget_w > 0.0):
            raise LedgerError(f"a budget is a positive number of watts, not {budget_w}")
        before_w = self._reservations.budgets_w[domain]
        self._reservations.budgets_w[domain] = budget_w - (self.config.reserve_w if domain is None else 0.0)
        try:
            self._check_budgets(now_s, "with everything at its lowest cap", domain)
        except InfeasibleBudget:
            self._reservations.budgets_w[domain] = before_w
            raise
        if domain is None:
            self.budget_w = budget_w
        return self.plan(None, now_s)

    # -- for the next manager ------------------------------------------------------------------------------------

    def rebuilding(self, now_s: float) -> tuple[bool, str]:
        """Whether agents of the last manager have yet to report, and why: until then nothing rises or is parked."""
        if self._unrecorded_until_s is not None and now_s < self._unrecorded_until_s:
            left_s = self._unrecorded_until_s - now_s
            return True, f"rebuilding without a record of who was granted what: for {left_s:.1f} s, until leases end"
        if self._rebuild_until_s is None:
            return False, "rebuilt"
        missing = [name for name, replica in self._reservations.replicas.items() if replica.session == 0]
        if missing and now_s < self._rebuild_until_s:
            return True, f"rebuilding: {len(missing)} replicas not heard yet ({', '.join(missing[:5])})"
        self._rebuild_until_s = None
        return False, "rebuilt"

    @property
    def unsaved(self) -> bool:
        """Whether the `memo` must be written to disk before anything more is sent."""
        return self._reservations.unsaved

    def memo(self) -> tuple[NodeMemo, ...]:
        """What to write to disk; once it is there, call `saved`."""
        return saved_state.memo(self._reservations)

    def saved(self) -> None:
        """Note that the memo is on disk, where no larger epoch was, or that only cuts are sent before it is.

        Where writing failed, neither call this nor send anything.
        """
        self._reservations.unsaved = False

    # -- how -----------------------------------------------------------------------------------------------------

    def _heard_epoch(self, fence_epoch: int) -> None:
        if fence_epoch > self.epoch:
            self.superseded_by = max(self.superseded_by or 0, fence_epoch)

    def _reply_to_unknown(self, reason: str) -> Reply:
        return Reply(self.epoch, 0, None, (), None, None, reason)

    def _reply(self, replica: Replica, reason: str, now_s: float) -> Reply:
        uuids = tuple(gpu.info.uuid for gpu in replica.gpus)
        park = next((o for o in self._park_orders([replica.node], now_s) if o.executor == replica.replica_id), None)
        grant = replica.grant if self.superseded_by is None else None
        return Reply(self.epoch, replica.session, grant, uuids, replica.terms if uuids else None, park, reason)

    def _park_orders(self, nodes: Iterable[Node], now_s: float) -> list[ParkOrder]:
        """The park orders that agents are to obey: none before it is known which replica holds which GPU."""
        if self.superseded_by is not None or self.rebuilding(now_s)[0]:
            return []
        return [node.park for node in nodes if node.park is not None]

    def _parks(self, nodes: Iterable[Node], now_s: float) -> tuple[ParkOrder, ...]:
        """Park orders that are not known to be carried out."""
        return tuple(self._park_orders((node for node in nodes if is_order_due(node)), now_s))

    def _settle(self, node: Node, now_s: float) -> None:
        """Let a node join once its GPUs are parked and all of it is within the budgets."""
        if not node.joined and all(gpu.parked for gpu in node.free):
            node.joined = self._reservations.room_w(node) >= -EPS_W or self.unenforced(now_s) is not None

    def _check_budgets(self, now_s: float, what: str, domain: str | None = None) -> None:
        """Raise `InfeasibleBudget` where a budget is under what is needed; `domain` first, then the fleet."""
        needed = feasible_charges.needed_w(self._reservations, now_s, self.config)
        for name in (domain, *reversed(self._reservations.inner_first)):
            reserve_w = self.config.reserve_w if name is None else 0.0
            budget_w = self._reservations.budgets_w[name]
            if needed[name] > budget_w + EPS_W:
                where = f"{what}, in {domain_name(name)}"
                raise InfeasibleBudget(budget_w + reserve_w, needed[name] + reserve_w, where)
