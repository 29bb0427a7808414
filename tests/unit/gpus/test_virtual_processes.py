"""Virtual GPUs between real processes: claims exclude, and nobody reads half a record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import Latch, VirtualBlock

DEADLINE_S = 30.0

OPEN_AND_CLAIM = """
import sys, time
from pals_ray.gpus.virtual import VirtualDriver
key, count, claims = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
print("imported", flush=True)
start_s = float(sys.stdin.readline())
while time.monotonic() < start_s:
    pass
driver = VirtualDriver.open(key, "A100-SXM", count)
print(*[driver.claim_lowest_free().index for _ in range(claims)], flush=True)
sys.stdin.readline()
"""

BOOK = """
import sys, time
from pals_ray.gpus.virtual import VirtualDriver
gpu = VirtualDriver.attach(sys.argv[1]).claim_lowest_free()
print(gpu.index, flush=True)
watts = 100.0 + gpu.index
while True:
    # A record is whole if its power and its length belong together: watts of 100, 101, .. and as many us.
    watts = watts + 4.0 if watts < 300.0 else 100.0 + gpu.index
    now = time.monotonic()
    gpu.record_step(now, now + watts * 1e-6, watts, binding=False)
"""

WRITE_LATCH = """
import sys
from pals_ray.gpus.virtual_block import VirtualBlock
latch = VirtualBlock.attach(sys.argv[1]).latch("cap", 0)
print("writing", flush=True)
k = 0.0
while True:
    k += 1.0
    latch.write((k, k, k, k))
"""


@contextmanager
def python(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.005)


def looking(until: Callable[[], bool], at_least_s: float = 1.0) -> Iterator[None]:
    """Go round for at least that long, and until there was something to see."""
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < at_least_s or not until():
        assert time.monotonic() - begin_s < DEADLINE_S, "the other processes do not get to write"
        yield


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def said(process: subprocess.Popen[str]) -> list[int]:
    return [int(word) for word in line(process).split()]


def start_together(*processes: subprocess.Popen[str]) -> None:
    """Let processes that have said "imported" go at one instant."""
    for process in processes:
        assert line(process) == "imported"
    start_s = time.monotonic() + 0.05
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{start_s}\n")
        process.stdin.flush()


def test_processes_that_open_and_claim_at_once_share_one_block_and_no_gpu(node_key: str) -> None:
    with python(OPEN_AND_CLAIM, node_key, 64, 32) as one, python(OPEN_AND_CLAIM, node_key, 64, 32) as other:
        start_together(one, other)
        first, second = said(one), said(other)
        assert sorted(first + second) == list(range(64))
        holders = {gpu.index: gpu.process_ids() for gpu in VirtualDriver.attach(node_key).gpus()}
        assert holders == {i: (one.pid if i in first else other.pid,) for i in range(64)}


def test_a_killed_holder_leaves_its_gpu_free_and_at_bare_idle(node_key: str) -> None:
    driver = VirtualDriver.open(node_key, "A100-SXM", 2)
    gpu = driver.gpus()[0]
    with python(OPEN_AND_CLAIM, node_key, 2, 1) as rank:
        start_together(rank)
        assert said(rank) == [0]
        assert gpu.power_w() == gpu.spec.idle_context_w
        rank.send_signal(signal.SIGKILL)
        wait_for(lambda: gpu.process_ids() == (), "the claim of a killed process is given up")
    assert gpu.power_w() == gpu.spec.idle_bare_w
    assert driver.claim_lowest_free().index == 0


def test_four_book_while_one_reads_whole_loads_and_growing_counters(node_key: str) -> None:
    driver = VirtualDriver.open(node_key, "A100-SXM", 4)
    with (
        python(BOOK, node_key) as a,
        python(BOOK, node_key) as b,
        python(BOOK, node_key) as c,
        python(BOOK, node_key) as d,
    ):
        assert sorted(said(p)[0] for p in (a, b, c, d)) == [0, 1, 2, 3]
        energy_j = [0.0] * 4
        versions = [gpu._load._latch.version() for gpu in driver.gpus()]

        def all_written(times: int) -> bool:
            now = [gpu._load._latch.version() for gpu in driver.gpus()]
            return all(after > before + times for before, after in zip(versions, now, strict=True))

        for _ in looking(until=lambda: all_written(100)):
            for i, gpu in enumerate(driver.gpus()):
                load = gpu._load.read()
                if load.power_w != load.rest_w:
                    assert (load.power_w - i) % 4.0 == 0.0
                    assert load.end_s - load.start_s == pytest.approx(load.power_w * 1e-6, rel=1e-3)
                grown_j = gpu.energy_j()
                assert grown_j >= energy_j[i]
                energy_j[i] = grown_j


def test_a_latched_record_is_never_torn(node_key: str) -> None:
    VirtualDriver.open(node_key, "A100-SXM", 1)
    latch: Latch = VirtualBlock.attach(node_key).latch("cap", 0)
    with python(WRITE_LATCH, node_key) as writer:
        assert line(writer) == "writing"
        start = latch.version()
        wait_for(lambda: latch.version() > start, "the writer writes")
        read: list[float] = []
        for _ in looking(until=lambda: len(read) > 100):
            values = latch.read()
            assert len(set(values)) == 1
            if not read or values[0] != read[-1]:
                read.append(values[0])
    assert read == sorted(read)


def test_a_writer_killed_at_any_moment_blocks_no_reader(node_key: str) -> None:
    driver = VirtualDriver.open(node_key, "A100-SXM", 1)
    gpu = driver.gpus()[0]
    for _ in range(5):
        with python(BOOK, node_key) as rank:
            assert said(rank) == [0]
            os.kill(rank.pid, signal.SIGKILL)
        wait_for(lambda: gpu.holder() is None, "the claim of a killed process is given up")
        assert gpu.energy_j() >= 0.0
        assert gpu.power_w() == gpu.spec.idle_bare_w


def test_limits_ordered_by_several_processes_at_once_are_one_of_the_orders(node_key: str) -> None:
    code = (
        "import sys; from pals_ray.gpus.virtual import VirtualDriver\n"
        "gpu = VirtualDriver.attach(sys.argv[1]).gpus()[0]\n"
        "for _ in range(200): gpu.set_limit_w(float(sys.argv[2]))\n"
        "print(1, flush=True)"
    )
    gpu = VirtualDriver.open(node_key, "A100-SXM", 1).gpus()[0]
    gpu.set_limit_w(150.0)
    wait_for(lambda: gpu.effective_cap_w(time.monotonic()) == 150.0, "the cap settles")
    with python(code, node_key, 150) as low, python(code, node_key, 350) as high:
        while low.poll() is None or high.poll() is None:
            assert gpu.limit_w() in (150.0, 350.0)
            assert 150.0 <= gpu.effective_cap_w(time.monotonic()) <= 350.0
        assert (low.returncode, high.returncode) == (0, 0)
