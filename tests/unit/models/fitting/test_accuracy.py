"""A sample of `make bench-models`, in seconds: the models against other people's measurements (../shared/data)."""

from pathlib import Path

import numpy as np
import pytest

from pals_ray.bench.calibrate import H100_CLOCKS_MHZ, H100_THROUGHPUT, h100_capped
from pals_ray.bench.measured_data import load_mlenergy, zeus_groups
from pals_ray.bench.models import (
    batch_errors,
    cap_law_errors,
    prior_errors,
    step_lags_s,
    zeus_errors,
)
from pals_ray.models.physics.constants import CONSTANTS

DATA = Path(__file__).parents[5] / "shared" / "data"
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the measured data is not at {DATA}"),
]


@pytest.fixture(scope="module")
def curves():
    return load_mlenergy(DATA / "mlenergy" / "lm-arena-chat.json")


def test_twelve_points_predict_the_rest_of_three_zeus_grids():
    groups = [g for g in zeus_groups(DATA / "zeus_nsdi23") if g[0].split()[0] == "V100" and "bert" not in g[0]]
    rows = zeus_errors([g for g in groups if "ncf" not in g[0]], with_baselines=False)
    ours = np.array([row.errors[0] for row in rows])
    assert len(rows) == 3
    assert (ours.mean(axis=0) <= (0.042, 0.028)).all()
    assert (ours.max(axis=0) <= (0.09, 0.06)).all()


def test_left_out_batches_of_a_dense_and_a_mixture_curve_are_predicted(curves):
    chosen = [c for c in curves if c.gpu == "H100-SXM" and c.table.num_gpus in (1, 4)]
    chosen = [c for c in chosen if "Llama-3.1-8B" in c.model_id or "Scout" in c.model_id]
    mean = batch_errors(chosen, with_baselines=False)["ours"]["H100-SXM"].mean(axis=0)
    assert len(chosen) == 2
    assert (mean <= (0.02, 0.015, 0.025)).all()


def test_the_prior_holds_on_a_family_it_has_not_seen(curves):
    median = np.median(prior_errors(curves, ["Gemma 3"])["Gemma 3"], axis=1)
    assert median[0] <= 0.15
    assert median[1] <= 0.11


def test_two_caps_of_a_kernel_predict_the_other_two():
    laws = cap_law_errors(DATA / "gridpilot" / "E1_summary_table.csv").values()
    assert np.mean([throughput for throughput, _ in laws]) <= 0.04
    assert np.mean([power for _, power in laws]) <= 0.03


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_virtual_gpu_settles_as_the_measured_one_did(way):
    for share, seen_s, virtual_s in step_lags_s(DATA / "gridpilot" / "E2_telemetry.csv")[way]:
        assert abs(seen_s - virtual_s) <= 0.030, share


def test_the_virtual_h100_follows_the_table_of_caps_and_clocks():
    clocks, throughput = h100_capped(CONSTANTS["H100-SXM"])
    off = np.abs(clocks / H100_CLOCKS_MHZ - 1.0)
    assert off[0] <= 0.12
    assert (off[1:] <= 0.05).all()
    assert (np.abs(throughput / H100_THROUGHPUT - 1.0) <= 0.08).all()
