import json
import math
import multiprocessing
from dataclasses import replace

import pytest

from pals_ray.control.budget.moving_budget import FollowedSignal
from pals_ray.control.budget.schedule import Entry, Schedule
from pals_ray.control.budget.signal_following import Following
from pals_ray.control.messages import ManagedGpu, NodeInfo, NodeMemo, ReplicaMemo
from pals_ray.gpus.driver_choice import HardwareSpec
from pals_ray.processes import ProcessId
from pals_ray.runtime.manager.storage import (
    ManagerState,
    NewerManager,
    StorageError,
    read_state,
    storage_file,
    write_state,
)
from pals_ray.runtime.messages import AgentSpec
from pals_ray.types import Slo, Target

SPEC = AgentSpec(
    replica_id="m#1",
    model="m",
    num_gpus=2,
    node_id="n",
    node_key="10-0-0-1",
    node_labels=(("rack", "a"),),
    replica=ProcessId(7, 8),
    block_path="/dev/shm/x",
    hardware=HardwareSpec("virtual", "A100-SXM", 4),
    storage_path="/tmp",
    gpus=("GPU-0", "GPU-1"),
    max_batch=32,
)
NODE = NodeInfo("n", (ManagedGpu("GPU-0", 100, 400, 250.5), ManagedGpu("GPU-1", 100, 400, 400, 120, False)), "rack-a")
STATE = ManagerState(
    epoch=3,
    session="session_x",
    version="v",
    config={"budget_w": 900, "models": [{"llm_config": {"a": None}}]},
    app="default",
    budget_w=900.5,
    plan=Schedule((Entry(-math.inf, 1.5e9, 800.0, 60.0), Entry(1.6e9, math.inf, 700.5))),
    targets={"m": Target(Slo(ttft_s=1.5), priority=2)},
    nodes=(NodeMemo(NODE, True, (ReplicaMemo("m#1", 2, ("GPU-0", "GPU-1")),)),),
    agents={"m#1": SPEC},
    node_keys={"n": "10-0-0-1"},
)


def test_what_was_written_is_read_back_whole(tmp_path):
    write_state(str(tmp_path / "a" / "b"), STATE)
    assert read_state(str(tmp_path / "a" / "b")) == STATE


def test_a_followed_signal_is_read_back_whole(tmp_path):
    plan = FollowedSignal(Following(1000.0, 150.0, 1200.0), (0.0, 2.0, 4.1), (0.5, -1.0, 0.0), 1.8e9)
    write_state(str(tmp_path), replace(STATE, plan=plan))
    assert read_state(str(tmp_path)).plan == plan


def test_where_nothing_was_written_a_manager_starts_from_nothing(tmp_path):
    assert read_state(str(tmp_path)) == ManagerState()


def test_a_manager_of_an_older_epoch_writes_nothing_any_more(tmp_path):
    write_state(str(tmp_path), STATE)
    with pytest.raises(NewerManager, match="belongs to a manager of epoch 3; this one has 2"):
        write_state(str(tmp_path), replace(STATE, epoch=2, budget_w=1))
    with pytest.raises(StorageError, match="another Ray cluster") as refused:
        write_state(str(tmp_path), replace(STATE, epoch=2, session="session_y"))
    assert not isinstance(refused.value, NewerManager), "two clusters would end each other's managers for ever"
    assert read_state(str(tmp_path)) == STATE
    write_state(str(tmp_path), replace(STATE, budget_w=2))
    assert read_state(str(tmp_path)).budget_w == 2


@pytest.mark.parametrize("content", ["", "{", '{"epoch": "many"}', '{"budget_w": null}'])
def test_a_damaged_file_is_named_and_never_overwritten(tmp_path, content):
    storage_file(str(tmp_path)).write_text(content)
    with pytest.raises(StorageError, match=r"manager\.json cannot be read"):
        read_state(str(tmp_path))
    with pytest.raises(StorageError):
        write_state(str(tmp_path), STATE)
    assert storage_file(str(tmp_path)).read_text() == content


def test_a_folder_that_cannot_be_written_to_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="set `storage_path` to a folder"):
        write_state(str(tmp_path / "file"), STATE)


def _write_many(folder, epoch):
    for number in range(50):
        try:
            write_state(folder, replace(STATE, epoch=epoch, budget_w=float(epoch * 1000 + number)))
        except StorageError:
            return


def test_readers_find_a_whole_file_of_a_rising_epoch_while_managers_write(tmp_path):
    write_state(str(tmp_path), replace(STATE, epoch=1))
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(str(tmp_path), e)) for e in (1, 2)]
    for writer in writers:
        writer.start()
    epochs = []
    while any(writer.is_alive() for writer in writers):
        epochs.append(json.loads(storage_file(str(tmp_path)).read_bytes())["epoch"])
    for writer in writers:
        writer.join()
    assert epochs == sorted(epochs)
    assert read_state(str(tmp_path)).epoch == 2
