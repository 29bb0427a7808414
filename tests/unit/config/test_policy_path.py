"""Policies by import path: ours are listed, and one of a user's own is loaded as the docs show it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pals_ray.config.fleet import parse_fleet_config
from pals_ray.config.policy_path import UnknownPolicy, list_policies, load_policy
from tests.support.builders import fleet_snapshot, replica_snapshot

ROOT = Path(__file__).parents[3]
SHOWN = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.DOTALL)[1]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The docs' own example, in a folder that is on the path and in no package of ours."""
    (tmp_path / "my_policy.py").write_text(SHOWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("my_policy", None)


def test_the_policy_that_the_docs_show_is_loaded_from_outside_and_divides(outside):
    content = yaml.safe_load((ROOT / "deployments" / "examples" / "tiny.yaml").read_text())
    policy = load_policy(parse_fleet_config(content | {"policy": "my_policy:allocate"}, "fleet.yaml").policy)
    replicas = (replica_snapshot("d", model="tiny-dense"), replica_snapshot("m", gpus=2, model="tiny-moe"))
    shares = policy(fleet_snapshot(900.0, *replicas, parked_charge_w={None: 100.0}), {})
    assert shares["m"].charge_w == 600
    assert shares["m"].reason == "600 W: 75% is for tiny-moe"
    assert shares["d"].charge_w == pytest.approx(800 / 3, abs=1)


def test_a_process_with_its_folder_in_pythonpath_finds_it(outside):
    """As the manager's does."""
    script = "from pals_ray.config.policy_path import load_policy; print(load_policy('my_policy:allocate').__module__)"
    env = {"PYTHONPATH": f"{ROOT}:{outside}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "my_policy\n", done.stderr


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere:allocate", "No module named 'nowhere'"),
        ("my_policy:divide", "no attribute 'divide'"),
        ("my_policy:PART", "not a function"),
    ],
)
def test_a_path_that_names_no_function_is_refused(outside, path, says):
    with pytest.raises(UnknownPolicy, match=says):
        load_policy(path)


def test_every_policy_of_ours_is_listed_with_what_it_does():
    listed = {policy.path: policy.summary for policy in list_policies()}
    files = {path.stem for path in (ROOT / "policies").glob("*.py")} - {"__init__"}
    assert set(listed) == {f"policies.{name}:allocate" for name in files}
    assert all(len(summary) > 10 for summary in listed.values())
    assert listed["policies.uniform:allocate"].startswith("Every GPU the same")


def test_the_one_in_use_is_marked_and_listed_where_it_is_nobodys_here(outside):
    assert [p.path for p in list_policies("policies.pals:allocate") if p.in_use] == ["policies.pals:allocate"]
    *_, own = list_policies("my_policy:allocate")
    assert (own.path, own.in_use) == ("my_policy:allocate", True)
    assert own.summary.startswith("A fixed part of the watts")
    *_, elsewhere = list_policies("not_here:allocate")
    assert (elsewhere.in_use, elsewhere.summary) == (True, "cannot be imported here")
