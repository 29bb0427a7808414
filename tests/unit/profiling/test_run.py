"""A profiling run against a made-up replica: what it measures, what it keeps, and how it goes on."""

import asyncio
import itertools

import numpy as np
import pytest

from pals_ray.control.replica.batch_choice import graph_sizes
from pals_ray.errors import PalsError
from pals_ray.models.profile import Profile, ProfileError, ProfileSample, profile_from_json
from pals_ray.profiling.load import RequestShape, in_full_swing
from pals_ray.profiling.measure import NotSteady
from pals_ray.profiling.run import begin_or_resume, drawn_points, grid_of, measure_all, write_profile
from pals_ray.types import OperatingPoint, Provenance

GRID = grid_of(100, 400, 32)
EMPTY = Profile(model="m", gpu="g", time_scale=2.0, engine="vLLM 1", prompt_tokens=64, output_tokens=64, samples=())


def sample_at(point):
    busy = point.batch_limit / (point.batch_limit + 16)
    clock = min((point.cap_w - 60) / (100 + 150 * busy), 1.0) ** 0.4
    return ProfileSample(
        power_cap_w=point.cap_w,
        batch_limit=point.batch_limit,
        throughput_tokens_per_s=40 * point.batch_limit / (1 + point.batch_limit / 20) * clock,
        power_w=min(0.975 * point.cap_w, 160 + 150 * busy),
        provenance=Provenance.MODELLED,
    )


class Machine:
    """Measures at once; is killed in the middle of point `dies_at`, and never steady at `unsteady`."""

    def __init__(self, dies_at=None, unsteady=()):
        self.measured = []
        self.dies_at = dies_at
        self.unsteady = unsteady

    async def measure(self, point):
        if len(self.measured) == self.dies_at:
            raise KeyboardInterrupt
        if point in self.unsteady:
            raise NotSteady(f"{point.cap_w:g} W moves")
        self.measured.append(point)
        return sample_at(point)


def run(machine, path, points=6, grid=GRID):
    begun = begin_or_resume(path, EMPTY)
    return asyncio.run(measure_all(begun, grid, points, machine.measure, lambda p: write_profile(path, p), None))


def test_a_run_killed_in_the_middle_keeps_its_points_and_goes_on_to_the_same_profile(tmp_path):
    whole, _ = run(Machine(), tmp_path / "whole.json")
    path, killed = tmp_path / "p.json", Machine(dies_at=4)
    with pytest.raises(KeyboardInterrupt):
        run(killed, path)
    assert len(profile_from_json(path.read_text()).samples) == 4
    rest = Machine()
    resumed, _ = run(rest, path)
    assert len(rest.measured) == 2
    assert resumed.samples == whole.samples
    assert profile_from_json(path.read_text()) == resumed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.json", "whole.json"]


def test_a_finished_run_measures_nothing_more(tmp_path):
    run(Machine(), tmp_path / "p.json")
    again = Machine()
    run(again, tmp_path / "p.json")
    assert again.measured == []


def test_no_point_is_measured_twice_and_few_of_the_grid(tmp_path):
    machine = Machine()
    run(machine, tmp_path / "p.json", points=9)
    assert len(set(machine.measured)) == 9 < len(GRID) / 3
    assert OperatingPoint(400.0, 32) in machine.measured


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"time_scale": 1.0}, {"engine": "vLLM 2"}, {"output_tokens": 600}, {"gpu": "h"}]
)
def test_a_profile_of_something_else_is_neither_continued_nor_overwritten(tmp_path, change):
    path = tmp_path / "p.json"
    run(Machine(), path, points=4)
    text = path.read_text()
    with pytest.raises(ProfileError, match=next(iter(change))):
        begin_or_resume(path, EMPTY.model_copy(update=change))
    assert path.read_text() == text


def test_a_point_that_is_not_steady_is_left_out_and_said(tmp_path):
    moving = OperatingPoint(400.0, 1)
    machine = Machine(unsteady=(moving,))
    profile, left_out = run(machine, tmp_path / "p.json")
    assert left_out == ("400 W moves",)
    assert len(profile.samples) == 6
    assert moving not in machine.measured


def test_a_replica_that_is_never_steady_ends_the_run(tmp_path):
    with pytest.raises(NotSteady):
        run(Machine(unsteady=GRID), tmp_path / "p.json")


def test_samples_of_another_budget_s_grid_count(tmp_path):
    path = tmp_path / "p.json"
    run(Machine(), path, points=5, grid=grid_of(100, 300, 32))
    machine = Machine()
    profile, _ = run(machine, path, points=6)
    assert len(profile.samples) == 6
    assert len(machine.measured) == 1


def test_the_grid_keeps_to_caps_that_are_allowed_and_to_batch_limits_up_to_the_largest():
    grid = grid_of(100, 333.3, 40)
    assert {grid[0].cap_w, grid[-1].cap_w} == {min(p.cap_w for p in grid), max(p.cap_w for p in grid)} == {100, 333}
    assert sorted({p.batch_limit for p in grid}) == [1, 2, 4, 8, 16, 24, 32, 40]
    with pytest.raises(PalsError, match="raise the budget"):
        grid_of(100, 100.2, 32)


def test_points_to_check_are_uniform_and_the_same_for_a_seed():
    points = drawn_points(100, 400, 32, 2000, seed=3)
    assert points == drawn_points(100, 400, 32, 2000, seed=3) != drawn_points(100, 400, 32, 2000, seed=4)
    caps, batches = np.array([p.cap_w for p in points]), np.array([p.batch_limit for p in points])
    assert abs(caps.mean() - 250) < 6
    sizes, counts = np.unique(batches, return_counts=True)
    assert tuple(sizes) == graph_sizes(32)
    assert counts.min() > 230


def test_a_load_in_full_swing_has_sequences_of_all_ages_from_the_start():
    requests = in_full_swing(RequestShape(100, 40), seed=1)
    streams = [list(itertools.islice(requests(slot), 20)) for slot in range(200)]
    first = [stream[0] for stream in streams]
    assert all(shape.prompt_tokens + shape.output_tokens <= 160 for shape in first)
    assert len({shape.output_tokens for shape in first}) > 30
    later = [shape for stream in streams for shape in stream[1:]]
    assert {shape.prompt_tokens for shape in later} == {100}
    assert 20 <= min(s.output_tokens for s in later) < max(s.output_tokens for s in later) <= 60
    assert [next(requests(7)) for _ in range(2)] == [first[7]] * 2
