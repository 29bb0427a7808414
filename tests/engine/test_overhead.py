"""What `pals bench overhead` says of the hooks' cost is measured on the hooks themselves."""

import pytest

from pals_ray.engine.hook_cost import measure_hooks


@pytest.mark.parametrize("batch", [1, 64])
def test_each_hook_and_the_agents_reading_are_timed(batch):
    costs = measure_hooks(batch, calls=2000)
    assert costs.batch == batch
    for cost in (costs.scheduler, costs.stat_logger, costs.agent_read):
        assert 0 < cost.p50_us <= cost.p99_us
