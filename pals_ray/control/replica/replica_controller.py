"""One replica's controller: it holds target, model and correction, learns from telemetry and chooses the point."""

from __future__ import annotations

from pals_ray.control.charge import ChargeTerms
from pals_ray.control.replica.controller_state import ControllerConfig, ControllerState, Situation
from pals_ray.control.replica.operating_point import DEFAULTS, decide
from pals_ray.control.snapshot import Arrivals
from pals_ray.control.telemetry import RATE_S, TelemetryWindow
from pals_ray.models.correction import CorrectedModel, Correction, Observation
from pals_ray.models.power_model import PowerModel
from pals_ray.types import Expected, Grant, OperatingPoint, ReplicaTelemetry, Target

#: What comes to replicas that are alike is known from the manager; it counts for so long, s.
ALIKE_S = 5.0


class ReplicaController:
    """Chooses one replica's operating points; times are s of the agent's monotonic clock."""

    def __init__(self, num_gpus: int, config: ControllerConfig = DEFAULTS) -> None:
        self.correction = Correction()
        self.target = Target()
        self._num_gpus = num_gpus
        self._config = config
        self._model: PowerModel | None = None
        self._source = ""
        self._state = ControllerState()
        self._looked_s: float | None = None
        self._seen = ReplicaTelemetry()
        self._alike: tuple[Arrivals | None, float] = None, 0.0

    def take_model(self, model: PowerModel | None, source: str) -> None:
        """Predict by this model from now on (None: by none); a model from another source begins without corrections."""
        if source != self._source:
            self.correction = Correction()
        self._model, self._source = model, source

    def take_alike(self, arrivals: Arrivals | None, now_s: float) -> None:
        """What comes to the model's replicas that are alike, in the mean; used for `ALIKE_S`."""
        self._alike = arrivals, now_s

    @property
    def expected(self) -> Expected | None:
        """The prediction behind the point in force; None without a model."""
        return self._state.expected

    @property
    def arrivals(self) -> Arrivals | None:
        """What arrives, and what SLO feedback makes of it; None before it is known."""
        return self._state.demand.arrivals(self._seen, self._state.slo.strain, self._state.latency.factors)

    def natural_draw_w(self, window: TelemetryWindow, seen: ReplicaTelemetry, max_limit_w: float) -> float | None:
        """GPU watts of the group at its present batch if nothing capped it, and never below the recent p95.

        Measured while no cap binds, else predicted by the model; None where there is no model either.
        """
        uncapped_w = seen.power_w
        if seen.binding_share > 0.0:
            model = self._corrected()
            if model is None:
                return None
            uncapped_w = max(float(model.predict(max_limit_w, max(seen.running, 1)).power_w), uncapped_w)
        return max(uncapped_w, window.power_p95_w())

    def look(self, now_s: float, seen: ReplicaTelemetry) -> None:
        """Learn from what the replica does at a point that it has held for as long as its telemetry reaches back."""
        before_s, self._looked_s = self._looked_s, now_s
        self._seen = seen
        state, point = self._state, self._state.point
        if self._model is None or point is None or before_s is None:
            return
        if now_s - max(state.cap_changed_s, state.batch_changed_s) < RATE_S:
            return
        observation = Observation(
            cap_w=point.cap_w,
            batch_limit=point.batch_limit,
            running=seen.running_mean,
            waiting=seen.waiting,
            idled=seen.running_least == 0,
            throughput_tokens_per_s=seen.throughput_tokens_per_s,
            power_w=seen.power_w,
            binding_share=seen.binding_share,
            interval_s=now_s - before_s,
        )
        self.correction, _ = self.correction.updated(self._model, observation)

    def choose(
        self,
        now_s: float,
        ceiling_w: float,
        in_force_w: float,
        terms: ChargeTerms,
        max_batch: int,
        grant: Grant,
        seen: ReplicaTelemetry,
        *,
        may_cap: bool = True,
    ) -> tuple[OperatingPoint, str]:
        """The point to order now, never above `ceiling_w`, and why. `may_cap` False: the limits in force are given."""
        situation = Situation(
            now_s=now_s,
            ceiling_w=ceiling_w if may_cap else in_force_w,
            in_force_w=in_force_w,
            terms=terms,
            max_batch=max_batch,
            target=self.target,
            telemetry=seen,
            model=self._corrected(),
            alike=self._alike[0] if now_s - self._alike[1] <= ALIKE_S else None,
            pin_cap_w=grant.pin_cap_w if may_cap else in_force_w,
            pin_batch_limit=grant.pin_batch_limit,
        )
        decision = decide(self._state, situation, self._config)
        self._state = decision.state
        return decision.point, decision.reason

    def _corrected(self) -> CorrectedModel | None:
        return None if self._model is None else CorrectedModel(self._model, self.correction, self._num_gpus)
