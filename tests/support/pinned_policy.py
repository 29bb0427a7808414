"""A policy of a test: an even split, and four sequences at once for everybody."""

from dataclasses import replace

from policies import uniform

BATCH_LIMIT = 4


def allocate(snapshot, models):
    shares = uniform.allocate(snapshot, models)
    return {name: replace(share, pin_batch_limit=BATCH_LIMIT) for name, share in shares.items()}
