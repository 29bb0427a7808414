"""One replica's engine: continuous batching as vLLM 0.29's V1 scheduler does it, on the virtual silicon.

A step takes all running sequences first, one token each, then chunks of prompts while tokens of its budget are left;
first come first served. A prompt is let in while fewer than the batch limit run and the KV cache holds all of it
(`scheduler_reserve_full_isl`); where running sequences outgrow the cache the last one let in is preempted, and computes
its tokens anew. A lower limit drains.

Between two events decode steps are alike, so a run of them is one jump: no more than `_LONGEST_RUN` (the KV cache
grows meanwhile, by under 1 % of what it holds), cut short by whatever comes in. A step once begun is never changed but
for its pace, when the cap in effect moves.

The module is longer than others because its parts share all state, in a loop that runs millions of times in a run.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import inf

from pals_ray.control.slo import RequestJudge
from pals_ray.models.physics.stepper import GroupStepper
from pals_ray.simulation.engine.energy_meter import Meter
from pals_ray.simulation.engine.group_cap import GroupCap
from pals_ray.simulation.engine.request_log import ModelLog, bucket, fine_bucket
from pals_ray.simulation.setting import SimModel
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry

_LONGEST_RUN = 16


class Engine:
    """Requests are indices into the model's log. Every call takes the time; time never goes back."""

    def __init__(
        self,
        log: ModelLog,
        stepper: GroupStepper,
        meter: Meter,
        model: SimModel,
        *,
        number: int,
        node_factor: float,
        time_scale: float,
    ) -> None:
        """`number` is written into the log as the replica; `node_factor` node watts per GPU watt for the meter."""
        fixed = model.fixed
        self.max_batch = model.max_batch
        self.batch_limit = min(fixed.batch_limit, model.max_batch) if fixed else model.max_batch
        self.cap = GroupCap(fixed.cap_w if fixed else stepper.gpu.min_limit_w, stepper.gpu.max_limit_w)
        self.waiting: deque[int] = deque()
        # Requests that did not fit into the last step begun, as vLLM counts them: without those that came since.
        self.queued = 0
        self.preemptions = self.generated = self.prompted = self.arrived = self.finished = 0
        self.energy_j = self.binding_s = 0.0
        self.ttft_counts, self.tpot_counts, self.itl_counts = ([0] * (len(LATENCY_EDGES_S) + 1) for _ in range(3))
        slo = model.target.slo
        self.judge = RequestJudge(slo.ttft_s or inf, slo.tpot_s or inf)
        self._log = log
        self._stepper = stepper
        self._meter = meter
        self._number = number
        self._step_tokens = model.step_tokens
        self._kv_tokens = model.kv_capacity_tokens
        self._node_factor = node_factor
        self._scale = time_scale
        self._idle_w = stepper.gpu.idle_context_w * stepper.num_gpus
        # Running, in the order they were let in; those whose prompt is not done yet with (computed, of all).
        self._running: dict[int, None] = {}
        self._prefill: dict[int, tuple[int, int]] = {}
        # Decoding: at which step of `_count` each ends, a heap of the same, and their cached tokens together.
        self._ends: dict[int, int] = {}
        self._next_ends: list[tuple[int, int]] = []
        self._count = self._decode_kv = self._reserved_kv = 0
        # Preempted: tokens generated before, and when the last of them came.
        self._resumed: dict[int, tuple[int, float]] = {}
        # The run under way: `_left` steps of `_step_s` each, the first from `_start_s`; `_pace_s` is how long the whole
        # step would take at the present cap. All energy is counted up to `_booked_s`.
        self._left = 0
        self._start_s = self._step_s = self._pace_s = self._booked_s = 0.0
        self._work = (0, 0.0, 0, 0.0)
        # Draw of the group now, W, and the share of its GPUs whose cap holds the clock down.
        self.power_w, self.binding = self._idle_w, 0.0
        self._buckets = (0, 0)
        self._chunks: list[tuple[int, int]] = []
        self._dead = False

    # -- what others call ------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Sequences in the batch, prompts under way included."""
        return len(self._running)

    @property
    def outstanding(self) -> int:
        """Requests that are here and not finished, as of the last `advance`."""
        return len(self._running) + len(self.waiting)

    @property
    def kv_use(self) -> float:
        """Share of the KV cache in use."""
        return self._reserved_kv / self._kv_tokens

    @property
    def quiet_until_s(self) -> float:
        """Nothing ends here before this time, whatever comes in; inf where nothing runs."""
        return min(self._start_s + self._left * self._step_s, self.cap.next_s) if self._left else inf

    def advance(self, now_s: float) -> None:
        """Let time pass: complete all steps that end by `now_s`."""
        while self._left:
            end_s = self._start_s + self._step_s
            look_s = self.cap.next_s
            if look_s <= now_s and look_s < end_s:
                self.cap.look(look_s)
                self._change_pace(look_s)
            elif end_s <= now_s:
                self._complete(now_s)
            else:
                return

    def read(self, now_s: float) -> None:
        """Let time pass, and bring the energy counter up to date."""
        self.advance(now_s)
        self._book(now_s)

    def submit(self, request: int, now_s: float) -> None:
        """Take a request in."""
        self.advance(now_s)
        self._log.replica[request] = self._number
        self.waiting.append(request)
        self.arrived += 1
        self.judge.arrived(request, self._log.arrival_s[request])
        if self._left == 0:
            if not self._dead:
                self._book(now_s)
                self.cap.load_step(now_s)
                self._begin(now_s)
        elif len(self.waiting) == 1 and len(self._running) < self.batch_limit:
            self._left = 1

    def order_cap(self, cap_w: float, now_s: float) -> None:
        """A new power limit is in force on all GPUs from now on, W."""
        self.advance(now_s)
        self.cap.order(cap_w, now_s)
        if self._left:
            if self.binding == 0.0 and cap_w >= self.cap.effective_w:
                self.cap.arrive()
            else:
                self._change_pace(now_s)

    def order_batch_limit(self, limit: int, now_s: float) -> None:
        """A new batch limit for the steps to come; never above the start value."""
        self.advance(now_s)
        raised = limit > self.batch_limit
        self.batch_limit = max(1, min(limit, self.max_batch))
        if raised and self.waiting and self._left > 1:
            self._left = 1

    def telemetry(self, now_s: float) -> EngineTelemetry:
        """What the engine says of itself; `advance` to `now_s` first."""
        self.judge.look(now_s)
        return EngineTelemetry(
            time_s=now_s,
            running=len(self._running),
            waiting=self.queued,
            kv_use=self.kv_use,
            prompt_tokens=self.prompted,
            generation_tokens=self.generated,
            requests_finished=self.finished,
            preemptions=self.preemptions,
            batch_limit=self.batch_limit,
            max_batch=self.max_batch,
            arrived=self.arrived,
            verdicts=self.judge.verdicts,
            unjudged=self.judge.unjudged,
            ttft_counts=tuple(self.ttft_counts),
            tpot_counts=tuple(self.tpot_counts),
            itl_counts=tuple(self.itl_counts),
        )

    def die(self, now_s: float) -> list[int]:
        """The node is gone: nothing draws or runs any more. Returns the requests that were here."""
        self.read(now_s)
        lost = [*self._running, *self.waiting]
        self._running.clear()
        self.waiting.clear()
        self._prefill.clear()
        self._ends.clear()
        self._next_ends.clear()
        self._decode_kv = self._reserved_kv = self._left = self.queued = 0
        self.power_w = self._idle_w = self.binding = 0.0
        self._dead = True
        for request in lost:
            self._log.tokens[request] = 0
        return lost

    def settle(self) -> None:
        """Record how many tokens the requests under way have so far."""
        for request, end in self._ends.items():
            self._log.tokens[request] = self._log.output[request] - (end - self._count)
        for request, (tokens, _) in self._resumed.items():
            self._log.tokens[request] = tokens

    # -- the scheduler ---------------------------------------------------------------------------------------------

    def _begin(self, now_s: float) -> None:
        """Schedule the next step, or rest where there is nothing to do."""
        decodes = len(self._ends)
        budget, chunks, attended = self._step_tokens - decodes, [], 0.0
        preempted = False
        while self._reserved_kv + len(self._ends) > self._kv_tokens and len(self._running) > 1:
            self._preempt(now_s)
            preempted = True
        decodes = len(self._ends)
        for request, (done, total) in self._prefill.items():
            if budget <= 0:
                break
            tokens = min(total - done, budget)
            budget -= tokens
            attended += tokens * (done + tokens / 2.0)
            chunks.append((request, tokens))
        limit = max(self.batch_limit, len(self._running), 1)
        while self.waiting and budget > 0 and len(self._running) < limit and not preempted:
            request = self.waiting[0]
            total = self._log.prompt[request] + (self._resumed[request][0] if request in self._resumed else 0)
            if self._reserved_kv + decodes + total > self._kv_tokens and self._running:
                break
            self.waiting.popleft()
            self._running[request] = None
            self._prefill[request] = (0, total)
            self._reserved_kv += total
            tokens = min(total, budget)
            budget -= tokens
            attended += tokens * tokens / 2.0
            chunks.append((request, tokens))
        self._chunks, self.queued = chunks, len(self.waiting)
        if chunks:
            prefill = sum(tokens for _, tokens in chunks)
            self._run(now_s, 1, prefill, attended / prefill, decodes)
        elif decodes:
            ends = self._next_ends
            while self._ends.get(ends[0][1]) != ends[0][0]:
                heappop(ends)
            steps = min(ends[0][0] - self._count, (self._kv_tokens - self._reserved_kv) // decodes, _LONGEST_RUN)
            self._run(now_s, max(steps, 1) if self.cap.next_s == inf else 1, 0, 0.0, decodes)
        else:
            self._left = 0
            self.power_w, self.binding = self._idle_w, 0.0

    def _run(self, now_s: float, steps: int, prefill: int, context: float, decodes: int) -> None:
        """Begin a run of equal steps; its KV cache is that of the middle one."""
        kv = self._decode_kv + decodes * (1.0 + (steps - 1) / 2.0)
        self._work = (prefill, context, decodes, kv)
        step_s, self.power_w, self.binding = self._stepper.step(prefill, context, decodes, kv, self.cap.effective_w)
        self._step_s = self._pace_s = step_s * self._scale
        self._start_s, self._left = now_s, steps
        self._buckets = (bucket(self._step_s), fine_bucket(self._step_s))

    def _change_pace(self, now_s: float) -> None:
        """The cap in effect has moved: the rest of the step under way goes on at another pace."""
        self._book(now_s)
        pace_s = self._pace_s
        new_s, self.power_w, self.binding = self._stepper.step(*self._work, self.cap.effective_w)
        self._pace_s = new_s * self._scale
        self._step_s = now_s - self._start_s + (self._start_s + self._step_s - now_s) * self._pace_s / pace_s
        self._left = 1
        self._buckets = (bucket(self._step_s), fine_bucket(self._step_s))

    def _complete(self, now_s: float) -> None:
        """Complete the steps of the run that end by `now_s`, one at least; after the last of it begin the next."""
        steps = 1 if self._left == 1 else min(int((now_s - self._start_s) / self._step_s + 1e-9), self._left)
        end_s = self._start_s + steps * self._step_s
        self._book(end_s)
        decodes = self._work[2]
        if decodes:
            tokens = steps * decodes
            self._count += steps
            self.generated += tokens
            self._decode_kv += tokens
            self._reserved_kv += tokens
            coarse, fine = self._buckets
            self.itl_counts[coarse] += tokens
            self._log.itl_counts[fine] += tokens
        if steps < self._left:
            self._left -= steps
            self._start_s = end_s
            return
        for request, tokens in self._chunks:
            self._prefilled(request, tokens, end_s)
        ends = self._next_ends
        while ends and ends[0][0] <= self._count:
            end, request = heappop(ends)
            if self._ends.get(request) == end:
                del self._ends[request]
                self._decode_kv -= self._log.prompt[request] + self._log.output[request] - 1
                self._finish(request, end_s)
        self._begin(end_s)

    def _prefilled(self, request: int, tokens: int, end_s: float) -> None:
        """So many tokens more of a prompt are done; after the last of them comes a token."""
        log = self._log
        done, total = self._prefill[request]
        if done + tokens < total:
            self._prefill[request] = (done + tokens, total)
            return
        del self._prefill[request]
        generated = 0
        if request in self._resumed:
            generated, last_s = self._resumed.pop(request)
            self.itl_counts[bucket(end_s - last_s)] += 1
            log.itl_counts[fine_bucket(end_s - last_s)] += 1
        else:
            log.first_token_s[request] = end_s
            self.judge.first_token(request, end_s)
            self.ttft_counts[bucket(end_s - log.arrival_s[request])] += 1
            self.prompted += log.prompt[request]
        self.generated += 1
        to_come = log.output[request] - generated - 1
        if to_come == 0:
            self._finish(request, end_s)
            return
        self._decode_kv += total
        self._ends[request] = self._count + to_come
        heappush(self._next_ends, (self._count + to_come, request))

    def _finish(self, request: int, end_s: float) -> None:
        log = self._log
        del self._running[request]
        self._reserved_kv -= log.prompt[request] + log.output[request] - 1
        log.finish_s[request] = end_s
        tokens = log.tokens[request] = log.output[request]
        self.judge.ended(request, end_s, tokens)
        if tokens > 1:
            self.tpot_counts[bucket((end_s - log.first_token_s[request]) / (tokens - 1))] += 1
        self.finished += 1

    def _preempt(self, now_s: float) -> None:
        """Take the cache from the sequence let in last; it is the first to be let in again."""
        request = next(reversed(self._running))
        del self._running[request]
        if request in self._prefill:
            self._reserved_kv -= self._prefill.pop(request)[1]
        else:
            generated = self._log.output[request] - (self._ends.pop(request) - self._count)
            cached = self._log.prompt[request] + generated - 1
            self._reserved_kv -= cached
            self._decode_kv -= cached
            self._resumed[request] = (generated, now_s)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _book(self, now_s: float) -> None:
        """Count energy up to a time, at the present draw."""
        passed_s = now_s - self._booked_s
        if passed_s <= 0.0:
            return
        self.energy_j += self.power_w * passed_s
        if self._left:
            self.binding_s += self.binding * passed_s
        self._meter.add(self._booked_s, now_s, self.power_w * self._node_factor)
        self._booked_s = now_s
