"""`pals simulate`: a small scenario from the command line to tables, pictures and the page."""

from __future__ import annotations

import csv
import json

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
    "violation_rate",
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
        "load": {"shares": [0.5]},
        "budget": {"shares": [1.0, 0.6]},
        "policies": ["static", "uniform", "pals"],
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
    assert set(found["policies"]) == {"static", "uniform", "pals", "oracle"}
    for figures in found["policies"].values():
        assert set(figures) >= KEYS
        assert figures["tokens_per_joule"] < figures["tokens_per_joule_gpu"]
    assert found["policies"]["static"]["gain_over_static"] == 0
    assert found["policies"]["oracle"]["gain_over_static"] >= 0


def test_every_case_and_policy_has_a_row_in_the_csv(made):
    rows = list(csv.DictReader((made[0] / "cases.csv").open()))
    assert len(rows) == 2 * 4
    assert {row["budget_share"] for row in rows} == {"1.0", "0.6"}


def test_the_page_holds_all_pictures_and_needs_no_other_file(made):
    page = (made[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert 'src="' not in page.replace('src="data:', "")
    for name in ("power", "tokens_per_joule", "violations", "operating_points"):
        assert (made[0] / f"{name}.png").stat().st_size > 5000


def test_what_was_run_is_not_run_again_and_gives_the_same(made, scenario):
    kept = {file.name: file.stat().st_mtime_ns for file in (made[0] / "cases").glob("*.json")}
    assert len(kept) == 2
    arguments = ["simulate", str(scenario), "--out", str(made[0]), "--sample-trace", "--json"]
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.stdout == made[1]
    assert {file.name: file.stat().st_mtime_ns for file in (made[0] / "cases").glob("*.json")} == kept


def test_without_its_trace_a_scenario_says_which_file_and_where_to_get_it(scenario):
    done = CliRunner().invoke(app, ["simulate", str(scenario), "--out", str(scenario.parent / "none")])
    assert done.exit_code != 0
    assert isinstance(done.exception, MissingTrace) or "Azure Public Dataset" in done.output


def test_bench_runs_the_cases_of_all_scenarios_in_one_go_and_writes_their_tables(scenario, tmp_path):
    content = yaml.safe_load(scenario.read_text()) | {"policies": ["static", "pals"], "oracle": False, "seeds": [1]}
    content["budget"] = {"shares": [0.6]}
    paths = []
    for name, duration_s in (("short", 10), ("long", 20)):
        paths.append(scenario.parent / f"{name}.yaml")
        own = {"name": name, "duration_s": duration_s, "about": f"A {name} one."}
        paths[-1].write_text(yaml.safe_dump(content | own))
    (tmp_path / "evaluation.md").write_text("Before.\n\n<!-- bench: begin -->\nold\n<!-- bench: end -->\n\nAfter.\n")
    out = tmp_path / "out"
    arguments = ["bench", "evaluation", "--sample-trace", "--jobs", "1", "--out", str(out), "--docs", str(tmp_path)]
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
