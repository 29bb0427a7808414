"""The result of a run: every request, every replica over time, energy, verdicts, and how the budget was kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pals_ray.control.slo import BoolArray, good_requests
from pals_ray.types import Slo, Target

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Series = NDArray[np.float32]

#: Edges of the pooled latency histograms, s: 1 % steps from 0.1 ms to about 2.5 h; one more count for what is over.
FINE_EDGES_S: FloatArray = np.asarray(1e-4 * 1.01 ** np.arange(1832), dtype=np.float64)


def quantile_s(counts: IntArray, q: float) -> float | None:
    """The `q` quantile of a histogram over `FINE_EDGES_S`, s, to 1 %; None where it is empty."""
    total = int(counts.sum())
    if total == 0:
        return None
    at = int(np.searchsorted(np.cumsum(counts), q * total))
    return float(FINE_EDGES_S[min(at, len(FINE_EDGES_S) - 1)])


@dataclass(frozen=True, eq=False, slots=True)
class RequestOutcomes:
    """What became of a model's requests, (n,) each, in the order offered. nan where it has not happened by the end.

    `tokens` are output tokens so far, `replica` the index in `RunResult.replicas` (-1: never routed).
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    first_token_s: FloatArray
    finish_s: FloatArray
    tokens: IntArray
    replica: IntArray

    @property
    def ttft_s(self) -> FloatArray:
        """(n,) time to first token, s."""
        return self.first_token_s - self.arrival_s

    def verdicts(self, slo: Slo, now_s: float) -> tuple[BoolArray, BoolArray]:
        """(n,) each: which are good by now, and which are late."""
        return good_requests(self.arrival_s, self.first_token_s, self.finish_s, self.output_tokens, slo, now_s)


@dataclass(frozen=True, eq=False, slots=True)
class ModelResult:
    """One model over the run. `itl_counts` is the histogram of all inter-token latencies over `FINE_EDGES_S`."""

    name: str
    target: Target
    requests: RequestOutcomes
    itl_counts: IntArray

    def itl_s(self, q: float) -> float | None:
        """A quantile of all inter-token latencies, s."""
        return quantile_s(self.itl_counts, q)


@dataclass(frozen=True, eq=False, slots=True)
class ReplicaResult:
    """One replica. Series have the length of `RunResult.time_s`.

    `energy_j` and `power_w` are GPU watts of the group (`power_w`: mean over the interval before), `cap_w` the limit
    ordered on each GPU, `binding` the share of the interval in which it held the clock down. `cap_changes` counts
    changes of that limit, `decisions` the beats at which the controller changed the cap or the batch limit.
    """

    replica_id: str
    model: str
    energy_j: float
    tokens: int
    preemptions: int
    decisions: int
    cap_changes: int
    power_w: Series
    cap_w: Series
    batch_limit: Series
    running: Series
    waiting: Series
    tokens_per_s: Series
    binding: Series


@dataclass(frozen=True, slots=True)
class Cut:
    """A fall of the budget: from and to, W; `settled_s` until all that is charged was within it (None: not by the
    end), and by how much the charge was over it at most, W."""

    at_s: float
    from_w: float
    to_w: float
    settled_s: float | None
    most_over_w: float


@dataclass(frozen=True, eq=False, slots=True)
class RunResult:
    """A whole run. Series are (T,): the state at `time_s`, rates and watts as means over the interval before.

    `power_w` is GPU watts of all managed GPUs, `node_power_w` what budgets speak of (overhead included); `budget_w`
    includes the reserve, `charge_w` what the limits in force occupy. `over_budget_s` and `over_budget_max_w` are of
    drawn node watts in bins of `METER_S`; `charge_over_s` is how long the charge was over the budget, which cuts
    alone may cause. `stranded_w` is the mean charge that nobody drew. `target_w` is what a followed signal asked for
    (None without one). Requests were followed up to `followed_s`, everything else up to `duration_s`.
    """

    duration_s: float
    followed_s: float
    models: Mapping[str, ModelResult]
    replicas: tuple[ReplicaResult, ...]
    time_s: FloatArray
    budget_w: FloatArray
    charge_w: FloatArray
    power_w: FloatArray
    node_power_w: FloatArray
    target_w: FloatArray | None
    energy_j: float
    node_energy_j: float
    tokens: int
    over_budget_s: float
    over_budget_max_w: float
    charge_over_s: float
    stranded_w: float
    cuts: tuple[Cut, ...]
    grants: int
    notes: tuple[str, ...] = ()
