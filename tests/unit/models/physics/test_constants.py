"""The constants' data file is what `calibrate` writes."""

from importlib.resources import files

from pals_ray.bench.calibrate import render
from pals_ray.models.physics.constants import CONSTANTS, provenance_of


def test_the_data_file_is_as_calibrate_writes_it():
    written = files("pals_ray.models").joinpath("data", "silicon_constants.json").read_text("utf-8")
    assert render(CONSTANTS, {gpu: provenance_of(gpu) for gpu in CONSTANTS}) == written
