"""Dies of one GPU type differ, and always alike."""

from pals_ray.models.physics.die_spread import die_factor


def test_dies_differ_by_a_few_percent_and_always_alike():
    factors = [die_factor(i) for i in range(64)]
    assert factors == [die_factor(i) for i in range(64)]
    assert 0.97 <= min(factors) < 0.98
    assert 1.02 < max(factors) <= 1.03
