"""`pals fit` on files, as an operator runs it."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pals_ray.cli.main import app
from pals_ray.models.profile import profile_from_json

CAPS, BATCHES = (150, 200, 250, 300, 400), (1, 4, 16, 64)


def write(path, extra="", header=True):
    lines = ["power_cap_w,batch_limit,throughput_tokens_per_s,power_w,num_gpus,itl_p50_s"] if header else []
    for cap in CAPS:
        for batch in BATCHES:
            clock = min((cap - 90) / (120 + 60 * batch / (batch + 16)), 1.0) ** 0.4
            rate = batch / (0.02 + 0.0005 * batch) * clock
            power = 2 * min(cap * 0.975, 210 + 60 * batch / (batch + 16))
            lines.append(f"{cap},{batch},{rate:.2f},{power:.1f},2,{batch / rate:.5f}")
    path.write_text("\n".join(lines) + "\n" + extra)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["fit", *(str(a) for a in arguments)])


def test_train_points_prints_counts_and_fractions_with_null_for_absent_columns(tmp_path):
    done = run(write(tmp_path / "s.csv"), "--train-points", 10, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert (said["n_train"], said["n_test"]) == (10, 10)
    assert 0 <= said["throughput_mape"] < 0.1
    assert 0 <= said["power_mape"] < 0.05
    assert said["itl_p50_mape"] is not None
    assert said["itl_p99_mape"] is said["ttft_p50_mape"] is said["ttft_p99_mape"] is None


def test_leave_one_out_tests_every_row_of_the_inner_batches(tmp_path):
    said = json.loads(run(write(tmp_path / "s.csv"), "--leave-one-out", "--json").stdout)
    assert said["n_test"] == 2 * len(CAPS)
    assert said["throughput_mape"] < 0.1


def test_a_latency_that_few_rows_have_is_null_or_a_number_and_never_nan(tmp_path):
    lines = write(tmp_path / "s.csv").read_text().splitlines()
    lines[0] += ",ttft_p50_s,ttft_p99_s"
    for at in range(1, len(lines)):
        lines[at] += {7: ",0.2,", 8: ",,0.5", 9: ",0.2,0.5"}.get(at, ",,")
    (tmp_path / "few.csv").write_text("\n".join(lines))
    for test in (("--train-points", 8), ("--leave-one-out",)):
        done = run(tmp_path / "few.csv", *test, "--json")
        assert done.exit_code == 0, done.stderr
        assert "NaN" not in done.stdout
        assert json.loads(done.stdout)["itl_p50_mape"] < 0.2


def test_a_model_that_no_table_knows_is_fitted_with_a_word_on_what_is_missing(tmp_path):
    out = tmp_path / "p.json"
    done = run(write(tmp_path / "s.csv"), "--model", "acme-7b", "--out", out, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["n_train"] == len(CAPS) * len(BATCHES)
    assert profile_from_json(out.read_text()).model == "acme-7b"
    assert "acme-7b is none of the models that are known" in done.stderr
    assert "say --gpu" in done.stderr


def test_out_and_plot_write_a_profile_and_a_picture(tmp_path):
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    done = run(write(tmp_path / "s.csv"), "--out", out, "--plot", plot, "--model", "Mixtral-8x7B", "--gpu", "H100")
    assert done.exit_code == 0
    profile = profile_from_json(out.read_text())
    assert (profile.model, profile.gpu, profile.num_gpus) == ("Mixtral-8x7B", "H100", 2)
    assert len(profile.samples) == len(CAPS) * len(BATCHES)
    assert np.isfinite(profile.surface().predict(250, 16).power_w)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("", "has no rows"),
        ("a,b\n1,2\n", "column power_cap_w"),
        ("power_cap_w,batch_limit,throughput_tokens_per_s,power_w\n200,8,100\n", "row 2"),
        ("power_cap_w,batch_limit,throughput_tokens_per_s,power_w\n200,8,100,-1\n", "row 2: power_w is -1"),
        (
            "power_cap_w,batch_limit,throughput_tokens_per_s,power_w\n200,8,100,9\n\n,,,\n200,8,100,-1\n",
            "row 5: power_w",
        ),
        ("power_cap_w,batch_limit,throughput_tokens_per_s,power_w\n200,8,100,150\n", "too few"),
        (b"\xff\xfe\x00binary", "cannot be read"),
    ],
)
def test_a_bad_file_ends_with_one_clear_line_and_a_non_zero_exit(tmp_path, content, words):
    path = tmp_path / "s.csv"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    done = run(path)
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_tests_at_once_and_too_many_points_are_refused(tmp_path):
    path = write(tmp_path / "s.csv")
    assert "give one of them" in run(path, "--train-points", 8, "--leave-one-out").stderr
    assert "99 training points asked" in run(path, "--train-points", 99).stderr


def test_an_unwritable_place_is_refused(tmp_path):
    assert "cannot write" in run(write(tmp_path / "s.csv"), "--out", tmp_path / "no" / "p.json").stderr


def test_spaces_empty_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = write(tmp_path / "s.csv", extra="\n\n")
    path.write_text("\ufeff" + path.read_text().replace(",", ", "))
    assert run(path, "--json").exit_code == 0
