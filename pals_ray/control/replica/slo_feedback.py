"""The SLO feedback: how much more or less than the demand a replica plans for, learnt from the requests judged.

Each late request raises the demand planned for, each good one lowers it a little, in the ratio in which the SLO allows
them: so the share of late requests is led to what is allowed, whatever the model predicts (adaptive conformal
inference: Gibbs and Candes, NeurIPS 2021). While more is late than allowed over the long window, nothing is given back;
while it is so over the short one too, each late request counts for more, as burn-rate alerts have it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log1p

from pals_ray.types import Slo, Verdicts

#: The log of the factor on demand that one late request adds, and its range.
STEP = 0.05
LEAST, MOST = -0.5, 0.5
#: The part of the error budget that is planned to be spent; the rest is for what nobody foresees.
SPEND = 0.65
#: The short window is this part of the SLO's.
SHORT = 1.0 / 10.0
#: Late requests are a cluster where they are more than so many times as many as allowed over the short window.
CLUSTER = 4.0
#: A good request counts for so many while hardly any was late over the whole window.
CLEAN = 2.0
#: A late request counts for so many at most.
FASTEST = 2.0


@dataclass(frozen=True, slots=True)
class Burn:
    """How fast an error budget is spent over a window: late requests over those allowed (1: all of it)."""

    late: float = 0.0
    judged: float = 0.0

    def after(self, late: int, judged: int, dt_s: float, window_s: float) -> Burn:
        """Let `dt_s` pass, in which so many were judged."""
        kept = exp(-dt_s / window_s)
        return Burn(self.late * kept + late, self.judged * kept + judged)

    def rate(self, attainment: float) -> float:
        """Late over allowed; as if one request more had been judged good for each that may be late."""
        return self.late / ((1.0 - attainment) * self.judged + 1.0)


@dataclass(frozen=True, slots=True)
class SloFeedback:
    """`strain` is the log of the factor on demand, `seen` the verdicts at the last look."""

    strain: float = 0.0
    seen: Verdicts | None = None
    short: Burn = field(default_factory=Burn)
    long: Burn = field(default_factory=Burn)

    def after(self, verdicts: Verdicts, slo: Slo, dt_s: float, *, servable: bool) -> SloFeedback:
        """Let `dt_s` pass with these verdicts since engine start. What no point could have served teaches nothing."""
        new = verdicts - self.seen if self.seen is not None else Verdicts()
        if new.judged < 0 or not slo.judges:  # the engine began anew, or nothing can be late
            return SloFeedback(self.strain, verdicts)
        short = self.short.after(new.late, new.judged, dt_s, SHORT * slo.window_s)
        long = self.long.after(new.late, new.judged, dt_s, slo.window_s)
        # What was judged longer ago than the window counts no more.
        strain, allowed = self.strain * exp(-dt_s / slo.window_s), SPEND * (1.0 - slo.attainment)
        burn = min(short.rate(slo.attainment), long.rate(slo.attainment))
        if new.late and servable:
            # Requests are late in clusters, by one cause: beyond what is allowed each further one says less.
            cluster, usual = self.short.late, 1.0 + CLUSTER * allowed * short.judged
            strain += STEP * usual * log1p(new.late / (cluster + usual)) * min(max(burn, 1.0), FASTEST)
        if short.rate(slo.attainment) <= SPEND:
            strain -= STEP * allowed * new.good * (CLEAN if long.rate(slo.attainment) < SPEND / 4.0 else 1.0)
        return SloFeedback(min(max(strain, LEAST), MOST), verdicts, short, long)
