"""One Ray cluster for all of these tests: two raylets on this machine, which share a fake NVML library."""

import tempfile
from pathlib import Path

import pytest
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from pals_ray.runtime.messages import NAMESPACE
from tests.support import fleets
from tests.support.dummies import DummyFleet
from tests.unit.gpus.fake_nvml import FakeNvml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scratch():
    """A folder with a short name: Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="pals-ray-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def nvml(scratch):
    """Four fake H100s, which every process of the cluster finds through nvidia-ml-py's own ctypes path."""
    return FakeNvml.build(scratch, num_gpus=4)


@pytest.fixture(scope="session")
def cluster(scratch, nvml):
    """A head node; further raylets can be added."""
    assert not fleets.engine_processes(), "vLLM engines run here; this machine holds one fleet at a time"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nvml.environment().items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        # Beside the clusters' own folder Ray notes the address here, and takes it for granted that this one is there.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "num_gpus": 0,
                "include_dashboard": False,
                "temp_dir": str(scratch / "ray"),
                # A raylet that a test kills is to be noticed in a second, not in half a minute.
                "_system_config": {
                    "health_check_initial_delay_ms": 500,
                    "health_check_period_ms": 500,
                    "health_check_failure_threshold": 3,
                },
            },
        )
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def fleet(cluster, tmp_path):
    """A fleet without a configuration or a replica yet, on four virtual A100s."""
    made = DummyFleet(tmp_path / "state")
    yield made
    made.close()
