"""Step cost for the simulator's hot loop: the formulas of `step_cost`, about ten times faster and within 0.1 %.

`GroupPhysics.group_step` bisects the clock of every rank. This solves only two clocks by secants, that of the slowest
die and that of the mean of all others, starting from the clocks of the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

from pals_ray.models.physics.step_cost import LEAST_DUTY, GroupPhysics

#: Relative error of dynamic power at which the search stops; as fine as the bisection in `step_cost`.
_TOLERANCE = 1e-4
_SECANTS = 6
_MOST_TURNS = 20
#: First guess of the exponent of dynamic power in the clock, between memory- and compute-bound work.
_EXPONENT = 2.0
_LEAST_SLOPE = 0.2


class GroupStepper(GroupPhysics):
    """`GroupPhysics` on known dies. It remembers the last clocks, so each replica needs its own.

    Where draw hardly changes with the clock (B200 below the knee of its fabric), several clocks draw what the cap
    allows, and this may find another one than the bisection does.
    """

    def __init__(self, physics: GroupPhysics, dies: Sequence[float]) -> None:
        """`dies` holds each rank's factor on dynamic power (`die_factor`)."""
        super().__init__(physics.gpu, physics.model, physics.parallelism, physics.constants)
        n = len(dies)
        self.num_gpus = n
        self._slowest = max(dies)
        self._rest = (sum(dies) - self._slowest) / (n - 1) if n > 1 else 0.0
        self._idle_w = self.gpu.idle_context_w
        self._guess = [-0.3, -0.3]  # logs

    def step(  # type: ignore[override]
        self, prefill: float, context: float, seqs: float, kv: float, cap_w: float
    ) -> tuple[float, float, float]:
        """Duration, s, of a step under one effective cap per GPU, W; mean draw of the group, W; the share of its GPUs
        whose clock the cap holds down. The work is that of `StepWork`."""
        needs = self._needs(prefill, context, seqs, kv)
        goal_w = cap_w * (1.0 - self.constants.cap_margin) - self._idle_w
        duration_s, dynamic_w, binding = self._solve(needs, goal_w / self._slowest, 0)
        power_w = self._idle_w + self._slowest * dynamic_w
        if self.num_gpus == 1:
            return duration_s, power_w, binding
        others = self.num_gpus - 1
        own_s, other_w, also = self._solve(needs, goal_w / self._rest, 1)
        # Faster ranks wait for the slowest at their idle draw.
        power_w += others * (self._idle_w + self._rest * other_w * own_s / duration_s)
        return duration_s, power_w, (binding + others * also) / self.num_gpus

    def _solve(
        self, needs: tuple[float, float, float, float, float, float], goal_w: float, which: int
    ) -> tuple[float, float, float]:
        """Duration, s, dynamic watts of a die of factor 1, and whether the goal holds the clock down (1 or 0)."""
        peak_memory, peak_compute, fixed, memory, compute, occupancy = needs
        c = self.constants
        sharp, overlap, exponent, kept = c.fabric_sharpness, c.overlap, c.clock_exponent - 1.0, c.voltage_floor
        knee, bend, join = c.fabric_knee, 1.0 / c.fabric_sharpness, 1.0 / c.overlap
        latency_s = self._latency_s
        memory_s = peak_memory / c.memory_efficiency / self._fabric_norm
        compute_s = peak_compute / c.compute_efficiency
        base_w, dram_j = self._active_w, memory * self._dram_w
        clock_w = self._busy_w + occupancy * self._occupancy_w
        chip_j = compute * self._compute_w + memory * self._fabric_w

        def at(clock: float) -> tuple[float, float]:
            fabric = (1.0 + (knee / clock) ** sharp) ** bend
            busy_s = ((memory_s * fabric) ** overlap + (compute_s / clock) ** overlap) ** join
            duration_s = fixed + latency_s / clock + busy_s
            per_cycle = kept + (1.0 - kept) * clock**exponent
            return duration_s, base_w + per_cycle * (clock_w * clock + chip_j / duration_s) + dram_j / duration_s

        duration_s, watts = at(1.0)
        if watts <= goal_w:
            return duration_s, watts, 0.0
        # Secants on logs, where dynamic power is nearly a straight line of the clock, kept inside a bracket.
        goal, floor = log(max(goal_w, 1e-9)), log(self.clock_floor)
        low, high, last, last_off = floor, 0.0, 0.0, log(watts) - goal
        clock = max(self._guess[which], floor)
        for turn in range(_MOST_TURNS):
            duration_s, watts = at(exp(clock))
            off = log(watts) - goal
            if -_TOLERANCE < off < _TOLERANCE:
                break
            if clock == floor and off > 0.0:
                if self.gpu.pulses_clock:
                    duty = max(goal_w / watts, LEAST_DUTY)
                    duration_s, watts = duration_s / duty, watts * duty
                break
            if off > 0.0:
                high = clock
            else:
                low = clock
            slope = (off - last_off) / (clock - last) if clock != last else _EXPONENT
            last, last_off = clock, off
            clock -= off / slope if slope > _LEAST_SLOPE else off / _EXPONENT
            if clock <= floor:
                clock = floor
            elif turn >= _SECANTS or not low < clock < high:
                clock = 0.5 * (low + high)
        self._guess[which] = min(clock, -1e-3)
        return duration_s, watts, 1.0
