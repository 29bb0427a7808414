"""`pals target`: what it asks of the fleet, and what it says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import pals_ray
from pals_ray.cli import running_fleet
from pals_ray.control.slo import SloState, status_of
from pals_ray.runtime.manager.configuration import changed_target
from pals_ray.types import Slo, Target


class Fleet:
    """A fleet of one model, whose fastest TPOT is 58 ms, and which asks for whatever was set last."""

    def __init__(self):
        self.target = Target(Slo(ttft_s=2.0))

    def set_target(self, model, **changes):
        self.target = changed_target({"m": self.target}, model, changes)
        return self.target

    def status(self):
        return SimpleNamespace(slos=(replace(status_of("m", self.target, SloState()), fastest_tpot_s=0.058),))


@pytest.fixture
def fleet(monkeypatch):
    fleet = Fleet()
    monkeypatch.setattr(pals_ray, "connect", lambda: fleet)
    return fleet


def pals_target(*args):
    app = typer.Typer()
    app.command()(running_fleet.target)
    return CliRunner().invoke(app, ["m", *args])


def words(done):
    """What a command printed, wherever its lines are broken."""
    return " ".join(done.stdout.split())


def test_every_part_of_an_slo_has_an_option_and_the_rest_stays(fleet):
    done = pals_target("--tpot", "0.1", "--attainment", "0.95", "--window", "60", "--itl-p99", "0.2")
    assert done.exit_code == 0, done.output
    assert fleet.target == Target(Slo(2.0, 0.1, 0.95, 60.0, 0.2))
    assert words(done) == (
        "m: all demand, 95% of requests within TTFT 2 s and TPOT 100 ms over 60 s, ITL p99 within 200 ms"
    )
    assert pals_target("--ttft", "none", "--throughput", "700").exit_code == 0
    assert fleet.target == Target(Slo(None, 0.1, 0.95, 60.0, 0.2), throughput_tokens_per_s=700)


def test_a_tpot_limit_that_cannot_be_kept_is_taken_with_a_warning(fleet):
    done = pals_target("--tpot", "0.05")
    assert (done.exit_code, fleet.target.slo.tpot_s) == (0, 0.05)
    assert "! m: a TPOT of 50 ms is asked, but 58 ms is predicted for one sequence at the highest cap" in words(done)
    assert "!" not in pals_target("--tpot", "0.06").stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--ttft-p99", "1.5"), "ttft_p99_s is no longer known"),
        (("--ttft", "0"), "target.slo.ttft_s: Input should be greater than 0"),
        (("--ttft", "nan"), "target.slo.ttft_s"),
        (("--attainment", "1"), "target.slo.attainment: Input should be less than 1"),
        (("--window", "5"), "target.slo.window_s"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(fleet, args, says):
    done = pals_target(*args)
    assert done.exit_code == 1
    assert says in str(done.exception)
    assert fleet.target == Target(Slo(ttft_s=2.0))


def test_the_help_does_not_name_the_old_option():
    assert "--ttft-p99" not in pals_target("--help").stdout
