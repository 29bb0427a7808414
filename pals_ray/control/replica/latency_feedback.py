"""The latency feedback: how much longer TTFT and TPOT are than the model predicts.

A model knows the mean request. What long prompts and short answers make of the tails shows in the engine's histograms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, log

from pals_ray.control.snapshot import LatencyFactors

#: Time constants, s: of the prediction, as long as the window of the measured percentiles; and of their ratio.
WINDOW_S = 60.0
RATIO_LAG_S = 80.0
#: Before anything is measured the p99 of TTFT is taken for so many times the predicted one, since some prompts are
#: longer than the mean; that counts as much as so many s of measuring.
LONG_PROMPTS = 3.0
PRIOR_S = 15.0
MOST_LOG = log(8.0)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Measured over predicted of one percentile: logs of the prediction over the window, and of the ratio in use."""

    predicted: float | None = None
    ratio: float = 0.0
    seen_s: float = 0.0

    def after(self, measured_s: float | None, predicted_s: float, dt_s: float) -> Ratio:
        """Let `dt_s` pass, with what is measured over the window (None: nothing) and predicted for this instant."""
        now = log(predicted_s)
        before = now if self.predicted is None else self.predicted
        predicted = before + (now - before) * (1.0 - exp(-dt_s / WINDOW_S))
        if not measured_s:
            return Ratio(predicted, self.ratio, self.seen_s)
        seen_s = self.seen_s + dt_s
        share = max(1.0 - exp(-dt_s / RATIO_LAG_S), dt_s / max(seen_s, 1e-9))
        found = min(max(log(measured_s) - predicted, -MOST_LOG), MOST_LOG)
        return Ratio(predicted, self.ratio + (found - self.ratio) * min(share, 1.0), seen_s)

    @property
    def factor(self) -> float:
        """What to multiply the prediction with."""
        return exp(self.ratio)


@dataclass(frozen=True, slots=True)
class LatencyFeedback:
    """One ratio for each percentile that attainment is predicted from."""

    ttft_p50: Ratio = field(default_factory=Ratio)
    ttft_p99: Ratio = field(default_factory=lambda: Ratio(ratio=log(LONG_PROMPTS), seen_s=PRIOR_S))
    tpot_p99: Ratio = field(default_factory=Ratio)

    @property
    def factors(self) -> LatencyFactors:
        """The factors in use."""
        return LatencyFactors(self.ttft_p50.factor, self.ttft_p99.factor, self.tpot_p99.factor)
