"""What is recorded of a model's requests and inter-token latencies while its engines run."""

from __future__ import annotations

from array import array
from math import ceil, log

import numpy as np

from pals_ray.simulation.results.run_result import FINE_EDGES_S, RequestOutcomes
from pals_ray.simulation.traces import Trace
from pals_ray.types import LATENCY_EDGES_S

_FINE_FIRST, _FINE_STEP = log(FINE_EDGES_S[0]), log(1.01)
_FINE_LAST = len(FINE_EDGES_S)
_FIRST, _STEP = log(LATENCY_EDGES_S[0]), log(1.05)
_LAST = len(LATENCY_EDGES_S)


def bucket(latency_s: float) -> int:
    """The bucket of a latency over `LATENCY_EDGES_S`: that of the first edge not below it."""
    return min(max(ceil((log(latency_s) - _FIRST) / _STEP - 1e-9), 0), _LAST)


def fine_bucket(latency_s: float) -> int:
    """The same over `FINE_EDGES_S`."""
    return min(max(ceil((log(latency_s) - _FINE_FIRST) / _FINE_STEP - 1e-9), 0), _FINE_LAST)


class ModelLog:
    """One model's requests, by index, in compact arrays; shared by the engines that serve it."""

    def __init__(self, requests: Trace) -> None:
        n = len(requests)
        self._requests = requests
        self.arrival_s = array("d", requests.arrival_s.tolist())
        self.prompt = array("q", requests.prompt_tokens.tolist())
        self.output = array("q", requests.output_tokens.tolist())
        self.first_token_s = array("d", [np.nan]) * n
        self.finish_s = array("d", [np.nan]) * n
        self.tokens = array("q", [0]) * n
        self.replica = array("q", [-1]) * n
        self.itl_counts = [0] * (_FINE_LAST + 1)

    def outcomes(self) -> RequestOutcomes:
        """What became of the requests so far."""
        requests = self._requests
        return RequestOutcomes(
            requests.arrival_s,
            requests.prompt_tokens,
            requests.output_tokens,
            np.array(self.first_token_s),
            np.array(self.finish_s),
            np.array(self.tokens),
            np.array(self.replica),
        )
