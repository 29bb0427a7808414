"""An engine goes with the process that made it, whatever killed that one, and its block is cleaned up."""

import subprocess
import sys
import uuid

import psutil
import pytest

from pals_ray.engine.control_block import ControlBlock, block_path, live_engines, sweep
from pals_ray.engine.virtual.tiny_models import make_tiny_model

from .harness import ENGINE_KWARGS, ENVIRONMENT, wait_until

PARENT = """
import os, sys, time
from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock

if __name__ == "__main__":
    block = ControlBlock.create(sys.argv[1])
    os.environ |= {{**{environment!r}, BLOCK_VARIABLE: str(block.path)}}
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=sys.argv[2], **{kwargs!r}))
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def orphaned(tmp_path):
    """The node key, block and processes of an engine whose parent was just killed."""
    key = f"test{uuid.uuid4().hex[:8]}"
    path = block_path(key, "replica")
    program = tmp_path / "parent.py"
    program.write_text(PARENT.format(environment=ENVIRONMENT, kwargs=ENGINE_KWARGS))
    model = make_tiny_model("tiny-dense", tmp_path)
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(
            [sys.executable, str(program), str(path), str(model)], stdout=subprocess.PIPE, stderr=log, text=True
        )
    processes = []
    try:
        assert "up\n" in iter(parent.stdout.readline, ""), (tmp_path / "log").read_text()[-4000:]
        block = ControlBlock.attach(path)
        engine = psutil.Process(block.engine().pid)
        processes = [engine, *engine.children(recursive=True)]
        assert live_engines(key) == [block.engine()]
        assert sweep(key) == []
        parent.kill()
        parent.wait()
        yield key, path, processes
    finally:
        parent.kill()
        for process in processes:
            if process.is_running():
                process.kill()
        path.unlink(missing_ok=True)


def test_an_engine_whose_parent_is_killed_goes_within_seconds_and_its_block_is_swept(orphaned):
    key, path, processes = orphaned
    wait_until(lambda: live_engines(key) == [], 3, "EngineCore's end")
    # vLLM's workers see it by a pipe; one that sleeps in its queue may look up only every 5 s.
    wait_until(lambda: not any(process.is_running() for process in processes), 12, "its workers' end")
    assert sweep(key) == [path]
    assert not path.exists()
