"""One model on a standing Ray cluster: scaled, redeployed, its parts killed one by one, and stopped in two ways."""

import asyncio
import subprocess
import time
from contextlib import suppress

import httpx
import pytest
import ray
import yaml

import pals_ray
from deployments.application import DEFAULT_CONFIG
from pals_ray.profiling.load import ClosedLoop, RequestShape
from tests.support import fleets
from tests.support.fleets import URL

pytestmark = pytest.mark.timeout(400)
BUDGET_W = 700
SHAPE = RequestShape(prompt_tokens=32, output_tokens=32)


@pytest.fixture(scope="module")
def env(scratch):
    return fleets.environment(scratch, RAY_ADDRESS="auto")


class Cluster:
    """A one-node Ray cluster from `ray start`, and what is deployed on it."""

    def __init__(self, scratch, env):
        self.scratch, self.env = scratch, env

    def start(self):
        self.run("ray", "get-auth-token", "--generate")  # the one that there is already, if any
        self.run("ray", "start", "--head", "--num-cpus=4", "--disable-usage-stats", "--include-dashboard=false")

    def run(self, tool, *args, timeout_s=180, check=True):
        done = subprocess.run(
            [str(fleets.BIN / tool), *args], env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def deploy(self, budget_w=BUDGET_W, replicas=1):
        """`serve run` with tiny-dense alone; returns when Serve says that it runs."""
        content = yaml.safe_load(DEFAULT_CONFIG.read_text())
        (dense,) = [m for m in content["models"] if "dense" in str(m["llm_config"]["model_loading_config"])]
        dense["llm_config"]["deployment_config"]["num_replicas"] = replicas
        content |= {"models": [dense], "budget_w": budget_w, "storage_path": str(self.scratch / "state")}
        path = self.scratch / "dense.yaml"
        path.write_text(yaml.safe_dump(content))
        self.run("serve", "run", "--non-blocking", "deployments:build", f"config={path}")
        fleets.wait_for(lambda: fleets.answers("tiny-dense"), 60, "tiny-dense does not answer")

    def serve(self):
        """See to it that cluster and fleet are up, whatever a test before has stopped."""
        if not fleets.actor_processes("ServeController"):
            ray.shutdown()
            self.start()
        if not fleets.engine_processes():
            self.deploy()


@pytest.fixture(scope="module")
def cluster(scratch, env):
    cluster = Cluster(scratch, env)
    cluster.start()
    try:
        cluster.deploy()
        yield cluster
    finally:
        ray.shutdown()
        cluster.run("ray", "stop", "-f", check=False)


@pytest.fixture
def fleet(cluster):
    return pals_ray.connect()


def serving(fleet, replicas):
    """Whether so many replicas hold GPUs, and every other managed GPU is parked at its lowest cap."""
    with suppress(pals_ray.PalsError):
        seen = fleet.status()
        held = {uuid for replica in seen.replicas if replica.state == "serving" for uuid in replica.gpus}
        rest = [gpu for gpu in seen.gpus if gpu.uuid not in held]
        return len(seen.replicas) == replicas == len(held) and all(gpu.limit_w == 100 for gpu in rest)
    return False


def test_the_ledger_follows_scaling_and_a_redeploy_with_another_budget(cluster, fleet):
    assert serving(fleet, 1)
    before = fleet.status()
    with fleets.sampled_limits() as samples:
        cluster.deploy(replicas=2)
        fleets.wait_for(lambda: serving(fleet, 2), 60, "two replicas do not hold two GPUs")
        two = {replica.replica_id for replica in fleet.status().replicas}
        assert before.replicas[0].replica_id in two
        began_s = time.monotonic()
        cluster.deploy(budget_w=500)
        settled_s = samples.last_over(500, began_s)
        fleets.wait_for(lambda: serving(fleet, 1), 60, "the second replica's GPU is not parked again")
    print(f"\nworst sum of limits while scaling: {samples.worst_after(0):.0f} W of {BUDGET_W} W")
    assert samples.worst_after(0) <= BUDGET_W + 0.01
    assert fleet.status().budget_w == 500
    assert fleet.status().replicas[0].replica_id in two, "a new budget restarted an engine"
    print(f"the redeployed budget was kept {settled_s:.1f} s after `serve run` was called")
    fleet.set_budget(650)
    cluster.deploy(budget_w=500)
    assert fleet.status().budget_w == 650, "the same configuration again undid what the operator set"
    fleet.set_budget(BUDGET_W)


def _kill_agent(fleet):
    (process,) = fleets.actor_processes("PowerAgent")
    process.kill()
    fleets.wait_for(
        lambda: [p for p in fleets.actor_processes("PowerAgent") if p.pid != process.pid], 30, "no new agent"
    )


def _kill_manager(fleet):
    (process,) = fleets.actor_processes("GlobalPowerManager")
    process.kill()
    fleets.wait_for(
        lambda: [p for p in fleets.actor_processes("GlobalPowerManager") if p.pid != process.pid], 30, "no new manager"
    )


def _kill_engine(fleet):
    (process,) = [p for p in fleets.engine_processes() if "EngineCore" in " ".join(p.cmdline())]
    process.kill()
    fleets.wait_for(lambda: not fleets.any_alive([process]), 10, "the engine survives SIGKILL")


def _kill_replica(fleet):
    (process,) = fleets.actor_processes("ServeReplica:default:PowerLLMServer")
    process.kill()
    fleets.wait_for(lambda: not fleets.any_alive([process]), 10, "the replica survives SIGKILL")


@pytest.mark.parametrize("kill", [_kill_agent, _kill_manager, _kill_replica, _kill_engine], ids=lambda f: f.__name__)
def test_the_budget_holds_while_a_part_dies_under_load_and_service_returns(cluster, fleet, kill):
    fleets.wait_for(lambda: serving(fleet, 1), 60, "not serving before the kill")
    with fleets.sampled_limits() as samples:
        recovered_s, failures, later = asyncio.run(_load_and_kill(fleet, kill))
    worst_w = samples.worst_after(0)
    print(f"\n{kill.__name__}: served and confirmed again after {recovered_s:.1f} s, {len(failures)} requests failed, ")
    print(f"worst sum of limits {worst_w:.0f} W of {BUDGET_W} W at {len(samples.rows)} samples")
    assert worst_w <= BUDGET_W + 0.01
    assert all(failure.strip() for failure in failures)
    assert later > 0
    if kill in (_kill_agent, _kill_manager):
        assert failures == []


async def _load_and_kill(fleet, kill):
    async with ClosedLoop(URL, "tiny-dense", 8, SHAPE) as load:
        await asyncio.sleep(3)
        began_s = time.monotonic()
        await asyncio.to_thread(kill, fleet)
        await asyncio.to_thread(
            fleets.wait_for, lambda: serving(fleet, 1) and fleets.answers("tiny-dense"), 150, "service did not return"
        )
        recovered_s = time.monotonic() - began_s
        completed = len(load.result.ttft_s)
        await asyncio.sleep(4)
    return recovered_s, load.result.failures, len(load.result.ttft_s) - completed


def test_pals_stop_ends_ours_and_no_other_application(cluster):
    cluster.serve()
    cluster.run(
        "serve", "run", "--non-blocking", "--name=other", "--route-prefix=/other", "tests.support.other_app:app"
    )
    engines = fleets.engine_processes()
    done = cluster.run("pals", "stop")
    assert "limits restored" in done.stdout
    assert fleets.total_limit_w() == 1600
    assert not fleets.any_alive(engines)
    assert httpx.get(f"{URL}/other").text == "still here"
    fleets.wait_for(lambda: not fleets.guardians() and not fleets.our_files(), 20, "guardian or files stay")
    assert cluster.run("pals", "status", check=False).returncode == 1


def test_ray_stop_by_force_leaves_no_engine_no_cap_and_no_file(cluster):
    cluster.serve()
    engines = fleets.engine_processes()
    assert engines
    assert fleets.total_limit_w() < 1600
    ray.shutdown()
    cluster.run("ray", "stop", "-f", timeout_s=60)
    gone_s = fleets.wait_for(lambda: not fleets.any_alive(engines), 12, "engines outlive ray stop", 0.02)
    back_s = fleets.wait_for(lambda: fleets.total_limit_w() == 1600, 3, "limits were not given back", 0.02)
    left_s = fleets.wait_for(lambda: not fleets.guardians() and not fleets.our_files(), 20, "guardian or files stay")
    print(f"\nengines gone after {gone_s:.1f} s, limits back {back_s:.2f} s later, nothing left {left_s:.1f} s on")
