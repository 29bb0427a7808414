"""What becomes of an engine's requests: told to a judge as the scheduler sees it; counts go to the control block.

Free of vLLM, to be tested alone. TTFT counts from the frontend's arrival time, so that whatever a request waits for is
in it: frontend, the running step, the queue before EngineCore. That time is on the wall clock; how long ago it was is
taken once, when EngineCore hears of the request, and all else is on the monotonic clock: a wall clock that is set
changes no verdict but of requests on their way to EngineCore.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from math import inf
from typing import Any, Protocol

from pals_ray.control.slo import RequestJudge
from pals_ray.engine.control_block import ControlBlock, RecordWriter

#: Of the names of vLLM's statuses those of requests that ended otherwise than they should.
_ABORTED, _FAILED = "FINISHED_ABORTED", frozenset({"FINISHED_ERROR", "FINISHED_IGNORED"})


class EngineRequest(Protocol):
    """What is asked of vLLM's `Request`. A resumable one is a session, whose client adds input after each answer."""

    request_id: str
    arrival_time: float
    status: Enum
    resumable: bool
    sampling_params: Any

    @property
    def num_output_tokens(self) -> int: ...


class RequestWatch:
    """Follows an engine's requests from step to step, at a cost of those that come, begin to be answered, or end.

    Sessions are counted as they come and not judged: when their tokens come depends on when their clients speak.
    """

    def __init__(
        self, block: ControlBlock, now_s: Callable[[], float] = time.monotonic, wall_s: Callable[[], float] = time.time
    ) -> None:
        self._now_s, self._wall_s = now_s, wall_s
        self._judge = RequestJudge()
        self._ttft_limit_s, self._tpot_limit_s = block.field("ttft_limit_s"), block.field("tpot_limit_s")
        self._arrived = 0
        # Requests by id until they end; ids of those that were scheduled and have no token yet.
        self._requests: dict[str, EngineRequest] = {}
        self._prefilling: set[str] = set()
        self._token_s = now_s()
        self._writer = RecordWriter(block.field("judge_sequence"))
        counts = ("arrived", "good", "late_ttft", "late_tpot", "late_failed", "good_tokens", "unjudged")
        self._fields = [block.field(name) for name in counts]
        self._published = (0,) * len(counts)

    def arrived(self, request: EngineRequest) -> None:
        """A request that was not known has come to the scheduler."""
        self._arrived += 1
        if not request.resumable:
            self._requests[request.request_id] = request
            ago_s = max(self._wall_s() - request.arrival_time, 0.0)
            self._judge.arrived(request.request_id, self._now_s() - ago_s)
        self._publish()

    def tokens_came(self) -> None:
        """The workers have answered: the tokens that the scheduler is about to take over have come now."""
        self._token_s = self._now_s()

    def stepped(self, scheduled: Iterable[str], ended: Collection[str]) -> None:
        """The scheduler has taken a step's tokens over.

        `scheduled` are the requests scheduled in that step for the first time, `ended` at least those that ended.
        """
        self._read_limits()
        self._prefilling.update(scheduled)
        if self._prefilling:
            for name in [name for name in self._prefilling if self._has_begun(name)]:
                self._prefilling.remove(name)
                self._judge.first_token(name, self._token_s)
        self._settle(ended, by_client=True)

    def ended(self, names: Collection[str], by_client: bool = True) -> None:
        """Judge which of these requests have ended and were not judged, and which have waited too long.

        Those that were aborted were so by their clients, unless told otherwise: then they failed by us.
        """
        self._read_limits()
        self._settle(names, by_client)

    def _read_limits(self) -> None:
        self._judge.ttft_limit_s = self._ttft_limit_s.item(0) or inf
        self._judge.tpot_limit_s = self._tpot_limit_s.item(0) or inf

    def _settle(self, names: Collection[str], by_client: bool) -> None:
        self._judge.look(self._now_s())
        for name in names:
            request = self._requests.get(name)
            if request is not None and request.status.name.startswith("FINISHED"):
                del self._requests[name]
                self._prefilling.discard(name)
                self._judge_end(request, by_client)
        self._publish()

    def _has_begun(self, name: str) -> bool:
        """Whether its first token has come; also where it is not followed any more."""
        request = self._requests.get(name)
        return request is None or request.num_output_tokens > 0

    def _judge_end(self, request: EngineRequest, by_client: bool) -> None:
        name, status, tokens = request.request_id, request.status.name, request.num_output_tokens
        aborted = status == _ABORTED
        if status in _FAILED or (aborted and not by_client):
            self._judge.failed(name)
        elif aborted and not (tokens and _may_stop_by_text(request)):
            self._judge.aborted(name, self._token_s, tokens)
        else:
            self._judge.ended(name, self._token_s, tokens)

    def _publish(self) -> None:
        judge = self._judge
        late = (judge.late_ttft, judge.late_tpot, judge.late_failed)
        counts = (self._arrived, judge.good, *late, judge.good_tokens, judge.unjudged)
        if counts != self._published:
            self._published = counts
            with self._writer:
                for field, count in zip(self._fields, counts, strict=True):
                    field[0] = count


def _may_stop_by_text(request: EngineRequest) -> bool:
    """Whether it has stop strings. vLLM's frontend finds them, and then aborts the request, which has ended as it
    should; EngineCore cannot tell that from a client that has gone."""
    return bool(getattr(request.sampling_params, "stop", None))
