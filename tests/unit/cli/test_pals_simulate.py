"""`pals simulate`: a small scenario from the command line to tables, pictures and the page."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from pals_ray.cli.main import app
from pals_ray.config.scenario import SHIPPED
from pals_ray.config.trace_files import MissingTrace

KEYS = {
    "tokens_per_joule",
    "tokens_per_joule_gpu",
    "gain_over_static",
    "gain_over_static_gpu",
    "share_of_oracle_gain",
    "attainment",
    "late_rate",
    "under_target_rate",
    "goodput_tokens_per_s",
    "tracking_error",
    "over_budget_s",
    "over_budget_max_w",
}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    """One GPU for 20 s at two budgets, with the sample trace alone."""
    folder = tmp_path_factory.mktemp("scenario")
    (folder / "sample.csv").write_text((SHIPPED / "traces" / "azure_sample.csv").read_text())
    model = {"name": "OLMoE-1B-7B", "tensor_parallel": 1, "max_batch": 32}
    node = {"gpu": "A100-SXM", "gpus": 1, "models": ["OLMoE-1B-7B"]}
    content = {
        "name": "tiny",
        "about": "One GPU for 20 s.",
        "duration_s": 20,
        "overhead": {"a_w": 80, "b": 0.05, "gpus": 1, "source": "made up for a test"},
        "fleets": [{"name": "one GPU", "nodes": [node], "models": [model]}],
        "trace": {"format": "azure", "path": "gone.csv", "sample": "sample.csv"},
        "limits": {
            "server": {"ttft_s": 2.0, "tpot_s": 0.1},
            "slow": {"ttft_s": 9.0, "tpot_s": 0.1, "models": {"OLMoE-1B-7B": {"ttft_s": 3.0, "tpot_s": 0.2}}},
            "never": {"ttft_s": 0.001, "tpot_s": 0.1},
        },
        "load": {"shares": [0.5]},
        "budget": {"shares": [1.0, 0.6]},
        "policies": ["static", "uniform@16", "pals"],
        "oracle": True,
        "seeds": [1, 2],
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def made(scenario):
    """The scenario, simulated once: (folder, what was printed)."""
    out = scenario.parent / "out"
    arguments = ["simulate", str(scenario), "--out", str(out), "--sample-trace", "--json", "--jobs", "1"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out, done.stdout


def test_json_has_every_policy_with_the_figures_promised(made):
    found = json.loads(made[1])
    assert found["scenario"] == "tiny"
    assert set(found["policies"]) == {"static", "uniform@16", "pals", "oracle"}
    for figures in found["policies"].values():
        assert set(figures) >= KEYS
        assert figures["tokens_per_joule"] < figures["tokens_per_joule_gpu"]
    assert found["policies"]["static"]["gain_over_static"] == 0
    assert found["policies"]["oracle"]["gain_over_static"] >= 0


def test_json_says_the_same_of_every_case_and_which_limits_it_is_judged_by(made):
    found = json.loads(made[1])
    assert {(case["fleet"], case["limit_set"], case["load"]) for case in found["cases"]} == {
        ("one GPU", "server", 0.5),
        ("one GPU", "slow", 0.5),
    }
    for case in found["cases"]:
        assert case["capacity_per_s"]["OLMoE-1B-7B"] > 0
        for figures in case["policies"].values():
            assert set(figures) >= KEYS
            assert figures["attainment"] == pytest.approx(1.0 - figures["late_rate"])
            assert figures["under_target_rate"] is None
    attained = [case["policies"]["pals"]["attainment"] for case in found["cases"]]
    assert found["policies"]["pals"]["attainment"] == pytest.approx(sum(attained) / len(attained))
    limits = found["limits"]["OLMoE-1B-7B"]
    assert limits["server"] == {"ttft_s": 2.0, "tpot_s": 0.1, "attainment": 0.99}
    assert limits["slow"] == {"ttft_s": 3.0, "tpot_s": 0.2, "attainment": 0.99}


def test_a_model_that_cannot_be_served_within_its_limits_is_named_and_left_out(made):
    left_out = json.loads(made[1])["left_out"]
    assert [of["left_out"] for of in left_out] == [["OLMoE-1B-7B"]] * 2
    assert all("never" in of["case"] for of in left_out)


def test_no_notion_of_violation_is_left(made):
    assert "violation" not in made[1]
    page = re.sub('src="data:[^"]*"', "", (made[0] / "report.html").read_text())
    assert "iolation" not in page


def test_every_case_and_policy_has_a_row_in_the_csv(made):
    rows = list(csv.DictReader((made[0] / "cases.csv").open()))
    assert len(rows) == 4 * 4
    assert {row["budget_share"] for row in rows} == {"1.0", "0.6"}


def test_the_page_holds_all_pictures_and_needs_no_other_file(made):
    page = (made[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="' not in page.replace('src="data:', "")
    for name in ("power", "tokens_per_joule", "attainment", "operating_points"):
        assert (made[0] / f"{name}.png").stat().st_size > 5000


def test_what_was_run_is_not_run_again_and_gives_the_same(made, scenario):
    kept = {file.name: file.stat().st_mtime_ns for file in (made[0] / "cases").glob("*.json")}
    assert len(kept) == 6
    arguments = ["simulate", str(scenario), "--out", str(made[0]), "--sample-trace", "--json"]
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.stdout == made[1]
    assert {file.name: file.stat().st_mtime_ns for file in (made[0] / "cases").glob("*.json")} == kept


def test_without_its_trace_a_scenario_says_which_file_and_where_to_get_it(scenario):
    done = CliRunner().invoke(app, ["simulate", str(scenario), "--out", str(scenario.parent / "none")])
    assert done.exit_code != 0
    assert isinstance(done.exception, MissingTrace) or "Azure Public Dataset" in done.output


def test_bench_runs_the_cases_of_all_scenarios_in_one_go_and_writes_their_tables(scenario, tmp_path):
    content = yaml.safe_load(scenario.read_text()) | {"policies": ["static", "pals"], "oracle": False}
    content |= {"budget": {"shares": [0.6]}, "limits": {"server": {"ttft_s": 2.0, "tpot_s": 0.1}}}
    paths = []
    for name, duration_s in (("short", 10), ("long", 20)):
        paths.append(scenario.parent / f"{name}.yaml")
        own = {"name": name, "duration_s": duration_s, "about": f"A {name} one."}
        paths[-1].write_text(yaml.safe_dump(content | own))
    (tmp_path / "evaluation.md").write_text("Before.\n\n<!-- bench: begin -->\nold\n<!-- bench: end -->\n\nAfter.\n")
    out = tmp_path / "out"
    arguments = ["bench", "evaluation", "--sample-trace", "--jobs", "1", "--out", str(out), "--docs", str(tmp_path)]
    arguments += ["--seeds", "1"]
    arguments += [part for path in paths for part in ("--scenario", str(path))]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "evaluation.md").read_text()
    assert page.startswith("Before.")
    assert page.endswith("After.\n")
    assert "old" not in page
    assert page.index("### short\n\nA short one.") < page.index("### long\n\nA long one.")
    assert {file.parent.name for file in out.glob("*/report.html")} == {"short", "long"}
    short, long = (file.stat().st_mtime_ns for file in sorted((out / "cases").glob("*.json"), reverse=True))
    assert long < short, "the longest case is to be run first"


def test_a_closed_loop_serves_its_target_at_fewer_watts_and_no_fixed_point_is_better_than_the_oracle(scenario):
    content = yaml.safe_load(scenario.read_text()) | {"name": "closed", "duration_s": 30, "oracle_step_w": 5}
    del content["limits"]
    content["load"] = {"targets": [0.6], "closed": True}
    content |= {"budget": {}, "policies": ["static", "pals"], "seeds": [1]}
    content["fleets"][0]["lengths"] = {"prompt_tokens": [90, 200], "output_tokens": [20, 60]}
    path = scenario.parent / "closed.yaml"
    path.write_text(yaml.safe_dump(content))
    arguments = ["simulate", str(path), "--out", str(scenario.parent / "closed"), "--sample-trace", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--jobs", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (case,) = json.loads(done.stdout)["cases"]
    made = case["policies"]
    target = 0.6 * made["static"]["tokens_per_s"]
    assert made["pals"]["tokens_per_s"] > 0.95 * target
    assert made["pals"]["under_target_rate"] <= 0.2
    assert made["static"]["under_target_half_s"] == 0.0
    grids = [made[f"grid_{name}@64"]["gain_over_static"] for name in ("batch_only", "power_only", "joint")]
    assert grids[2] == max(grids)
    assert made["oracle"]["gain_over_static"] >= grids[2] - 0.02
    assert case["target"] == 0.6
