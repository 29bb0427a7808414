"""Real vLLM engines on the CPU, one at a time, each with a control block and, if paced, virtual GPUs of its own."""

import asyncio
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from pals_ray.engine.control_block import BLOCK_VARIABLE, ControlBlock, block_path
from pals_ray.engine.virtual.pacing import PACING_VARIABLE, PacingConfig
from pals_ray.engine.virtual.tiny_models import make_tiny_model
from pals_ray.gpus.virtual import VirtualDriver
from pals_ray.gpus.virtual_block import remove_block
from pals_ray.processes import is_alive

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
ENGINE_KWARGS = {
    "load_format": "dummy",
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 128 << 20,
    "stream_interval": 16,
    "scheduler_cls": "pals_ray.engine.scheduler.PowerAwareScheduler",
    "worker_extension_cls": "pals_ray.engine.worker_extension.PowerWorkerExtension",
}


def wait_until(condition, deadline_s, what):
    """Wait for a condition and return its value; fails with `what` at the deadline."""
    until = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < until, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)
    return value


@dataclass
class Engine:
    """An AsyncLLM on an event loop of its own, for tests that look at it from outside while it serves."""

    block: ControlBlock
    driver: VirtualDriver | None
    loop: asyncio.AbstractEventLoop
    llm: object

    def generate(self, max_tokens, prompt="The quick brown fox", **sampling) -> Future:
        """Start a request; the future gives its one `CompletionOutput`; cancelling it aborts the request."""
        from vllm import SamplingParams

        async def run():
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
            async for output in self.llm.generate({"prompt": prompt}, params, uuid.uuid4().hex):
                last = output
            return last.outputs[0]

        return asyncio.run_coroutine_threadsafe(run(), self.loop)

    def call_ranks(self, method):
        """One answer per rank."""
        return asyncio.run_coroutine_threadsafe(self.llm.collective_rpc(method), self.loop).result(30)


def run_engine(model, folder, virtual_gpus=0, **kwargs):
    """Start an engine, yield it as `Engine`, and stop it. Its environment is this process's meanwhile."""
    key = f"test{uuid.uuid4().hex[:8]}"
    block = ControlBlock.create(block_path(key, "replica"))
    environment = {**ENVIRONMENT, BLOCK_VARIABLE: str(block.path)}
    driver = None
    if virtual_gpus:
        driver = VirtualDriver.open(key, "A100-SXM", virtual_gpus)
        kwargs["worker_cls"] = "pals_ray.engine.virtual.paced_worker.PacedWorker"
        config = PacingConfig(node_key=key, stands_for="Mixtral-8x7B", time_scale=2)
        environment[PACING_VARIABLE] = config.model_dump_json()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("VLLM_PLUGINS", raising=False)

        async def start():
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            path = make_tiny_model(model, folder)
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(path), **ENGINE_KWARGS, **kwargs))

        llm = asyncio.run_coroutine_threadsafe(start(), loop).result(180)
        engine = Engine(block, driver, loop, llm)
        try:
            engine.generate(max_tokens=8).result(60)  # The first request of an engine takes seconds.
            yield engine
        finally:
            loop.call_soon_threadsafe(llm.shutdown)
            wait_until(lambda: not is_alive(block.engine()), 30, "EngineCore's end")
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            block.unlink()
            if driver is not None:
                remove_block(key)
