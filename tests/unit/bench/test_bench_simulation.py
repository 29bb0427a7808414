"""The simulator's own cost."""

from pals_ray.bench.simulation import measure


def test_an_hour_of_twelve_gpus_takes_minutes_at_most_on_a_busy_machine():
    cost = measure(12, 3600.0, 60.0, part=0.004)
    assert cost["simulated_s"] == 14.4
    assert 0.0 < cost["whole_cpu_s"] < 600.0
