"""The control block: one memory-mapped file per replica, through which agent and engine talk without an RPC.

It is a plain file (under /dev/shm), so that it survives the death of either side: a `multiprocessing.shared_memory`
block would be unlinked by the resource tracker of whichever side exits first. Every field is an aligned 8-byte number
written by one numpy store, and has exactly one writer:

- header: the owner (the replica's process), once;
- the agent's orders: batch limit, parked, and the limits that requests are judged by (0: not yet ordered, inf: none);
- scheduler's fields: `PowerAwareScheduler`, in EngineCore;
- the judge's record, `RequestWatch`'s, there too, under a sequence lock: requests that came, and verdicts on them;
- stat logger's record: `PowerStatLogger`, in the owner, under a sequence lock;
- paced worker's record: rank 0 of a virtual GPU group, under a sequence lock.

numpy and the standard library only: the agent, which must stay light, reads it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals_ray.errors import PalsError
from pals_ray.processes import ProcessId, identify, is_alive
from pals_ray.types import LATENCY_EDGES_S, EngineTelemetry, Verdicts

#: Names the block to EngineCore, workers and stat logger; set in the replica's environment before its engine starts.
BLOCK_VARIABLE = "PALS_CONTROL_BLOCK"

_DIRECTORY = Path("/dev/shm")
_MAGIC = int.from_bytes(b"PALSCTRL", "little")
_VERSION = 4
_NUM_BINS = len(LATENCY_EDGES_S) + 1
_I, _F = np.int64, np.float64
_LAYOUT = np.dtype(
    [
        ("magic", _I),
        ("version", _I),
        ("owner_pid", _I),
        ("owner_start_ticks", _I),
        ("batch_limit", _I),
        ("parked", _I),
        ("ttft_limit_s", _F),
        ("tpot_limit_s", _F),
        ("engine_pid", _I),
        ("engine_start_ticks", _I),
        ("max_batch", _I),
        ("step_tokens", _I),
        ("kv_tokens", _I),
        ("scheduler_heartbeat_ns", _I),
        ("limit_in_force", _I),
        ("scheduler_running", _I),
        ("scheduler_waiting", _I),
        ("judge_sequence", _I),
        ("arrived", _I),
        ("good", _I),
        ("late_ttft", _I),
        ("late_tpot", _I),
        ("late_failed", _I),
        ("good_tokens", _I),
        ("unjudged", _I),
        ("logger_sequence", _I),
        ("logger_heartbeat_ns", _I),
        ("running", _I),
        ("waiting", _I),
        ("kv_use", _F),
        ("prompt_tokens", _I),
        ("generation_tokens", _I),
        ("requests_finished", _I),
        ("preemptions", _I),
        ("ttft_counts", _I, (_NUM_BINS,)),
        ("tpot_counts", _I, (_NUM_BINS,)),
        ("itl_counts", _I, (_NUM_BINS,)),
        ("worker_sequence", _I),
        ("steps", _I),
        ("late_steps", _I),
        ("modelled_s", _F),
        ("wall_s", _F),
    ]
)
_SAME_NAME_IN_TELEMETRY = (
    *("running", "waiting", "kv_use", "prompt_tokens", "generation_tokens", "requests_finished", "preemptions"),
    *("max_batch", "arrived", "unjudged", "steps", "late_steps", "modelled_s", "wall_s"),
)
_VERDICTS = ("good", "late_ttft", "late_tpot", "late_failed", "good_tokens")
_SEQUENCES = ("judge_sequence", "logger_sequence", "worker_sequence")


class BlockError(PalsError):
    """A control block that is missing, of another version, or already owned."""


@dataclass(frozen=True, slots=True)
class SchedulerReading:
    """What the scheduler last wrote. `heartbeat_ns` is CLOCK_MONOTONIC, 0 before it was constructed; `waiting`
    includes requests that vLLM skipped for now. A step takes at most `step_tokens`, the KV cache holds `kv_tokens`."""

    heartbeat_ns: int
    max_batch: int
    step_tokens: int
    kv_tokens: int
    limit_in_force: int
    running: int
    waiting: int


def block_path(node_key: str, replica_id: str) -> Path:
    """Where a replica's block lies. Several nodes of a test share one /dev/shm, hence the node's key."""
    return _DIRECTORY / f"pals-{node_key}-{replica_id}"


class ControlBlock:
    """A mapped control block. Make one with `create` (the owner) or `attach` (everybody else)."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self._record = np.frombuffer(buffer, dtype=_LAYOUT, count=1)
        self._fields = {name: self._record[name].reshape(-1) for name in _LAYOUT.names or ()}

    @classmethod
    def create(cls, path: str | Path) -> ControlBlock:
        """Make a zeroed block owned by this process. A dead owner's block of that name is replaced.

        Raises `BlockError` where the name is a live process's block, or no block at all.
        """
        path = Path(path)
        if path.exists() and is_alive(owner := cls.attach(path).owner()):
            raise BlockError(f"{path} belongs to process {owner.pid}, which is alive: give this replica another name")
        header = np.zeros(1, dtype=_LAYOUT)
        header["magic"], header["version"] = _MAGIC, _VERSION
        header["owner_pid"], header["owner_start_ticks"] = identify()
        # Written under another name and renamed, so that whoever opens the block finds it whole.
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(header.tobytes())
        temporary.rename(path)
        return cls.attach(path)

    @classmethod
    def attach(cls, path: str | Path) -> ControlBlock:
        """Map an existing block. Raises `BlockError` where there is none, or one of another layout."""
        path = Path(path)
        try:
            with path.open("r+b") as file:
                buffer = mmap.mmap(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise BlockError(f"no control block at {path} ({error}): the replica makes it before its engine") from error
        magic, version = np.frombuffer(buffer, dtype=_I, count=2) if len(buffer) >= 16 else (0, 0)
        if magic != _MAGIC or version != _VERSION or len(buffer) != _LAYOUT.itemsize:
            raise BlockError(f"{path} is no control block of version {_VERSION}: engine and agent differ in version")
        return cls(path, buffer)

    def field(self, name: str) -> NDArray[Any]:
        """The live array of one field, for writers; element 0 (or one per histogram bin) is one aligned store."""
        return self._fields[name]

    def unlink(self) -> None:
        """Remove the name. Processes that have it mapped keep their mapping."""
        self.path.unlink(missing_ok=True)

    # What the agent reads and writes.

    def order_batch_limit(self, limit: int) -> None:
        """Order how many sequences the engine may run at once; it clamps to 1..start value."""
        if limit < 1:
            raise BlockError(f"batch limit {limit} ordered: the least is 1")
        self._fields["batch_limit"][0] = limit

    def order_latency_limits(self, ttft_limit_s: float, tpot_limit_s: float) -> None:
        """Order the limits that requests are judged by from the engine's next step on, s; inf where there is none."""
        if not (ttft_limit_s > 0 and tpot_limit_s > 0):
            raise BlockError(f"limits of {ttft_limit_s} s and {tpot_limit_s} s ordered: they must be positive")
        self._fields["ttft_limit_s"][0], self._fields["tpot_limit_s"][0] = ttft_limit_s, tpot_limit_s

    def park(self, parked: bool) -> None:
        """Say whether the replica is parked: requests then go to other replicas of its model."""
        self._fields["parked"][0] = parked

    def is_parked(self) -> bool:
        """Whether the replica is parked."""
        return bool(self._get("parked"))

    def owner(self) -> ProcessId:
        """The replica's process."""
        return ProcessId(self._get("owner_pid"), self._get("owner_start_ticks"))

    def engine(self) -> ProcessId:
        """EngineCore's process; zeros before its scheduler was made."""
        return ProcessId(self._get("engine_pid"), self._get("engine_start_ticks"))

    def logger_heartbeat_ns(self) -> int:
        """CLOCK_MONOTONIC of the stat logger's last record; 0 before it was loaded."""
        return self._get("logger_heartbeat_ns")

    def scheduler(self) -> SchedulerReading:
        """What the scheduler last wrote. Each number is whole, but they may come from two successive steps."""
        shared = {name: self._get(name) for name in ("max_batch", "step_tokens", "kv_tokens", "limit_in_force")}
        own = {name: self._get(f"scheduler_{name}") for name in ("heartbeat_ns", "running", "waiting")}
        return SchedulerReading(**shared, **own)

    def _get(self, name: str) -> int:
        return int(self._fields[name].item(0))

    def telemetry(self) -> EngineTelemetry:
        """One consistent reading. `time_s` is CLOCK_MONOTONIC at the reading."""
        record = self._consistent_copy()
        return EngineTelemetry(
            time_s=time.monotonic(),
            batch_limit=record["limit_in_force"].item(),
            verdicts=Verdicts(**{name: record[name].item() for name in _VERDICTS}),
            ttft_counts=tuple(record["ttft_counts"].tolist()),
            tpot_counts=tuple(record["tpot_counts"].tolist()),
            itl_counts=tuple(record["itl_counts"].tolist()),
            **{name: record[name].item() for name in _SAME_NAME_IN_TELEMETRY},
        )

    def _consistent_copy(self, timeout_s: float = 0.1) -> Any:
        """Copy until no record is being written meanwhile.

        After `timeout_s` a writer has died while writing, and the copy is taken as it is: each number is whole, and at
        most one step apart from the others.
        """
        sequences = [self._fields[name] for name in _SEQUENCES]
        deadline = time.monotonic() + timeout_s
        while True:
            before = [sequence.item(0) for sequence in sequences]
            copy = self._record.copy()
            unchanged = before == [sequence.item(0) for sequence in sequences]
            if (unchanged and not any(value % 2 for value in before)) or time.monotonic() > deadline:
                return copy[0]
            time.sleep(0.0002)  # A writer that shares this core must be able to go on.


class RecordWriter:
    """Use it in `with` around the stores of one record: the sequence is odd while the record is being written."""

    def __init__(self, sequence: NDArray[np.int64]) -> None:
        self._sequence = sequence
        # A writer that died while writing left the sequence odd; its successor makes it even.
        sequence[0] = sequence.item(0) + sequence.item(0) % 2

    def __enter__(self) -> None:
        self._sequence[0] += 1

    def __exit__(self, *_: object) -> None:
        self._sequence[0] += 1


def add_latencies(counts: NDArray[np.int64], latencies_s: Sequence[float]) -> None:
    """Count latencies, s, into a histogram over `LATENCY_EDGES_S`.

    The sequences of one step share one inter-token latency, so walking runs of a sorted list costs 0.5 us for 16 and
    2 us for 256, where a numpy histogram takes 2.4 and 9.
    """
    ordered = sorted(latencies_s)
    start = 0
    while start < len(ordered):
        index = bisect_left(LATENCY_EDGES_S, ordered[start])
        overflow = index == len(LATENCY_EDGES_S)
        stop = len(ordered) if overflow else bisect_right(ordered, LATENCY_EDGES_S[index], start)
        counts[index] += stop - start
        start = stop


def live_engines(node_key: str) -> list[ProcessId]:
    """The EngineCores of this node that still run, by what their schedulers wrote."""
    engines = (block.engine() for block in _blocks(node_key))
    return [engine for engine in engines if is_alive(engine)]


def sweep(node_key: str) -> list[Path]:
    """Remove the node's control blocks whose owner and engine are both dead; returns them."""
    dead = [b for b in _blocks(node_key) if not is_alive(b.owner()) and not is_alive(b.engine())]
    for block in dead:
        block.unlink()
    return [block.path for block in dead]


def _blocks(node_key: str) -> Iterator[ControlBlock]:
    for path in _DIRECTORY.glob(f"pals-{node_key}-*"):
        # Other files of ours have such names too.
        with contextlib.suppress(BlockError):
            yield ControlBlock.attach(path)
