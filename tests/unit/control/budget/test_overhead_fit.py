"""Node overhead from measurements: right through noise and outliers, and refused where the rows say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_ray.control.budget.overhead_fit import NodeSample, OverheadError, fit_overhead


def samples(gpu_w, a_w=400.0, b=0.12, noise_w=0.0, seed=0):
    gpu_w = np.asarray(gpu_w, float)
    node_w = a_w + (1 + b) * gpu_w + np.random.default_rng(seed).normal(0, noise_w, len(gpu_w))
    return [NodeSample(row + 2, float(n), float(g)) for row, (n, g) in enumerate(zip(node_w, gpu_w, strict=True))]


@settings(max_examples=50)
@given(st.floats(0, 2000), st.floats(0, 1), st.integers(10, 60), st.integers(0, 2**32 - 1))
def test_an_exact_line_is_found(a_w, b, count, seed):
    gpu_w = np.random.default_rng(seed).uniform(200, 2800, count)
    gpu_w[:2] = 200, 2800
    fit = fit_overhead(samples(gpu_w, a_w, min(b, 0.999)))
    assert fit.overhead.a_w == pytest.approx(a_w, abs=1e-3)
    assert fit.overhead.b == pytest.approx(min(b, 0.999), abs=1e-6)
    assert fit.left_out == ()


def test_noise_averages_out_and_is_told():
    fit = fit_overhead(samples(np.linspace(300, 2800, 500), noise_w=15))
    assert fit.overhead.a_w == pytest.approx(400, abs=8)
    assert fit.overhead.b == pytest.approx(0.12, abs=0.005)
    assert fit.residual_w == pytest.approx(15, rel=0.15)


def test_a_node_that_idles_for_nine_tenths_of_the_time_is_fitted():
    fit = fit_overhead(samples(np.concatenate([np.full(180, 320.0), np.linspace(2000, 2800, 20)]), noise_w=5))
    assert fit.overhead.b == pytest.approx(0.12, abs=0.01)


def test_a_tenth_of_wild_rows_is_left_out_and_named():
    rows = samples(np.linspace(300, 2800, 100), noise_w=5)
    for at in range(0, 100, 10):
        rows[at] = NodeSample(rows[at].row, rows[at].node_w + 900, rows[at].gpu_w)
    fit = fit_overhead(rows)
    assert set(range(2, 102, 10)) <= set(fit.left_out)
    assert fit.overhead.a_w == pytest.approx(400, abs=5)


def test_a_node_that_draws_less_than_its_gpus_is_refused_by_row():
    rows = samples(np.linspace(300, 2800, 100))
    rows[40] = NodeSample(42, 500.0, 900.0)
    with pytest.raises(OverheadError, match="row 42: the node draws 500 W, less than the 900 W of its GPUs"):
        fit_overhead(rows)


@pytest.mark.parametrize("wrong", [(float("nan"), 300.0), (float("inf"), 300.0), (500.0, -1.0)])
def test_what_are_no_watts_is_refused_by_row(wrong):
    rows = samples(np.linspace(300, 2800, 100))
    rows[7] = NodeSample(9, *wrong)
    with pytest.raises(OverheadError, match=r"row 9: .* no watts"):
        fit_overhead(rows)


def test_too_few_rows_are_refused():
    with pytest.raises(OverheadError, match="9 rows are too few"):
        fit_overhead(samples(np.linspace(300, 2800, 9)))


def test_rows_at_one_load_only_are_refused():
    with pytest.raises(OverheadError, match="both idle and under load"):
        fit_overhead(samples(np.linspace(2000, 2050, 50)))


def test_watts_that_have_nothing_to_do_with_each_other_are_refused():
    rng = np.random.default_rng(0)
    rows = [NodeSample(i, g + 300 + (1500 if i % 3 == 0 else 0), g) for i, g in enumerate(rng.uniform(300, 2800, 90))]
    with pytest.raises(OverheadError, match="30 of 90 rows lie off any line"):
        fit_overhead(rows)


def test_the_watts_of_one_gpu_of_eight_are_seen_not_to_be_all():
    with pytest.raises(OverheadError, match="those of all GPUs of the node together"):
        fit_overhead([NodeSample(s.row, s.node_w, s.gpu_w / 8) for s in samples(np.linspace(300, 2800, 50))])
