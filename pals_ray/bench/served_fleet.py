"""A real fleet for a benchmark: `serve run` in a process of its own on this machine. What it does is read from energy
counters of the GPUs and token counters of the engines, which the parts that are being measured do not compute."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml

import pals_ray
from pals_ray.engine.control_block import ControlBlock, block_path
from pals_ray.errors import PalsError
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.runtime.client import Fleet
from pals_ray.runtime.node.node_file import node_key, state_path
from pals_ray.types import Verdicts

URL = "http://127.0.0.1:8000"
UP_DEADLINE_S = 240.0
DOWN_DEADLINE_S = 90.0
GUARDIAN_DEADLINE_S = 20.0
SAMPLE_S = 0.5
#: Room for every GPU of the default fleet at its highest cap, W.
UNCAPPED_BUDGET_W = 1600.0

#: With this environment several engines of tiny models can share a few cores; it is that of every side compared.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class BenchError(PalsError):
    """A benchmark that cannot give meaningful figures."""


def default_fleet() -> dict[str, Any]:
    """The content of the default fleet file."""
    spec = find_spec("deployments")  # importing the package would import vLLM
    if spec is None or spec.origin is None:
        raise BenchError("the package `deployments` is not installed, so there is no default fleet to measure")
    content: dict[str, Any] = yaml.safe_load((Path(spec.origin).parent / "examples" / "tiny.yaml").read_text())
    return content


class ServedFleet:
    """`serve run` of a fleet file; once it answers `fleet` is its handle. `key` is the key of its only node."""

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        self.content = content | {"storage_path": str(folder / "state")}
        self.key = node_key(ray.util.get_node_ip_address())
        self._folder = folder
        self._process = self._serve("run", "deployments:build")

    @property
    def model_ids(self) -> list[str]:
        """The ids of the fleet's models."""
        return [model["llm_config"]["model_loading_config"]["model_id"] for model in self.content["models"]]

    def wait(self) -> None:
        """Wait until every model answers, and connect. Raises `BenchError` with the end of the log."""
        until_s = time.monotonic() + UP_DEADLINE_S
        while not all(map(_answers, self.model_ids)):
            if self._process.poll() is not None:
                raise BenchError(f"`serve run` has ended, the fleet never answered:\n{self._log_end()}")
            if time.monotonic() > until_s:
                raise BenchError(f"the fleet does not answer after {UP_DEADLINE_S:g} s:\n{self._log_end()}")
            time.sleep(2)
        self.fleet: Fleet = pals_ray.connect()

    def redeploy(self, **changes: Any) -> None:
        """Deploy the same models with other settings: no engine restarts."""
        self.content |= changes
        done = self._serve("run", "--non-blocking", "deployments:build")
        if done.wait(UP_DEADLINE_S) != 0:
            raise BenchError(f"the fleet was not redeployed:\n{self._log_end()}")

    def close(self) -> None:
        """Stop it as Ctrl-C does, and wait until its last process has gone."""
        ray.shutdown()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(DOWN_DEADLINE_S)
            self._process.kill()
        until_s = time.monotonic() + GUARDIAN_DEADLINE_S
        while state_path(self.key).exists() and time.monotonic() < until_s:  # limits are still being restored
            time.sleep(0.2)

    def _serve(self, *args: str) -> subprocess.Popen[bytes]:
        config, log = self._folder / "fleet.yaml", self._folder / "serve.log"
        config.write_text(yaml.safe_dump(self.content))
        joins = {"RAY_ADDRESS": "auto", "RAY_AUTH_MODE": "token"} if "--non-blocking" in args else {}
        with log.open("ab") as out:
            return subprocess.Popen(
                [str(Path(sys.executable).parent / "serve"), *args, f"config={config}"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **joins},
                # A process begun from a shell's background job ignores SIGINT, and would hand that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def _log_end(self) -> str:
        return "\n".join((self._folder / "serve.log").read_text(errors="replace").splitlines()[-30:])


@contextmanager
def served_fleet(content: dict[str, Any] | None = None) -> Iterator[ServedFleet]:
    """A fleet of this content (None: the default one) while the block runs. Raises `BenchError` where none comes up."""
    # Ray prints warnings about its cluster to stdout, which is for the figures.
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="pals-bench-") as folder:
        # A benchmark that is ended half-way must not leave engines behind.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
        served = ServedFleet(content or default_fleet(), Path(folder))
        try:
            served.wait()
            yield served
        finally:
            served.close()
            signal.signal(signal.SIGTERM, before)


def _answers(model: str) -> bool:
    body = {"model": model, "prompt": "hello", "max_tokens": 4}
    with suppress(httpx.HTTPError):
        return httpx.post(f"{URL}/v1/completions", json=body, timeout=30).status_code == 200
    return False


@dataclass(slots=True)
class Watch:
    """What a fleet's counters said, every half second: `time_s` (monotonic), `energy_j` of all GPUs of the node, and
    output `tokens` of all engines since their start; and, by model, the requests judged meanwhile."""

    time_s: list[float] = field(default_factory=list)
    energy_j: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    verdicts: dict[str, Verdicts] = field(default_factory=dict)

    def rates(self) -> tuple[float, float, float]:
        """Mean W, output tokens/s and output tokens/J, from the first look to the last."""
        elapsed_s, energy_j, tokens = (c[-1] - c[0] for c in (self.time_s, self.energy_j, self.tokens))
        return energy_j / elapsed_s, tokens / elapsed_s, tokens / energy_j

    @property
    def attainment(self) -> float | None:
        """The share of good requests of those judged, of all models together; None without any."""
        return sum(self.verdicts.values(), Verdicts()).attainment


async def watch(served: ServedFleet, duration_s: float) -> Watch:
    """Read the fleet's counters for `duration_s`; no replica may be replaced meanwhile."""
    rows = (await served.fleet.status_async()).replicas
    blocks = {
        row.replica_id: ControlBlock.attach(block_path(served.key, row.replica_id.partition("#")[2])) for row in rows
    }
    gpus, seen = VirtualDriver.attach(served.key).gpus(), Watch()
    before = {name: block.telemetry().verdicts for name, block in blocks.items()}
    until_s = time.monotonic() + duration_s
    due_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        engines = {name: block.telemetry() for name, block in blocks.items()}
        seen.time_s.append(now_s)
        seen.energy_j.append(sum(gpu.energy_j() for gpu in gpus))
        seen.tokens.append(sum(engine.generation_tokens for engine in engines.values()))
        if now_s >= until_s:
            for name, engine in engines.items():
                model = name.partition("#")[0]
                judged = engine.verdicts - before[name]
                seen.verdicts[model] = seen.verdicts.get(model, Verdicts()) + judged
            return seen
        due_s = max(due_s + SAMPLE_S, now_s)
        await asyncio.sleep(due_s - time.monotonic())
