"""Real fleets for tests: `serve run` as a newcomer runs it, its GPUs sampled from outside, its remains looked for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import ray

from pals_ray.gpus.gpu_protocol import Gpu
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.runtime.node.node_file import node_key

URL = "http://127.0.0.1:8000"
BIN = Path(sys.executable).parent
SHARED_MEMORY = Path("/dev/shm")


def wait_for(condition: Callable[[], object], deadline_s: float, what: str, every_s: float = 0.2) -> float:
    """Wait until `condition` holds; returns how long that took, s. Fails with `what` at the deadline."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < deadline_s, f"after {deadline_s:g} s: {what}"
        time.sleep(every_s)
    return time.monotonic() - began_s


def environment(storage: Path, **extra: str) -> dict[str, str]:
    """What a fleet of a test runs in; RAY_AUTH_MODE lets command lines reach a cluster that `serve run` began."""
    return {**os.environ, "RAY_AUTH_MODE": "token", "PALS_POWER_TOKEN": "sesame", "COLUMNS": "120", **extra}


class ServeRun:
    """`serve run ARGS` in a process of its own, with SIGINT as a terminal would send it."""

    def __init__(self, args: list[str], log: Path, env: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(BIN / "serve"), "run", *args],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                # A process begun from a shell's background job ignores SIGINT, and would hand that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def failed(self) -> bool:
        return self.process.poll() is not None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


def answers(model: str) -> bool:
    """Whether a model completes a request."""
    body = {"model": model, "prompt": "hello", "max_tokens": 4}
    with contextlib.suppress(httpx.HTTPError):
        return httpx.post(f"{URL}/v1/completions", json=body, timeout=30).status_code == 200
    return False


def engine_processes() -> list[psutil.Process]:
    """Every vLLM process of this machine."""
    return _named("VLLM::")


def any_alive(processes: list[psutil.Process]) -> bool:
    """Whether one of them still runs; a zombie that nobody has reaped yet does not."""
    return any(_runs(process) for process in processes)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def guardians() -> list[psutil.Process]:
    """Every guardian of this machine."""
    return [p for p in psutil.process_iter() if "pals_ray.runtime.node.guardian" in _command(p)]


def actor_processes(name: str) -> list[psutil.Process]:
    """Ray processes whose title names this class."""
    return _named(f"ray::{name}")


def forget_dead_cluster() -> None:
    """Drop Ray's note of a cluster whose processes were all killed: `ray.init` would wait for it for minutes."""
    if not any("gcs_server" in _command(process) for process in psutil.process_iter()):
        Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)


def our_files() -> list[str]:
    """Files of ours under /dev/shm, but for the virtual GPUs' own block, which stands for hardware."""
    return sorted(p.name for p in SHARED_MEMORY.glob("pals-*") if not p.name.startswith("pals-virtual-gpus-"))


def _named(prefix: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if _command(p).startswith(prefix)]


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@dataclass
class LimitSamples:
    """(time, sum of limits) every 10 ms, W."""

    rows: list[tuple[float, float]] = field(default_factory=list)

    def worst_after(self, since_s: float, until_s: float = float("inf")) -> float:
        return max(watts for at_s, watts in self.rows if since_s <= at_s < until_s)

    def last_over(self, budget_w: float, since_s: float, until_s: float = float("inf")) -> float:
        """How long after `since_s` the sum was last above the budget, s; 0 if it never was."""
        over = [at_s for at_s, watts in self.rows if since_s <= at_s < until_s and watts > budget_w + 0.01]
        return over[-1] - since_s if over else 0.0


def virtual_gpus() -> VirtualDriver:
    """The virtual GPUs of this machine's node."""
    return VirtualDriver.attach(node_key(ray.util.get_node_ip_address()))


@contextlib.contextmanager
def sampled_limits(gpus: Sequence[Gpu] | None = None) -> Iterator[LimitSamples]:
    """Sample the limits in force every 10 ms while the block runs: of these GPUs, or of all this machine's virtual."""
    gpus, samples, stop = gpus or virtual_gpus().gpus(), LimitSamples(), threading.Event()

    def run() -> None:
        while not stop.wait(0.01):
            samples.rows.append((time.monotonic(), sum(gpu.limit_w() for gpu in gpus)))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def total_limit_w() -> float:
    """Sum of the limits in force on this machine's virtual GPUs, W."""
    return sum(gpu.limit_w() for gpu in virtual_gpus().gpus())
