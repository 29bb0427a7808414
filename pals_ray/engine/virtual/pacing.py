"""How long a rank on a virtual GPU waits, so that its steps take as long as on the modelled GPU.

It does not import vLLM, so that tests can use a clock of their own. `pals_ray.engine.virtual.paced_worker` drives it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from pals_ray.engine.control_block import ControlBlock, RecordWriter
from pals_ray.errors import PalsError
from pals_ray.gpus.virtual import VirtualGpu, effective_caps_w
from pals_ray.models.physics.step_cost import GroupPhysics, GroupStep, StepWork, mean_prefill_context

#: Configuration of the paced worker, as JSON; set in the replica's environment before its engine starts.
PACING_VARIABLE = "PALS_PACING"

#: Between steps a busy engine on the CPU pauses for 1 to 3 ms (measured; 7 ms at the 99th percentile). A real GPU does
#: not pause, since its next step is queued ahead. So a step is taken to begin when the last one should have ended, but
#: at most this long ago, s. A longer delay stays a delay, and shows in modelled over wall time.
SHORT_PAUSE_S = 0.010

#: While sequences decode, a longer pause is a delay too, up to this, s. Beyond it somebody has paused the engine.
_HELD_UP_S = 1.0

#: How often a waiting rank looks whether the caps moved, s. A prefill may take a second; a cap acts in milliseconds.
_LOOK_S = 0.010


class PacingError(PalsError):
    """A paced worker without the configuration it needs, or with a layout that the physics doesn't know."""


class PacingConfig(BaseModel, extra="forbid", frozen=True):
    """What a rank must know: the node whose virtual GPUs it uses, the model it stands for, and the time scale."""

    node_key: str
    stands_for: str
    time_scale: float = Field(ge=1, allow_inf_nan=False)

    @classmethod
    def from_environment(cls) -> PacingConfig:
        """Read `PALS_PACING`. Raises `PacingError`."""
        text = os.environ.get(PACING_VARIABLE)
        if text is None:
            raise PacingError(f"PacedWorker needs {PACING_VARIABLE}: the pals_ray LLM server sets it")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PacingError(f"{PACING_VARIABLE} cannot be used: {error}") from error


def step_work(scheduler_output: Any) -> StepWork:
    """What a vLLM `SchedulerOutput` asks for: prompt chunks and recomputed ones are prefill, single tokens decode."""
    scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
    chunks = [(scheduled[new.req_id], new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
    decode_seqs = kv_tokens = 0
    cached = scheduler_output.scheduled_cached_reqs
    for req_id, computed, outputs in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        tokens = scheduled[req_id]
        if outputs == 0 or tokens > 1:
            chunks.append((tokens, computed))
        else:
            decode_seqs += 1
            kv_tokens += computed + 1
    return StepWork(sum(tokens for tokens, _ in chunks), mean_prefill_context(chunks), decode_seqs, kv_tokens)


class Pacer:
    """Stretches one rank's steps and records its GPU's energy; on the first rank it also counts late steps.

    Every rank follows the slowest GPU of the whole group, since vLLM waits for the output rank alone. Modelled times
    are stretched by `time_scale`; watts and the caps' settling are not.
    """

    def __init__(
        self,
        physics: GroupPhysics,
        gpus: Sequence[VirtualGpu],
        rank: int,
        time_scale: float,
        counters: PaceCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._physics = physics
        self._gpus = gpus
        self._dies = [gpu.die for gpu in gpus]
        self._rank = rank
        self._time_scale = time_scale
        self._counters = counters
        self._clock = clock
        self._sleep = sleep
        self._work = StepWork()
        self._caps_w: list[float] = []
        self._start_s = self._due_s = self._ended_s = -math.inf

    def begin(self, work: StepWork) -> None:
        """The rank starts computing a step now."""
        now_s = self._clock()
        # A sequence that decodes was in the last step, so the engine was busy. Prompts alone may find it idle.
        longest_pause_s = _HELD_UP_S if work.decode_seqs > 0 else SHORT_PAUSE_S
        if now_s - self._ended_s <= longest_pause_s:
            self._start_s = max(self._due_s, now_s - SHORT_PAUSE_S)
        else:
            self._start_s = self._ended_s = now_s
        self._work = work
        self._caps_w = effective_caps_w(self._gpus, now_s)
        step = self._group_step()
        self._due_s = self._start_s + step.duration_s * self._time_scale
        self._book(self._start_s, step)

    def end(self) -> None:
        """The rank has computed the step: wait until the modelled GPUs would have, at the caps then in effect."""
        now_s = self._clock()
        late = now_s > self._due_s
        while now_s < self._due_s:
            caps_w = effective_caps_w(self._gpus, now_s)
            if caps_w != self._caps_w:
                self._change_pace(now_s, caps_w)
            self._sleep(min(self._due_s - now_s, _LOOK_S))
            now_s = self._clock()
        if self._counters is not None:
            self._counters.add(late, self._due_s - self._start_s, now_s - self._ended_s)
        self._ended_s = now_s

    def _change_pace(self, now_s: float, caps_w: list[float]) -> None:
        """The rest of the step goes on at other caps."""
        before_s = self._group_step().duration_s
        self._caps_w = caps_w
        step = self._group_step()
        self._due_s = now_s + (self._due_s - now_s) * step.duration_s / before_s
        self._book(now_s, step)

    def _group_step(self) -> GroupStep:
        return self._physics.group_step(self._work, self._caps_w, self._dies)

    def _book(self, from_s: float, step: GroupStep) -> None:
        binding = step.ranks[self._rank].binding
        self._gpus[self._rank].record_step(from_s, self._due_s, step.power_w[self._rank], binding=binding)


class PaceCounters:
    """The paced worker's record in the control block."""

    def __init__(self, block: ControlBlock) -> None:
        self._writer = RecordWriter(block.field("worker_sequence"))
        self._counters = [block.field(name) for name in ("steps", "late_steps", "modelled_s", "wall_s")]

    def add(self, late: bool, modelled_s: float, wall_s: float) -> None:
        """Count one step: whether it was computed too late, how long it should have taken and how long it took."""
        with self._writer:
            for counter, more in zip(self._counters, (1, late, modelled_s, wall_s), strict=True):
                counter[0] += more
