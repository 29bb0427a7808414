"""What is written down of a model's requests and token gaps while its engines run."""

from __future__ import annotations

from array import array
from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from pals_ray.simulation.results.run_result import FINE_EDGES_S, RequestOutcomes
from pals_ray.simulation.setting import Requests
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

    def __init__(self, requests: Requests) -> None:
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
        """What became of them so far."""
        return RequestOutcomes(
            arrival_s=self._requests.arrival_s,
            prompt_tokens=self._requests.prompt_tokens,
            output_tokens=self._requests.output_tokens,
            first_token_s=_floats(self.first_token_s),
            finish_s=_floats(self.finish_s),
            tokens=_whole(self.tokens),
            replica=_whole(self.replica),
        )


def _floats(values: array[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def _whole(values: array[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
