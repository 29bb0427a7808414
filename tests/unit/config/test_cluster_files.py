"""The files for several machines belong together: what cluster.yaml labels, the fleet example has domains for."""

import re
from pathlib import Path

import pytest
import yaml
from ray._private.label_utils import parse_node_labels_string

from pals_ray.config.fleet import load_fleet_config
from pals_ray.control.manager.deployment import domain_of
from pals_ray.models.specs import GPUS

ROOT = Path(__file__).parents[3]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
FLEET = load_fleet_config(ROOT / "deployments" / "examples" / "racks.yaml")
DOMAINS = [domain.domain() for domain in FLEET.domains]


def test_each_worker_of_the_cluster_file_is_in_a_rack_of_the_fleet_example_and_both_are_on_its_circuit():
    commands = " ".join(CLUSTER["worker_start_ray_commands"])
    by_worker = dict(re.findall(r'" (WORKER_ADDRESS_\d) "\*\) labels=(\S+)', commands))
    assert list(by_worker) == CLUSTER["provider"]["worker_ips"]
    domains = [domain_of(parse_node_labels_string(labels).items(), DOMAINS) for labels in by_worker.values()]
    assert domains == ["rack-a", "rack-b"]
    assert {domain.name: domain.parent for domain in FLEET.domains} == {
        "circuit-1": None,
        "rack-a": "circuit-1",
        "rack-b": "circuit-1",
    }


def test_the_parked_nodes_of_the_fleet_example_fit_each_of_its_budgets_with_their_overhead():
    a_node_w = FLEET.overhead.a_w + (1 + FLEET.overhead.b) * 8 * GPUS["H100-SXM"].min_limit_w
    assert a_node_w == pytest.approx(450 + 1.12 * 8 * 200)
    assert 2 * a_node_w < FLEET.budget_w - FLEET.reserve_w
    for domain in FLEET.domains:
        nodes = 2 if domain.name == "circuit-1" else 1
        assert nodes * a_node_w < domain.budget_w


def test_a_node_without_a_domains_label_is_in_none():
    assert domain_of((("rack", "z"),), DOMAINS) is None
    assert domain_of((("circuit", "1"),), DOMAINS) == "circuit-1"
