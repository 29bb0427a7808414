"""Load that comes when it comes: each request at its own time, however many are in flight."""

from __future__ import annotations

import asyncio
import json
import time

import httpx

from pals_ray.profiling.load import ClosedLoop, LoadError, RequestShape
from pals_ray.simulation.traces import Trace


class OpenLoop(ClosedLoop):
    """The requests of a trace, sent to one model at their times from the start on. Leaving waits for the last answer,
    unless what is in flight or still to come is abandoned.

    An engine that falls behind is not spared: that is what queues, and violations, come from.
    """

    def __init__(self, base_url: str, model: str, trace: Trace, timeout_s: float = 600.0) -> None:
        super().__init__(base_url, model, len(trace), RequestShape(1, 1), timeout_s)
        self._trace = trace

    async def _slot(self, slot: int) -> None:
        trace = self._trace
        await asyncio.sleep(max(self.result.started_s + float(trace.arrival_s[slot]) - time.monotonic(), 0.0))
        try:
            await self._request(RequestShape(int(trace.prompt_tokens[slot]), int(trace.output_tokens[slot])))
        except (httpx.HTTPError, json.JSONDecodeError, LoadError) as error:
            self.result.failures.append(f"{type(error).__name__}: {error}")
