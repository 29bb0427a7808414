"""The budget is hard, whatever happens: any interleaving of changes, failures, and messages lost, late, twice or mixed.

`PALS_FUZZ_S=600 pytest tests/unit/control/test_ledger_machine.py -k fuzz` goes on for that many seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pals_ray.control.agent import agent_core
from pals_ray.control.ledger import feasible_charges, saved_state
from pals_ray.control.ledger.lease import LeaseState, Outcome
from pals_ray.control.ledger.ledger import Ledger
from pals_ray.control.ledger.reservations import Gpu, Replica, Reservations
from pals_ray.control.manager.commands import Command
from pals_ray.control.manager.dispatch import Dispatch
from pals_ray.control.snapshot import Domain, Overhead
from pals_ray.errors import InfeasibleBudget
from pals_ray.types import Grant

from .ledger_world import Agent, BrokenError, Device, Host, Manager, World, ensure

STEPS_PER_RUN = 100
RUNS = 280

PICKS = st.integers(0, 10_000)
WISHES_W = st.lists(st.integers(50, 500), min_size=1, max_size=5)


class LedgerMachine(RuleBasedStateMachine):
    """Everything that may happen to a fleet, one event a step."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    # -- the fleet -------------------------------------------------------------------------------------------------

    @initialize(
        overhead=st.sampled_from([Overhead(), Overhead(30.0, 0.05)]),
        floor_w=st.sampled_from([0.0, 120.0]),
        slack_w=st.integers(0, 900),
        domain_slack_w=st.integers(0, 600),
        wishes_w=WISHES_W,
    )
    def start(self, overhead: Overhead, floor_w: float, slack_w: int, domain_slack_w: int, wishes_w: list[int]) -> None:
        """Two hosts in a rack, one outside, and three replicas that run."""
        hosts = [
            Host(
                f"n{number}",
                domain,
                overhead,
                {f"g{number}{letter}": Device(f"g{number}{letter}", 400.0, floor_w=floor_w) for letter in "abc"[:gpus]},
            )
            for number, (domain, gpus) in enumerate([("row", 3), ("rack", 2), (None, 2)])
        ]
        least_w = {host: host.occupied_w(dict.fromkeys(host.devices, 100.0)) for host in hosts}
        rack_w = least_w[hosts[0]] + least_w[hosts[1]] + domain_slack_w
        domains = (Domain("rack", rack_w), Domain("row", least_w[hosts[0]] + domain_slack_w * 0.7, "rack"))
        world = World(hosts, sum(least_w.values()) + 20.0 + slack_w, domains)
        self.world = world
        for host, gpus in ((hosts[0], 2), (hosts[1], 1), (hosts[2], 1)):
            world.start_replica(host, gpus)
        self.rounds(4, wishes_w)

    def rounds(self, count: int, wishes_w: list[int], silent: Agent | None = None) -> None:
        """Beats on a good network, of all agents but one."""
        world = self.world
        for _ in range(count):
            world.now_s += 0.5
            for agent in (agent for agent in world.living() if agent is not silent):
                world.start_engine(agent)
                agent.speak()
            while world.network:
                world.deliver(0)
                world.check()
            manager = world.manager
            manager.divide(wishes_w)
            world.check()

    def agent(self, pick: int) -> Agent:
        """Any living agent."""
        living = self.world.living()
        return living[pick % len(living)]

    # -- what happens ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.network)
    @rule(pick=PICKS, keep=st.booleans())
    def deliver_any(self, pick: int, keep: bool) -> None:
        """A message arrives out of order, perhaps to arrive again."""
        self.world.deliver(pick % len(self.world.network), keep=keep)

    @precondition(lambda self: self.world.network)
    @rule()
    def deliver_all(self) -> None:
        """What is under way arrives."""
        self.world.deliver_all()

    @precondition(lambda self: self.world.network)
    @rule(pick=PICKS)
    def lose_message(self, pick: int) -> None:
        """A message is lost."""
        self.world.network.pop(pick % len(self.world.network))

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS, seconds=st.sampled_from([0.1, 0.5, 2.0]))
    def beat(self, pick: int, seconds: float) -> None:
        """One agent beats."""
        self.world.now_s += seconds
        self.agent(pick).speak()

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0, 20.0]))
    def all_beat(self, seconds: float) -> None:
        """Every agent beats."""
        self.world.now_s += seconds
        for agent in self.world.living():
            self.world.start_engine(agent)
            agent.speak()

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS, wishes_w=WISHES_W)
    def one_is_silent(self, pick: int, wishes_w: list[int]) -> None:
        """One agent is not heard for a while, nor does anything reach it; all others beat."""
        silent = self.agent(pick)
        self.world.network = [entry for entry in self.world.network if entry[0] is not silent]
        self.world.now_s += 3.0
        self.rounds(2, wishes_w, silent)

    @rule(pick=PICKS, wishes_w=WISHES_W)
    def plan(self, pick: int, wishes_w: list[int]) -> None:
        """A manager divides, perhaps an old one."""
        manager = self.world.managers[pick % len(self.world.managers)]
        manager.divide(wishes_w)

    @rule(slack_w=st.integers(-50, 900), domain=st.sampled_from([None, None, "rack", "row"]))
    def set_budget(self, slack_w: int, domain: str | None) -> None:
        """The budget of the fleet or a domain changes; what cannot be kept is refused with what is needed."""
        world, ledger = self.world, self.world.manager.ledger
        needed_w = ledger.needed_w(world.manager.now_s, domain)
        asked_w = needed_w + slack_w
        if asked_w <= 0.0:
            return
        outer = domain is not None and ledger.needed_w(world.manager.now_s) > world.disk.budget_w
        manager = world.manager
        try:
            if domain is None:
                commands = manager.core.set_budget(asked_w, manager.now_s)
            else:
                commands = manager.core._send(ledger.set_budget(asked_w, manager.now_s, domain))
        except InfeasibleBudget as error:
            ensure(slack_w < 0 or error.needed_w > error.asked_w, f"{asked_w} W refused, {needed_w} W needed: {error}")
            return
        ensure(slack_w >= 0 and not outer, f"{asked_w} W accepted where {needed_w} W are needed")
        if domain is None:
            world.disk.budget_w = asked_w
        world.disk.domains = ledger.domains()
        manager.do(commands)

    # -- who comes and goes ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.world.living()) < 6 and self.world.hosts)
    @rule(pick=PICKS, gpus=st.integers(1, 2))
    def replica_comes(self, pick: int, gpus: int) -> None:
        """Serve starts a replica somewhere."""
        self.world.start_replica(self.world.hosts[pick % len(self.world.hosts)], gpus)

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS)
    def replica_goes(self, pick: int) -> None:
        """A replica ends; its agent says goodbye."""
        self.agent(pick).leave()

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS)
    def replica_dies(self, pick: int) -> None:
        """Replica and agent die without a word."""
        self.agent(pick).stop()

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS)
    def agent_dies(self, pick: int) -> None:
        """An agent dies; its replica runs on."""
        self.agent(pick).alive = False

    @rule()
    def agents_are_replaced(self) -> None:
        """Dead agents of running replicas get successors."""
        world = self.world
        for name, agent in list(world.agents.items()):
            if not agent.alive and name not in world.stopped:
                world.replace_agent(agent)

    @rule()
    def deaths_are_learnt(self) -> None:
        """The manager hears which nodes and replicas are gone."""
        self.world.count_out()
        self.world.bury()

    @rule(old_lives=st.booleans())
    def manager_restarts(self, old_lives: bool) -> None:
        """Another manager takes over; the old one may live on without knowing."""
        world = self.world
        if not old_lives:
            world.managers.clear()
        world.managers[:-1] = []
        world.managers.append(Manager(world))

    # -- what goes wrong -------------------------------------------------------------------------------------------

    @rule(slow=st.booleans())
    def disk_is_slow(self, slow: bool) -> None:
        """The managers' disk begins or ceases to be slow."""
        self.world.disk.slow = slow
        if not slow:
            for manager in self.world.managers:
                manager.write_all()

    @precondition(lambda self: self.world.disk.slow)
    @rule(pick=PICKS)
    def slow_disk_goes_on(self, pick: int) -> None:
        """A slow disk begins a manager's next write, or has done the one before."""
        self.world.managers[pick % len(self.world.managers)].write()

    @precondition(lambda self: self.world.living())
    @rule(pick=PICKS, jump_s=st.sampled_from([-100.0, -1.0, 4.0, 1000.0]))
    def agent_clock_jumps(self, pick: int, jump_s: float) -> None:
        """An agent's clock jumps."""
        self.agent(pick).clock_s += jump_s

    @rule(jump_s=st.sampled_from([-100.0, -1.0, 4.0, 1000.0]))
    def manager_clock_jumps(self, jump_s: float) -> None:
        """The manager's clock jumps."""
        self.world.manager.clock_s += jump_s

    @precondition(lambda self: self.world.hosts)
    @rule(pick=PICKS)
    def calls_fail(self, pick: int) -> None:
        """Calls to set a GPU's limit begin or cease to fail."""
        devices = [device for host in self.world.hosts for device in host.devices.values()]
        device = devices[pick % len(devices)]
        # What a failed call left in band cannot be seen under a limit set out of band: whoever lifts that one raises.
        if device.out_of_band_w == float("inf"):
            device.failing = not device.failing

    @precondition(lambda self: self.world.hosts)
    @rule(pick=PICKS, limit_w=st.sampled_from([120.0, 250.0, float("inf")]))
    def limited_out_of_band(self, pick: int, limit_w: float) -> None:
        """Somebody limits a GPU out of band, or lets go of it."""
        devices = [device for host in self.world.hosts for device in host.devices.values()]
        device = devices[pick % len(devices)]
        if not device.failing:
            device.out_of_band_w = limit_w

    @precondition(lambda self: self.world.hosts)
    @rule(pick=PICKS)
    def node_is_suspected(self, pick: int) -> None:
        """A node is taken for lost; perhaps it is not."""
        self.world.manager.core.node_lost(self.world.hosts[pick % len(self.world.hosts)].node_id)

    @precondition(lambda self: len(self.world.hosts) > 1)
    @rule(pick=PICKS)
    def host_dies(self, pick: int) -> None:
        """All of ours on a host dies at once; its GPUs keep their limits. Later Ray starts there again."""
        world = self.world
        host = world.hosts[pick % len(world.hosts)]
        for agent in world.agents.values():
            if agent.host is host:
                agent.stop()
        world.manager.core.node_lost(host.node_id)
        host.node_id += "'"
        host.known_as.add(host.node_id)

    @precondition(lambda self: len(self.world.hosts) > 2)
    @rule(pick=PICKS)
    def host_is_switched_off(self, pick: int) -> None:
        """A host on which nothing of ours runs is switched off, and the manager learns of it."""
        world = self.world
        host = world.hosts[pick % len(world.hosts)]
        running = [agent for name, agent in world.agents.items() if name not in world.stopped]
        if all(agent.host is not host for agent in running):
            world.hosts.remove(host)
            world.switched_off.update(host.known_as)
            world.count_out()

    @rule(wishes_w=WISHES_W)
    def all_is_well_again(self, wishes_w: list[int]) -> None:
        """Once faults end, everything settles: within the budget, every grant in force, nobody waiting."""
        world = self.world
        for host in world.hosts:
            for device in host.devices.values():
                device.failing, device.out_of_band_w = False, float("inf")
        del world.managers[:-1]
        self.disk_is_slow(slow=False)
        self.agents_are_replaced()
        self.rounds(3, wishes_w)
        self.deaths_are_learnt()
        for host in world.hosts:
            if all(agent.host is not host for agent in world.living()):
                world.start_replica(host, 1)
        world.now_s += world.config.rebuild_s
        self.rounds(7, wishes_w)
        for agent in world.living():
            agent.speak()
        world.deliver_all()
        ledger = world.manager.ledger
        lost = {view.node_id for view in ledger.nodes() if view.lost}
        state = ledger.in_force(world.manager.now_s)
        ensure(bool(lost) or state.value, f"after all is well: {state}")
        for view in ledger.replicas(world.manager.now_s):
            agent = world.agents[view.replica_id]
            if agent.alive and view.uuids:
                ensure(view.confirmed, f"after all is well: {view}")
                limits_w = {agent.host.devices[uuid].in_band_w for uuid in view.uuids}
                ensure(len(limits_w) == 1, f"caps differ within {view.replica_id}: {limits_w}")
        commands = ledger.plan(None, world.manager.now_s)
        ensure(not (commands.cuts or commands.raises or commands.parks), f"never at rest: {commands}")

    @invariant()
    def the_budget_holds(self) -> None:
        """Checked after every step."""
        type(self).steps += 1
        if self.world is not None:
            self.world.check()


def run(machine: type[LedgerMachine], runs: int, *, derandomize: bool = True, shrink: bool = True) -> None:
    """Run a machine that many times."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS_PER_RUN,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.exhaustive
def test_the_budget_holds_whatever_happens() -> None:
    LedgerMachine.steps = 0
    run(LedgerMachine, RUNS)
    print(f"{LedgerMachine.steps} steps")
    assert LedgerMachine.steps >= 20_000


@pytest.mark.skipif("PALS_FUZZ_S" not in os.environ, reason="PALS_FUZZ_S says for how many seconds to go on")
@pytest.mark.timeout(0)
def test_fuzz() -> None:
    LedgerMachine.steps = 0
    ends_s = time.monotonic() + float(os.environ["PALS_FUZZ_S"])
    while time.monotonic() < ends_s:
        run(LedgerMachine, 50, derandomize=False)
        print(f"{LedgerMachine.steps} steps, {ends_s - time.monotonic():.0f} s to go", flush=True)


# -- seeded defects: each changes one function, and the machine must see it by what is true, not by the ledger -------


def raise_before_confirm(replica: Replica, gpu: Gpu) -> float:
    """Replica.bound_w: an order is taken for done."""
    return replica.orders[-1][1] if replica.orders else gpu.limit_w


def forget_the_silent(replica: Replica, now_s: float, silent_s: float, confirm_s: float) -> str | None:
    """planning.why_fixed: who has not been heard for long is no longer charged."""
    reason = WHY_FIXED(replica, now_s, silent_s, confirm_s)
    if reason is not None and "silent" in reason:
        for gpu in replica.gpus:
            gpu.limit_w = 0.0
        replica.orders = []
    return reason


def obey_old_numbers(state: LeaseState, grant: Grant, now_s: float) -> tuple[LeaseState, Outcome, str]:
    """lease.accept: any grant of the present manager is obeyed, however old."""
    if grant.epoch < state.fence_epoch:
        return state, Outcome.IGNORE, "older manager"
    return replace(state, grant=grant, ends_s=now_s + grant.lease_s, seen_s=now_s, fail_safe_w=None), Outcome.OBEY, ""


def obey_old_managers(state: LeaseState, epoch: int) -> LeaseState:
    """lease.fence: an agent that heard a new manager still obeys the old one."""
    return state


def restart_from_nothing(*args: object) -> None:
    """rebuild.restore: a new manager starts from nothing."""


def leave_without_confirmation(accounts: Reservations, replica: Replica) -> None:
    """Reservations.remove_replica: GPUs count as parked as soon as their replica has left."""
    orders, replica.orders = replica.orders, []
    for gpu in replica.gpus:
        gpu.limit_w = gpu.info.min_limit_w
    REMOVE_REPLICA(accounts, replica)
    replica.orders = orders


def raises_go_before_the_disk(dispatch: Dispatch, ledger: Ledger) -> tuple[Command, ...]:
    """Dispatch.write: nothing is written down, and nobody waits for the disk."""
    ledger.saved()
    return ()


WHY_FIXED = feasible_charges.why_fixed
REMOVE_REPLICA = Reservations.remove_replica


@pytest.mark.parametrize(
    ("owner", "name", "defect"),
    [
        (Replica, "bound_w", raise_before_confirm),
        (feasible_charges, "why_fixed", forget_the_silent),
        (agent_core, "accept", obey_old_numbers),
        (agent_core, "fence", obey_old_managers),
        (saved_state, "restore", restart_from_nothing),
        (Reservations, "remove_replica", leave_without_confirmation),
        (Dispatch, "write", raises_go_before_the_disk),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.exhaustive
def test_a_seeded_defect_is_found(
    owner: object, name: str, defect: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, defect)
    monkeypatch.setattr(World, "check_reservations", lambda self, domain, total_w: None)
    LedgerMachine.steps = 0
    with pytest.raises(BrokenError):
        run(LedgerMachine, 5 * RUNS, shrink=False)  # it stops at the first; one in forty needs as many as RUNS
    print(f"found within {LedgerMachine.steps} steps")
