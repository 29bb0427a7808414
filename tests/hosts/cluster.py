"""A Ray cluster on test hosts, brought up as the README says: its own lines, run by an operator outside the cluster.

The operator is this machine, at the bridge's own address, with a checkout, a home and a key of its own. In that
checkout the project's `cluster.yaml` has its CAPITALS and the key filled in, and nothing else changed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from pals_ray.gpus.virtual_block import remove_block
from pals_ray.runtime.node.node_file import SHARED_MEMORY, node_key
from tests.hosts.network import Host, Network
from tests.support import fleets

ROOT = Path(__file__).parents[2]
SECRET = "sesame"

#: What every command of the project is run with, as in the Makefile.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

#: Where the launcher keeps what it knows of the cluster, on the operator's machine.
_LAUNCHER_STATE = [Path("/tmp/ray/cluster-pals.state"), Path("/tmp/ray/cluster-pals.lock")]

_SET_BUDGETS = """
import json, sys, time
import pals_ray
fleet = pals_ray.connect()
for watts in map(float, sys.stdin):
    called_s = time.monotonic()
    change = fleet.set_budget(watts)
    print(json.dumps([watts, called_s, time.monotonic(), change.settled_s]), flush=True)
"""


@dataclass(frozen=True)
class BudgetStep:
    """A budget set by a handle: when it was called and had returned (s, this machine's monotonic
    clock), and what the manager says it took until every cap was in force, s."""

    budget_w: float
    called_s: float
    returned_s: float
    settled_s: float


def readme_steps() -> list[str]:
    """The commands of the README's section on several machines, comments left out."""
    section = (ROOT / "README.md").read_text().split("\n## Several machines\n")[1].split("\n## ")[0]
    block = section.split("```")[1]
    return [line.split("   #")[0].strip() for line in block.splitlines() if line.strip()]


class HostCluster:
    """Head and workers on hosts of their own. A context manager: nothing is left of it, whatever happened."""

    def __init__(self, **environment: str) -> None:
        """`environment` is what every command on a host finds set beside the usual."""
        self.network = Network("head", "a", "b", environment={**_ENVIRONMENT, **environment})
        self.head, *self.workers = self.network.hosts
        self.url = f"http://{self.head.address}:8000"
        self._home = self.network.folder / "operator"
        self.checkout = self._home / "pals-ray"
        #: The README's commands that have not been run yet.
        self.steps_left = readme_steps()

    def __enter__(self) -> HostCluster:
        self.network.__enter__()
        try:
            self._check_out()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _check_out(self) -> None:
        """The operator's checkout, with addresses and key filled in."""
        leave_out = [
            f"--exclude={name}" for name in (".git", ".venv", "build", ".*_cache", ".hypothesis", "__pycache__")
        ]
        self.checkout.mkdir(parents=True)
        subprocess.run(["rsync", "-a", *leave_out, f"{ROOT}/", str(self.checkout)], check=True)
        filled_in = (self.checkout / "cluster.yaml").read_text().replace("~/.ssh/id_ed25519", str(self.network.key))
        for number, worker in enumerate(self.workers, 1):
            filled_in = filled_in.replace(f"WORKER_ADDRESS_{number}", worker.address)
        filled_in = filled_in.replace("HEAD_ADDRESS", self.head.address).replace("A_SECRET_OF_YOURS", SECRET)
        (self.checkout / "cluster.yaml").write_text(filled_in)

    def write_fleet_file(self, content: Mapping[str, Any]) -> None:
        """The operator's fleet file."""
        (self.checkout / "fleet.yaml").write_text(yaml.safe_dump(dict(content)))

    # -- the operator ------------------------------------------------------------------------------------------------

    def operate(self, command: str, *, timeout_s: float = 240, check: bool = True) -> str:
        """Run a command of the README as the operator, in the checkout; what it printed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PALS_"))}
        environment |= {
            **_ENVIRONMENT,
            "HOME": str(self._home),
            "PATH": f"{fleets.BIN}:{environment['PATH']}",
            "PYTHONPATH": str(self.checkout),
        }
        done = subprocess.run(
            ["bash", "-c", command.replace("HEAD_ADDRESS", self.head.address)],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
        return re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # the launcher asks for a terminal, hence colours

    def step(self, begins: str, watts: float | None = None, *, timeout_s: float = 240) -> str:
        """Run the README's command that begins so, on the same hosts as the others; `watts` replaces its own."""
        (step,) = [step for step in readme_steps() if step.startswith(begins)]
        self.steps_left = [left for left in self.steps_left if left != step]
        if watts is not None:
            step = re.sub(r"\b\d{4}\b(?=['\")]|$)", f"{watts:g}", step)
        began_s = time.monotonic()
        out = self.operate(step, timeout_s=timeout_s)
        print(f"\n[{time.monotonic() - began_s:.1f} s] {step}")
        return out

    @contextmanager
    def handle_on_head(self) -> Iterator[Callable[[float], BudgetStep]]:
        """What sets one budget after another by a handle on the head."""
        (self.head.home / "set_budgets.py").write_text(_SET_BUDGETS)
        with self.head.begin("python ~/set_budgets.py") as process:
            assert process.stdin is not None
            assert process.stdout is not None
            asked = process.stdin
            # Among other lines that are printed.
            steps = (BudgetStep(*json.loads(line)) for line in process.stdout if re.match(r"\[[\d.]+, ", line))

            def set_budget(budget_w: float) -> BudgetStep:
                asked.write(f"{budget_w:g}\n")
                return next(steps)

            yield set_budget

    # -- looking on --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """`GET /power` on the head."""
        answer = httpx.get(f"{self.url}/power", timeout=10)
        answer.raise_for_status()
        status: dict[str, Any] = answer.json()
        return status

    def answers(self, model: str) -> bool:
        """Whether a model completes a request, asked on the head."""
        body = {"model": model, "prompt": "hello", "max_tokens": 4}
        with suppress(httpx.HTTPError):
            return httpx.post(f"{self.url}/v1/completions", json=body, timeout=10).status_code == 200
        return False

    def places(self) -> dict[str, str]:
        """The address of the host that each serving replica is on, by replica id. Empty while the head is away."""
        with suppress(httpx.HTTPError):
            rows = self.status()["replicas"]
            return {row["replica_id"]: self._address_of(row["gpus"]) for row in rows if row["state"] == "serving"}
        return {}

    def _address_of(self, gpus: list[str]) -> str:
        keys = {worker.address: f"GPU-virtual-{node_key(worker.address)}-" for worker in self.workers}
        (address,) = {a for a, prefix in keys.items() for gpu in gpus if gpu.startswith(prefix)}
        return address

    def remains(self, host: Host) -> list[str]:
        """Every process of a host that is not its sshd's."""
        lines = host.run("ps -eo args=").stdout.splitlines()
        return [line for line in lines if not re.match(r"sshd|/usr/sbin/sshd|ps -eo|\S*sh -c ps -eo", line)]

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Kill everything of every host, and remove what lies outside their folders."""
        self.network.close()
        deadline_s = time.monotonic() + 5
        while fleets.any_alive(fleets.engine_processes()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        for host in self.network.hosts:
            _forget_memory(host)
        for path in _LAUNCHER_STATE:
            path.unlink(missing_ok=True)


def boot_anew(host: Host) -> None:
    """Power on a host that lost its power, its memory gone: limits and /dev/shm do not outlive that."""
    _forget_memory(host)
    host.boot()


def _forget_memory(host: Host) -> None:
    """The part of /dev/shm that is a host's own, its virtual GPUs among it."""
    key = node_key(host.address)
    for path in (*SHARED_MEMORY.glob(f"pals-node-{key}.*"), *SHARED_MEMORY.glob(f"pals-{key}-*")):
        path.unlink(missing_ok=True)
    remove_block(key)
