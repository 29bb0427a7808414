"""What comes to a replica: requests/s, how they swing, and the output tokens they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from math import exp, fsum, log, sqrt

from pals_ray.control.snapshot import Arrivals, LatencyFactors
from pals_ray.control.telemetry import RATE_S
from pals_ray.types import ReplicaTelemetry

#: Time constants of the smoothed rate of arrivals and of their dispersion, s. Where few come the rate is that of so
#: many requests, as far as they came within the longest time constant.
RATE_LAG_S = 60.0
DISPERSION_LAG_S = 180.0
ENOUGH_REQUESTS = 150.0
MOST_LAG_S = 300.0
#: More requests in `RATE_S` than this many standard deviations above what the smoothed rate brings are no chance; or
#: than this many while more requests run than usual.
SURGE_SIGMAS = 3.0
CROWDED_SIGMAS = 1.0
#: Fewer requests/s than this are none: the cap does not wait for the next one.
SILENT_PER_S = 1.0 / 300.0
#: Peakedness is taken from few arrivals and a short window, so it is kept in a range.
MOST_PEAKEDNESS = 8.0


@dataclass(frozen=True, slots=True)
class DemandState:
    """What is remembered of arrivals: their rate, requests/s, the dispersion of how many come in `RATE_S` (variance
    over mean, 1 for Poisson), how many requests run on average, and for how long all this has been watched, s.
    `window_per_s` is the rate over the last `RATE_S` that dispersion was taken from, `window_s` how long ago that was.
    """

    per_s: float = 0.0
    dispersion: float = 1.0
    running: float = 0.0
    seen_s: float = 0.0
    window_per_s: float = 0.0
    window_s: float = 0.0

    def after(self, seen: ReplicaTelemetry, dt_s: float) -> DemandState:
        """Let `dt_s` pass with this telemetry. A surge is followed at once: as far as it can be no chance.

        Where more requests run than usual, beyond chance too, arrivals need less to be a surge.
        """
        seen_s, now_per_s = self.seen_s + dt_s, seen.arriving_per_s
        if seen_s < RATE_S:
            return DemandState(now_per_s, 1.0, seen.running_mean, seen_s, now_per_s)
        few_lag_s = min(ENOUGH_REQUESTS / max(self.per_s, 1e-3), MOST_LAG_S) if seen.running_mean > 0.0 else 0.0
        share = _share(dt_s, seen_s, max(RATE_LAG_S, few_lag_s))
        per_s = self.per_s + (now_per_s - self.per_s) * share
        running = self.running + (seen.running_mean - self.running) * share
        known = replace(self, per_s=per_s, running=running, seen_s=seen_s, window_s=self.window_s + dt_s)
        crowded = seen.running_mean - self.running > 2.0 * sqrt(self.running)
        came, sigmas = now_per_s * RATE_S, CROWDED_SIGMAS if crowded else SURGE_SIGMAS
        surge_per_s = (came - 1.0 - sigmas * sqrt(came * self.dispersion)) / RATE_S  # one alone is always chance
        if surge_per_s > per_s:
            return replace(known, per_s=surge_per_s, window_per_s=now_per_s, window_s=0.0)
        if known.window_s < RATE_S:
            return known
        # From window to window, so that a load that rises or falls steadily does not count as one that swings.
        both_per_s = now_per_s + self.window_per_s
        swing = (now_per_s - self.window_per_s) ** 2 * RATE_S / both_per_s if both_per_s > 0.0 else self.dispersion
        dispersion = self.dispersion + (swing - self.dispersion) * _share(known.window_s, seen_s, DISPERSION_LAG_S)
        return replace(known, dispersion=dispersion, window_per_s=now_per_s, window_s=0.0)

    def arrivals(self, seen: ReplicaTelemetry, strain: float, latency: LatencyFactors) -> Arrivals | None:
        """What comes, as the queueing model takes it; None where requests are there, but none has ended yet."""
        if seen.running + seen.waiting == 0 and self.per_s < SILENT_PER_S:
            return Arrivals(0.0, max(seen.output_tokens, 1.0))
        if seen.output_tokens <= 0.0:
            return None
        peakedness = min(max((1.0 + self.dispersion) / 2.0, 1.0), MOST_PEAKEDNESS)
        return Arrivals(self.per_s, seen.output_tokens, peakedness, exp(strain), latency)


def pooled(alike: Sequence[Arrivals]) -> Arrivals:
    """The mean of what comes to replicas that are alike: rates as they are, factors by their logs."""
    per_s = fsum(own.per_s for own in alike) / len(alike)
    tokens_per_s = fsum(own.tokens_per_s for own in alike) / len(alike)
    return Arrivals(
        per_s,
        tokens_per_s / per_s if per_s > 0.0 else max(own.output_tokens for own in alike),
        fsum(own.peakedness for own in alike) / len(alike),
        _log_mean([own.strain for own in alike]),
        LatencyFactors(*(_log_mean(column) for column in zip(*(astuple(own.latency) for own in alike), strict=True))),
    )


def toward(own: Arrivals | None, alike: Arrivals) -> Arrivals:
    """What a replica plans for beside others that are alike: their mean, as far as its own rate can be that by chance.

    If each went by its own rate alone, one that is slower for a while would get fewer requests from a router that looks
    at queues, so a lower cap would do for it, which makes it slower still.
    """
    if own is None:
        return alike
    if own.per_s == 0.0 or alike.per_s == 0.0:
        return own
    chance_per_s = SURGE_SIGMAS * sqrt(own.per_s * (2.0 * own.peakedness - 1.0) / (2.0 * RATE_LAG_S))
    return replace(alike, per_s=min(max(alike.per_s, own.per_s - chance_per_s), own.per_s + chance_per_s))


def _log_mean(factors: Sequence[float]) -> float:
    return exp(fsum(map(log, factors)) / len(factors))


def _share(dt_s: float, seen_s: float, lag_s: float) -> float:
    """How far a mean moves toward a new value: a plain mean at first, weighted exponentially later."""
    return max(1.0 - exp(-dt_s / lag_s), min(dt_s / max(seen_s, 1e-9), 1.0))
