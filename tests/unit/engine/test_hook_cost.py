"""What `pals bench overhead` says of the hook's cost is measured on the hook itself."""

import pytest

from pals_ray.engine.hook_cost import hook_us


@pytest.mark.parametrize("batch", [1, 64])
def test_the_hook_is_timed_in_microseconds(batch):
    assert 0.0 < hook_us(batch, calls=2000) < 1000.0
