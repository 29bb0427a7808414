"""`pals overhead`: from measured watts to a line for the fleet file."""

import json

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pals_ray.cli.main import app
from pals_ray.config.fleet import OverheadConfig
from pals_ray.config.reader import ConfigError


@pytest.fixture
def measured(tmp_path):
    """A node of 300 W + 0.08 x GPU watts, at idle and under load, with one line that is off."""
    rng = np.random.default_rng(3)
    gpu_w = np.linspace(400, 2800, 40)
    node_w = 300 + 1.08 * gpu_w + rng.normal(0, 3, 40)
    node_w[17] += 900
    rows = [f"{node:.1f},{gpu:.1f}" for node, gpu in zip(node_w, gpu_w, strict=True)]
    path = tmp_path / "node.csv"
    path.write_text("\n".join(["node_w,gpu_w", *rows]))
    return path


def test_it_prints_what_the_fleet_file_takes(measured):
    done = CliRunner().invoke(app, ["overhead", str(measured)])
    assert done.exit_code == 0, done.output
    found = OverheadConfig(**yaml.safe_load(done.stdout)["overhead"])
    assert found.a_w == pytest.approx(300, abs=5)
    assert found.b == pytest.approx(0.08, abs=0.003)
    assert "lines 19" in done.stdout


def test_it_prints_one_json_object_where_asked(measured):
    said = json.loads(CliRunner().invoke(app, ["overhead", str(measured), "--json"]).stdout)
    assert said["b"] == pytest.approx(0.08, abs=0.003)
    assert said["left_out_rows"] == [19]
    assert 1 < said["residual_w"] < 5


def test_a_file_that_is_not_there_is_named():
    done = CliRunner().invoke(app, ["overhead", "/nowhere.csv"])
    assert isinstance(done.exception, ConfigError)
    assert "/nowhere.csv" in str(done.exception)
