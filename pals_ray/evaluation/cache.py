"""Cases run in processes of their own, each result kept in a file: what is there already is not run again."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from pals_ray.evaluation.cases import Case
from pals_ray.evaluation.results import run_case
from pals_ray.evaluation.runs import CaseRuns
from pals_ray.evaluation.target_runs import TargetRuns
from pals_ray.plots.tables import Json
from pals_ray.simulation.traces import Trace
from pals_ray.whole_file import write_whole

#: The oracle's point takes about so many runs on each tuning seed.
_ORACLE_RUNS = 30
#: The sources that decide a result: a change in any of them makes every kept result stale.
_SOURCES = ("pals_ray/simulation", "pals_ray/control", "pals_ray/models", "pals_ray/evaluation", "policies")
#: Those that only show results decide none.
_SHOWN_BY = ("evaluation_page.py", "html_page.py", "policy_tables.py")
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """One case with everything that its result depends on. `folder` is where the scenario's files are."""

    case: Case
    lengths: Trace
    folder: Path
    policies: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Changes when anything does that could change the result."""
        scenario = self.case.scenario.model_dump(mode="json", exclude={"about", "fleets", "policies", "seeds"})
        spec = [scenario, self.case.fleet.model_dump(mode="json"), self.case.name, self.policies, self.seeds]
        text = json.dumps([spec, _sums(self.lengths), _code()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Unique among all scenarios."""
        return f"{self.case.scenario.name}: {self.case.name}"

    def file(self, out: Path) -> Path:
        """Where its result is kept."""
        return out / "cases" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)}.json"

    def about_runs(self) -> int:
        """How many simulations it takes, about: for a progress bar."""
        scenario, seeds = self.case.scenario, len(self.seeds)
        models = len(self.case.fleet.models)
        tuned = _ORACLE_RUNS * len(scenario.tuning_seeds) * scenario.oracle
        starts = {policy.partition("@")[2] for policy in self.policies}
        return models * len(starts) + seeds * (1 + len(self.policies)) + tuned + 1

    def gpu_s(self) -> float:
        """Simulated time of all its runs times GPUs: a measure of how long it takes."""
        gpus = sum(node.count * node.gpus for node in self.case.fleet.nodes)
        return self.about_runs() * self.case.duration_s * gpus


def _sums(trace: Trace) -> tuple[float, ...]:
    """What tells one trace from another."""
    return tuple(float(column.sum()) for column in (trace.arrival_s, trace.prompt_tokens, trace.output_tokens))


@cache
def _code() -> str:
    root = Path(__file__).parents[2]
    found = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.is_file() and file.parent.name != "__pycache__" and file.name not in _SHOWN_BY:
                found.update(file.read_bytes())
    return found.hexdigest()


def kept(job: Job, out: Path) -> Json | None:
    """The result of a job from an earlier run, None where there is none or something has changed since."""
    try:
        content: Json = json.loads(job.file(out).read_text())
    except (OSError, ValueError):
        return None
    result: Json | None = content.get("result")
    return result if content.get("digest") == job.digest else None


def run_jobs(
    jobs: Sequence[Job], out: Path, processes: int, tick: Callable[[str, int], None]
) -> Iterator[tuple[Job, Json]]:
    """Run what is not kept, and yield every job with its result as it is ready. `tick` gets (what, runs done).

    The longest are begun first, so that the processes end at about the same time.
    """
    todo = []
    for job in jobs:
        found = kept(job, out)
        if found is None:
            todo.append(job)
        else:
            tick(job.name, job.about_runs())
            yield job, found
    if not todo:
        return
    (out / "cases").mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    queue: SimpleQueue[str] = context.SimpleQueue()
    done: Counter[str] = Counter()
    most = {job.name: job.about_runs() for job in todo}
    with ProcessPoolExecutor(min(processes, len(todo)), context, _begin, (queue,)) as pool:
        waiting = {pool.submit(_work, job): job for job in sorted(todo, key=Job.gpu_s, reverse=True)}
        while waiting:
            finished, _ = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            while not queue.empty():
                name = queue.get()
                if done[name] < most[name]:
                    done[name] += 1
                    tick(name, 1)
            for future in finished:
                job = waiting.pop(future)
                result = future.result()
                write_whole(job.file(out), json.dumps({"digest": job.digest, "result": result}))
                tick(job.name, most[job.name] - done[job.name])
                yield job, result


_queue: Any = None
#: The traces that this process has seen: what is found out with one is remembered with it.
_traces: dict[tuple[float, ...], Trace] = {}


def _interned(trace: Trace) -> Trace:
    return _traces.setdefault(_sums(trace), trace)


def _begin(queue: SimpleQueue[str]) -> None:
    global _queue
    _queue = queue


def _work(job: Job) -> Json:
    kind = CaseRuns if job.case.target is None else TargetRuns
    runs = kind(job.case, _interned(job.lengths), job.folder, job.seeds, lambda: _queue.put(job.name))
    return run_case(runs, job.policies, job.seeds)
