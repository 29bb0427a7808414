"""The manager's file: what has to outlive it, written atomically before it takes effect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from pals_ray.control.manager.fleet_record import FleetRecord
from pals_ray.errors import PalsError
from pals_ray.runtime.messages import AgentSpec
from pals_ray.whole_file import write_whole


class StorageError(PalsError):
    """The manager's file cannot be read or written, or belongs to another cluster's manager."""


class NewerManager(StorageError):
    """A newer manager of this cluster has written the file: the one that meets this must write no more, and end."""


@dataclass(frozen=True, slots=True)
class ManagerState(FleetRecord):
    """What a manager writes down. `session` names the Ray session that `nodes` and `agents` belong to: those of another
    one are gone with it. `config` is the fleet file's content as deployed, `version` orders deployments."""

    agents: Mapping[str, AgentSpec] = field(default_factory=dict)
    session: str = ""
    version: str = ""
    config: Mapping[str, Any] | None = None
    app: str = ""
    node_keys: Mapping[str, str] = field(default_factory=dict)

    def with_record(self, record: FleetRecord) -> ManagerState:
        """With what the manager's core has to have written down."""
        return replace(self, **{part.name: getattr(record, part.name) for part in fields(FleetRecord)})

    @property
    def record(self) -> FleetRecord:
        """What the manager's core has written down."""
        return FleetRecord(**{part.name: getattr(self, part.name) for part in fields(FleetRecord)})


_ADAPTER = TypeAdapter(ManagerState)


def storage_file(storage_path: str) -> Path:
    return Path(storage_path).expanduser() / "manager.json"


def read_state(storage_path: str) -> ManagerState:
    """What the manager before wrote; an empty state where there was none. Raises `StorageError`."""
    path = storage_file(storage_path)
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ManagerState()
    except (OSError, ValidationError) as error:
        raise StorageError(f"{path} cannot be read as a manager's state ({error}); mend it, or move it away") from error


def write_state(storage_path: str, state: ManagerState) -> None:
    """Write atomically, and only while no larger epoch is on disk: that is what fences an older manager out."""
    path = storage_file(storage_path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=10):
            on_disk = read_state(storage_path)
            if on_disk.epoch > state.epoch and on_disk.session == state.session:
                raise NewerManager(f"{path} belongs to a manager of epoch {on_disk.epoch}; this one has {state.epoch}")
            if on_disk.epoch > state.epoch:
                raise StorageError(
                    f"{path} is also written by a manager of another Ray cluster, with epoch {on_disk.epoch} (here: "
                    f"{state.epoch}); give each cluster a `storage_path` of its own"
                )
            # Not pydantic's own JSON, which has no word for the infinite ends of a schedule's entries.
            write_whole(path, json.dumps(_ADAPTER.dump_python(state), indent=1))
    except OSError as error:
        raise StorageError(
            f"the manager's state cannot be written to {path} ({error}); set `storage_path` to a folder that the head "
            "node can write to"
        ) from error


class StateWriter:
    """Writes the manager's file in a thread, one write after another, each of what the state is by then.

    A disk under load takes hundreds of ms. Whoever must not be heard before it has what was asked waits for `written`.
    """

    def __init__(self, storage_path: str, state: Callable[[], ManagerState], landed: Callable[[int], None]) -> None:
        """`landed` is told the highest number that is on disk."""
        self._storage_path = storage_path
        self._state = state
        self._landed = landed
        self._thread = ThreadPoolExecutor(1, "manager.json")
        self._asked = self._on_disk = 0
        self._writing: asyncio.Task[None] | None = None

    def ask(self, number: int) -> None:
        """Something has changed that is to outlive the manager; numbers rise."""
        self._asked = number

    async def written(self) -> None:
        """Return once all that has been asked by now is on disk. Raises `StorageError`; the next call tries again."""
        asked = self._asked
        while self._on_disk < asked:
            if self._writing is None:
                self._writing = asyncio.create_task(self._write())
            await asyncio.shield(self._writing)  # others wait for it too

    async def _write(self) -> None:
        asked = self._asked
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, write_state, self._storage_path, self._state())
            self._on_disk = asked
            self._landed(asked)
        finally:
            self._writing = None

    def write_now(self, state: ManagerState) -> None:
        """Write this, behind what is being written, while everybody waits. Raises `StorageError`."""
        self._thread.submit(write_state, self._storage_path, state).result()

    def close(self) -> None:
        """Write nothing any more."""
        self._thread.shutdown(wait=False)
