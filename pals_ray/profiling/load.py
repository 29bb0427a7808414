"""Load on a running deployment through its OpenAI API: closed loops keep a number of requests in flight, open loops
send each request at its own time."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx

from pals_ray.errors import PalsError
from pals_ray.simulation.traces import Trace


class LoadError(PalsError):
    """A request failed where none should."""


#: Prompts are random token ids of this range: exact in length, in every vocabulary, never found in a prefix cache.
_TOKEN_IDS = range(32, 127)


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What a request asks for: tokens in and out."""

    prompt_tokens: int
    output_tokens: int


#: The requests of each slot, one after another.
Requests = Callable[[int], Iterator[RequestShape]]


def in_full_swing(shape: RequestShape, seed: int) -> Requests:
    """Requests whose outputs vary evenly from half of `shape`'s to one and a half times, as if they had always run.

    Were all of one length, the slots of a closed loop would end together and prefill in waves. Each slot's first
    request is the rest of one that is under way (what it has generated is part of its prompt), its length drawn in
    proportion to itself, as an observer meets it: so sequences are of all ages from the beginning.
    """
    lengths = range(max(shape.output_tokens // 2, 1), shape.output_tokens * 3 // 2 + 1)

    def requests(slot: int) -> Iterator[RequestShape]:
        draw = random.Random(f"{seed}.{slot}")
        (length,) = draw.choices(lengths, weights=lengths)
        done = draw.randrange(length)
        yield RequestShape(shape.prompt_tokens + done, length - done)
        while True:
            yield RequestShape(shape.prompt_tokens, draw.choice(lengths))

    return requests


@dataclass(slots=True)
class LoadResult:
    """What the clients saw. Times are s of the clients' monotonic clock; `failures` the errors, in order."""

    started_s: float
    ended_s: float = 0.0
    output_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


async def event_lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of an event stream. Not httpx's own, which end at whatever Unicode takes for the end of a line: a model
    may generate such a character, and JSON leaves it as it is, in the middle of an event."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line.rstrip("\r")
    if rest:
        yield rest


class ClosedLoop:
    """`concurrency` streaming completions in flight; each ends before the next one of its slot begins."""

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int,
        requests: RequestShape | Requests,
        timeout_s: float = 120.0,
    ) -> None:
        self._model = model
        self._requests = (lambda _: itertools.repeat(requests)) if isinstance(requests, RequestShape) else requests
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.AsyncClient(base_url=base_url, timeout=timeout_s, limits=limits)
        self._concurrency = concurrency
        self._stopping = False
        self._slots: list[asyncio.Task[None]] = []
        self.result = LoadResult(time.monotonic())

    async def __aenter__(self) -> ClosedLoop:
        self.result = LoadResult(time.monotonic())
        self._slots = [asyncio.create_task(self._slot(i)) for i in range(self._concurrency)]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Wait for the requests in flight, unless they were abandoned, and stop."""
        self._stopping = True
        ended = await asyncio.gather(*self._slots, return_exceptions=True)
        self.result.ended_s = time.monotonic()
        await self._client.aclose()
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def abandon(self) -> None:
        """Drop the requests in flight: their streams are closed, and the engine gives them up."""
        self._stopping = True
        for slot in self._slots:
            slot.cancel()

    async def _slot(self, slot: int) -> None:
        for shape in self._requests(slot):
            if self._stopping:
                return
            if not await self._request(shape):
                await asyncio.sleep(0.2)

    async def _request(self, shape: RequestShape) -> bool:
        """Send a request and note what came of it; False where it failed."""
        try:
            await self._stream(shape)
        except (httpx.HTTPError, json.JSONDecodeError, LoadError) as error:
            self.result.failures.append(f"{type(error).__name__}: {error}")
            return False
        return True

    async def _stream(self, shape: RequestShape) -> None:
        body = {
            "model": self._model,
            "prompt": random.choices(_TOKEN_IDS, k=shape.prompt_tokens),
            "max_tokens": shape.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked_s = time.monotonic()
        first_s: float | None = None
        tokens: int | None = None
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise LoadError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}")
            async for line in event_lines(response):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                first_s = first_s or time.monotonic()
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise LoadError(f"error in the stream: {chunk['error']}")
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
        if tokens is None or first_s is None:
            raise LoadError("the stream ended without its usage chunk: the request was cut off")
        self.result.output_tokens += tokens
        self.result.ttft_s.append(first_s - asked_s)


class OpenLoop(ClosedLoop):
    """The requests of a trace, sent to one model at their times from the start on. Leaving waits for the last answer,
    unless what is in flight or still to come is abandoned.

    An engine that falls behind is not spared: that is what queues, and late requests, come from.
    """

    def __init__(self, base_url: str, model: str, trace: Trace, timeout_s: float = 600.0) -> None:
        super().__init__(base_url, model, len(trace), RequestShape(1, 1), timeout_s)
        self._trace = trace

    async def _slot(self, slot: int) -> None:
        trace = self._trace
        await asyncio.sleep(max(self.result.started_s + float(trace.arrival_s[slot]) - time.monotonic(), 0.0))
        await self._request(RequestShape(int(trace.prompt_tokens[slot]), int(trace.output_tokens[slot])))


@asynccontextmanager
async def loaded(*loads: ClosedLoop) -> AsyncIterator[None]:
    """Run these loads while the block runs; at its end the requests in flight are dropped, not waited for."""
    async with AsyncExitStack() as stack:
        for load in loads:
            await stack.enter_async_context(load)
        try:
            yield
        finally:
            for load in loads:
                load.abandon()
