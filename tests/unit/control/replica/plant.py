"""A replica to close the loop around (continuous batching on the silicon's physics, in virtual time), and models."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Decision, Situation
from pals_ray.control.replica.operating_point import decide
from pals_ray.control.slo import RequestJudge
from pals_ray.control.snapshot import Overhead
from pals_ray.control.telemetry import Reading, TelemetryWindow
from pals_ray.models.physics.roofline import RooflineModel, Workload
from pals_ray.models.physics.step_cost import GroupPhysics, StepWork
from pals_ray.models.specs import Parallelism, find_gpu, find_model
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Target
from tests.support.builders import exact_prediction

BEAT_S = 0.5
STEP_TOKENS = 8192


@dataclass
class Request:
    arrived_s: float
    prompt: int
    left: int
    context: int = 0
    first_s: float = 0.0


@dataclass
class Plant:
    """One GPU group serving requests under a cap and a batch limit; counts as a real engine does."""

    physics: GroupPhysics
    max_batch: int
    cap_w: float
    now_s: float = 0.0
    limit: int = 0
    waiting: deque = field(default_factory=deque)
    running: list = field(default_factory=list)
    energy_j: float = 0.0
    power_w: float = 0.0
    binding: bool = False
    generated: int = 0
    prompted: int = 0
    arrived: int = 0
    finished: int = 0
    judge: RequestJudge = field(default_factory=RequestJudge)
    ttft: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, dtype=int))
    tpot: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, dtype=int))
    itl: np.ndarray = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, dtype=int))

    def run(self, until_s, arrivals):
        """Step until a time; `arrivals` is a deque of requests by time."""
        gpus = self.physics.parallelism.num_gpus
        idle_w = self.physics.gpu.idle_context_w * gpus
        while self.now_s < until_s:
            while arrivals and arrivals[0].arrived_s <= self.now_s:
                self.waiting.append(arrivals.popleft())
                self.arrived += 1
                self.judge.arrived(id(self.waiting[-1]), self.waiting[-1].arrived_s)
            if not self.running and not self.waiting:
                at_s = min(until_s, arrivals[0].arrived_s if arrivals else until_s)
                self.energy_j += idle_w * (at_s - self.now_s)
                self.power_w, self.binding, self.now_s = idle_w, False, at_s
                continue
            new, tokens = [], 0
            while (
                self.waiting
                and len(self.running) + len(new) < self.limit
                and tokens + self.waiting[0].prompt <= STEP_TOKENS
            ):
                new.append(self.waiting.popleft())
                tokens += new[-1].prompt
            work = StepWork(
                prefill_tokens=tokens,
                prefill_context_tokens=sum(r.prompt**2 for r in new) / 2 / max(tokens, 1),
                decode_seqs=len(self.running),
                kv_tokens=sum(r.context for r in self.running),
            )
            step = self.physics.step(work, self.cap_w)
            self.now_s += step.duration_s
            self.power_w, self.binding = step.power_w * gpus, step.binding
            self.energy_j += self.power_w * step.duration_s
            self.itl[bisect_left(LATENCY_EDGES_S, step.duration_s)] += len(self.running)
            for r in new:
                self.ttft[bisect_left(LATENCY_EDGES_S, self.now_s - r.arrived_s)] += 1
                r.context, r.first_s = r.prompt, self.now_s
                self.judge.first_token(id(r), self.now_s)
            self.prompted += tokens
            self.running += new
            self.generated += len(self.running)
            for r in self.running:
                r.left, r.context = r.left - 1, r.context + 1
            ended = [r for r in self.running if r.left <= 0]
            self.finished += len(ended)
            for r in ended:
                tokens = r.context - r.prompt
                self.judge.ended(id(r), self.now_s, tokens)
                if tokens > 1:
                    self.tpot[bisect_left(LATENCY_EDGES_S, (self.now_s - r.first_s) / (tokens - 1))] += 1
            self.running = [r for r in self.running if r.left > 0]

    def run_closed(self, until_s, clients):
        """The same with clients that each ask again once they are answered: their number, prompt and output tokens."""
        number, prompt, output = clients
        while self.now_s < until_s:
            asking = number - len(self.running) - len(self.waiting)
            # At first they are all at different tokens of their answers.
            lengths = (
                range(1, output + 1, output // number) if self.finished == 0 and asking == number else [output] * asking
            )
            arrivals = deque(Request(self.now_s, prompt, length) for length in list(lengths)[:asking])
            self.run(min(until_s, self.now_s + 0.03), arrivals)

    def telemetry(self):
        self.judge.look(self.now_s)
        return EngineTelemetry(
            time_s=self.now_s,
            running=len(self.running),
            waiting=len(self.waiting),
            kv_use=0.1,
            prompt_tokens=self.prompted,
            generation_tokens=self.generated,
            requests_finished=self.finished,
            preemptions=0,
            batch_limit=self.limit,
            max_batch=self.max_batch,
            arrived=self.arrived,
            verdicts=self.judge.verdicts,
            ttft_counts=tuple(self.ttft.tolist()),
            tpot_counts=tuple(self.tpot.tolist()),
            itl_counts=tuple(self.itl.tolist()),
        )


@dataclass(frozen=True)
class Biased:
    """A model that is wrong by a constant factor in throughput (and says so little of it as `rel_std`)."""

    model: RooflineModel
    throughput: float = 1.0
    rel_std: float = 0.02

    def predict(self, cap_w, batch):
        p = self.model.predict(cap_w, batch)
        return replace(
            p,
            throughput_tokens_per_s=p.throughput_tokens_per_s * self.throughput,
            throughput_rel_std=np.full_like(p.power_w, self.rel_std),
        )


@dataclass(frozen=True)
class Decode:
    """Capacity `10 batch / (1 + batch / 32)` at full clock, slowed gently below the draw `80 W + 4 W x batch`."""

    falls_from: float = np.inf

    def predict(self, cap_w, batch):
        cap_w, batch = np.broadcast_arrays(np.asarray(cap_w, float), np.asarray(batch, float))
        draw_w = 80 + 4 * batch
        slowed = np.sqrt(np.minimum(cap_w / draw_w, 1.0))
        capacity = 10 * batch / (1 + batch / 32) * slowed * np.where(batch > self.falls_from, 0.7, 1.0)
        return exact_prediction(capacity, np.minimum(cap_w, draw_w), batch / capacity, 20 / cap_w)


@dataclass
class Loop:
    """Plant and controller on one virtual clock, one beat after another."""

    plant: Plant
    model: object
    terms: ChargeTerms
    workload: Workload
    target: Target = field(default_factory=Target)
    ceiling_w: float = 0.0
    config: ControllerConfig = field(default_factory=ControllerConfig)
    state: ControllerState = field(default_factory=ControllerState)
    window: TelemetryWindow = field(default_factory=TelemetryWindow)
    arrivals: deque = field(default_factory=deque)
    decisions: list[Decision] = field(default_factory=list)
    clients: tuple[int, int, int] | None = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def keep(self, clients, prompt, output):
        """So many clients, each of which asks again once it is answered."""
        self.clients = (clients, prompt, output)

    def offer(self, tokens_per_s, for_s, prompt=None):
        """Poisson arrivals worth `tokens_per_s` from now on."""
        prompt = prompt or int(self.workload.prompt_tokens)
        output = int(self.workload.output_tokens)
        at_s = self.plant.now_s
        while tokens_per_s > 0:
            at_s += self.rng.exponential(output / tokens_per_s)
            if at_s > self.plant.now_s + for_s:
                break
            # Lengths of one kind would run in waves.
            self.arrivals.append(Request(at_s, prompt, 1 + int(self.rng.exponential(output))))

    def beat(self):
        plant, slo = self.plant, self.target.slo
        plant.judge.ttft_limit_s, plant.judge.tpot_limit_s = slo.ttft_s or np.inf, slo.tpot_s or np.inf
        if self.clients is None:
            plant.run(plant.now_s + BEAT_S, self.arrivals)
        else:
            plant.run_closed(plant.now_s + BEAT_S, self.clients)
        engine = plant.telemetry()
        self.window.add(Reading(plant.now_s, engine, plant.energy_j, plant.power_w, float(plant.binding)))
        decision = decide(self.state, self.seen(), self.config)
        self.state = decision.state
        plant.cap_w, plant.limit = decision.point.cap_w, decision.point.batch_limit
        self.decisions.append(decision)
        return decision

    def seen(self):
        return Situation(
            now_s=self.plant.now_s,
            ceiling_w=self.ceiling_w,
            in_force_w=self.plant.cap_w,
            terms=self.terms,
            max_batch=self.plant.max_batch,
            target=self.target,
            telemetry=self.window.summary(),
            model=self.model,
        )

    def run(self, for_s):
        """Beats for so long; returns their decisions."""
        first = len(self.decisions)
        for _ in range(round(for_s / BEAT_S)):
            self.beat()
        return self.decisions[first:]


def make_loop(
    spec="Qwen3-8B", gpu="H100-SXM", max_batch=128, bias=1.0, tensor=1, prompt=256.0, output=200.0, **changes
):
    """A loop around one replica whose model is the physics itself, but for `bias` on its throughput."""
    silicon = find_gpu(gpu)
    physics = GroupPhysics(silicon, find_model(spec), Parallelism(tensor))
    workload = Workload(prompt, output)
    plant = Plant(physics, max_batch, silicon.max_limit_w, limit=max_batch)
    terms = ChargeTerms(Overhead(0.0, 0.0), 8, silicon.min_limit_w, silicon.max_limit_w, (0.0,) * tensor)
    predictor = Biased(RooflineModel(physics, workload), bias)
    return Loop(plant, predictor, terms, workload, ceiling_w=changes.pop("ceiling_w", silicon.max_limit_w), **changes)
