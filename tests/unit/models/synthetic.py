"""Replicas made up for tests: surfaces of several shapes, measured with seeded noise."""

from __future__ import annotations

import numpy as np

from pals_ray.models.fitting.sample_checks import SampleTable


def replica(caps, batches, *, seed=0, noise=0.01, num_gpus=1, natural=(200.0, 350.0), peak=False, latency=False):
    """A memory-bound replica with a cap law of its own (not the fit's form), on the full grid."""
    cap, batch = (a.reshape(-1).astype(float) for a in np.meshgrid(caps, batches, indexing="ij"))
    generator = np.random.default_rng(seed)
    draw = natural[0] + (natural[1] - natural[0]) * batch / (batch + 24.0)
    depth = np.clip((cap * 0.975 - 80.0) / (draw - 80.0), 0.02, 1.0)
    clock = depth**0.4
    step_s = (0.02 + 0.0004 * batch) * (0.6 / np.minimum(clock / 0.7, 1.0) + 0.4 / clock)
    rate = batch / step_s
    if peak:
        rate = rate / (1.0 + (batch / 80.0) ** 2)
    power = 80.0 + (draw - 80.0) * depth

    def measured(values):
        return values * np.exp(generator.normal(0.0, noise, len(values)))

    extra = {}
    if latency:
        itl = batch / rate
        extra = {
            "itl_p50_s": measured(0.95 * itl),
            "itl_p99_s": measured(1.8 * itl),
            "ttft_p50_s": measured(0.12 / clock),
            "ttft_p99_s": measured(0.4 / clock),
        }
    return SampleTable(cap, batch, measured(rate), measured(power) * num_gpus, num_gpus, extra)
