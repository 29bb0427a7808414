"""The control block: what is written arrives, whole, and outlives whoever dies."""

import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals_ray.engine import control_block
from pals_ray.engine.control_block import (
    BlockError,
    ControlBlock,
    RecordWriter,
    add_latencies,
    block_path,
    live_engines,
    sweep,
)
from pals_ray.processes import identify
from pals_ray.types import LATENCY_EDGES_S, Verdicts

COUNTERS = ("prompt_tokens", "generation_tokens", "requests_finished", "preemptions")


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node key of this test's own, with its blocks in a folder of this test's own."""
    monkeypatch.setattr(control_block, "_DIRECTORY", tmp_path)
    return f"test{uuid.uuid4().hex[:8]}"


def other_process(path, body):
    """Run `body` with a block that another process owns; returns it once it has printed a line."""
    code = f"from pals_ray.engine.control_block import ControlBlock\nblock = ControlBlock.create({str(path)!r})\n{body}"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_limit_ordered_by_one_side_is_read_by_the_other(node):
    agent = ControlBlock.create(block_path(node, "r"))
    engine = ControlBlock.attach(block_path(node, "r"))
    agent.order_batch_limit(7)
    assert engine.field("batch_limit").item(0) == 7


def test_a_limit_below_one_is_refused_and_changes_nothing(node):
    block = ControlBlock.create(block_path(node, "r"))
    block.order_batch_limit(3)
    with pytest.raises(BlockError, match="the least is 1"):
        block.order_batch_limit(0)
    assert block.field("batch_limit").item(0) == 3


def test_latency_limits_are_unordered_in_a_fresh_block_and_may_be_none(node):
    agent = ControlBlock.create(block_path(node, "r"))
    limits = [ControlBlock.attach(agent.path).field(name) for name in ("ttft_limit_s", "tpot_limit_s")]
    assert [limit.item(0) for limit in limits] == [0.0, 0.0]
    agent.order_latency_limits(2.0, float("inf"))
    assert [limit.item(0) for limit in limits] == [2.0, float("inf")]


@pytest.mark.parametrize("wrong_s", [0.0, -1.0, float("nan")])
def test_latency_limits_that_are_none_such_are_refused_and_change_nothing(node, wrong_s):
    block = ControlBlock.create(block_path(node, "r"))
    block.order_latency_limits(2.0, 0.1)
    for limits_s in ((wrong_s, 0.2), (3.0, wrong_s)):
        with pytest.raises(BlockError, match="must be positive"):
            block.order_latency_limits(*limits_s)
    assert (block.field("ttft_limit_s").item(0), block.field("tpot_limit_s").item(0)) == (2.0, 0.1)


def test_every_field_is_an_aligned_word(node):
    block = ControlBlock.create(block_path(node, "r"))
    for name in control_block._LAYOUT.names:
        array = block.field(name)
        assert array.dtype.itemsize == 8
        assert array.ctypes.data % 8 == 0


def test_telemetry_returns_what_the_engine_wrote(node):
    block = ControlBlock.create(block_path(node, "r"))
    written = {
        **dict.fromkeys(("running", "waiting", "max_batch", "steps", "late_steps"), 0),
        "arrived": 20,
        **{name: 10 + i for i, name in enumerate(COUNTERS)},
        "kv_use": 0.25,
        "modelled_s": 1.5,
        "wall_s": 1.75,
    }
    verdicts = {"good": 5, "late_ttft": 4, "late_tpot": 3, "late_failed": 2, "good_tokens": 50}
    for name, value in (written | verdicts).items():
        block.field(name)[0] = value
    block.field("limit_in_force")[0] = 4
    add_latencies(block.field("itl_counts"), [0.02, 0.02, 1000.0])
    add_latencies(block.field("tpot_counts"), [0.02])
    before_s = time.monotonic()
    telemetry = ControlBlock.attach(block.path).telemetry()
    assert {name: getattr(telemetry, name) for name in written} == written
    assert telemetry.verdicts == Verdicts(**verdicts)
    assert telemetry.batch_limit == 4
    assert sum(telemetry.tpot_counts) == 1
    assert sum(telemetry.itl_counts) == 3
    assert telemetry.itl_counts[-1] == 1
    assert sum(telemetry.ttft_counts) == 0
    assert before_s <= telemetry.time_s <= time.monotonic()


def test_a_missing_block_is_a_clear_error(node):
    with pytest.raises(BlockError, match="no control block at"):
        ControlBlock.attach(block_path(node, "none"))


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * 5000])
def test_a_file_that_is_no_block_is_refused(node, content):
    block_path(node, "r").write_bytes(content)
    with pytest.raises(BlockError):
        ControlBlock.attach(block_path(node, "r"))


def test_a_block_of_another_version_is_refused(node):
    block = ControlBlock.create(block_path(node, "r"))
    block.field("version")[0] += 1
    with pytest.raises(BlockError, match="differ in version"):
        ControlBlock.attach(block.path)


def test_a_live_process_keeps_its_name_to_itself(node):
    ControlBlock.create(block_path(node, "r"))
    with pytest.raises(BlockError, match=f"process {os.getpid()}, which is alive"):
        ControlBlock.create(block_path(node, "r"))


def test_creating_leaves_no_other_file(node, tmp_path):
    ControlBlock.create(block_path(node, "r"))
    assert [path.name for path in tmp_path.iterdir()] == [block_path(node, "r").name]


def test_a_block_outlives_the_death_of_its_owner_and_is_then_swept(node):
    path = block_path(node, "r")
    owner = other_process(path, "block.order_batch_limit(5); print('ready', flush=True)\nimport time; time.sleep(60)")
    owner.stdout.readline()
    block = ControlBlock.attach(path)
    assert sweep(node) == []
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert block.field("batch_limit").item(0) == 5
    assert sweep(node) == [path]
    assert not path.exists()
    block.order_batch_limit(6)  # the mapping stays usable


def test_a_dead_owners_name_is_taken_over_with_a_zeroed_block(node):
    path = block_path(node, "r")
    other_process(path, "block.order_batch_limit(5)").wait()
    assert ControlBlock.create(path).field("batch_limit").item(0) == 0


def test_a_block_whose_engine_lives_is_not_swept_and_its_engine_is_named(node):
    path = block_path(node, "r")
    other_process(path, "").wait()
    block = ControlBlock.attach(path)
    block.field("engine_pid")[0], block.field("engine_start_ticks")[0] = identify()
    assert live_engines(node) == [identify()]
    assert sweep(node) == []
    block.field("engine_start_ticks")[0] += 1  # the pid was reused
    assert live_engines(node) == []
    assert sweep(node) == [path]


def test_sweeping_touches_neither_other_nodes_nor_other_files(node):
    foreign = [block_path(f"{node}0", "r"), block_path(node, "notes")]
    other_process(foreign[0], "").wait()
    foreign[1].write_text("not a block")
    assert sweep(node) == []
    assert all(path.exists() for path in foreign)


WRITE_RECORDS = f"""
import time
from pals_ray.engine.control_block import RecordWriter
writer = RecordWriter(block.field("logger_sequence"))
print("ready", flush=True)
while True:
    with writer:
        for name in {COUNTERS}:
            block.field(name)[0] += 1
    time.sleep(0.0001)
"""


def test_a_record_is_never_read_half_written(node):
    path = block_path(node, "r")
    writer = other_process(path, WRITE_RECORDS)
    try:
        writer.stdout.readline()
        block = ControlBlock.attach(path)
        seen, deadline = set(), time.monotonic() + 30
        while len(seen) < 1000 and time.monotonic() < deadline:
            telemetry = block.telemetry()
            assert len({getattr(telemetry, name) for name in COUNTERS}) == 1
            seen.add(telemetry.generation_tokens)
        assert len(seen) >= 1000
    finally:
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("sequence", ["judge_sequence", "logger_sequence", "worker_sequence"])
def test_a_writer_that_died_within_a_record_blocks_neither_readers_nor_its_successor(node, sequence):
    block = ControlBlock.create(block_path(node, "r"))
    block.field(sequence)[0] = 3
    block.field("generation_tokens")[0] = 9
    started_s = time.monotonic()
    assert block.telemetry().generation_tokens == 9
    assert time.monotonic() - started_s < 1.0
    with RecordWriter(block.field(sequence)):
        assert block.field(sequence).item(0) % 2 == 1
    assert block.field(sequence).item(0) % 2 == 0


@given(st.lists(st.floats(0, 500) | st.sampled_from(LATENCY_EDGES_S), max_size=60))
def test_latencies_are_counted_under_the_edge_that_bounds_them(latencies_s):
    counts = np.zeros(len(LATENCY_EDGES_S) + 1, dtype=np.int64)
    add_latencies(counts, latencies_s)
    expected = np.bincount(np.searchsorted(LATENCY_EDGES_S, latencies_s), minlength=len(counts))
    assert counts.tolist() == expected.tolist()
