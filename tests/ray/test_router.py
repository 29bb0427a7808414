"""Our request router on real Serve: replicas told to rest get no requests while another is awake."""

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig

from pals_ray.runtime.serve.router import PARKED, ROUTER_CONFIG
from tests.support.fleets import wait_for


@serve.deployment(
    num_replicas=2,
    ray_actor_options={"num_cpus": 0.1},
    request_router_config=RequestRouterConfig(**ROUTER_CONFIG),
    health_check_period_s=1,
)
class Resting:
    """Answers with its own name; rests while a file of that name is there."""

    def __init__(self, folder):
        self.name = serve.get_replica_context().replica_id.unique_id
        self.file = folder / self.name

    def record_routing_stats(self):
        return {PARKED: self.file.exists()}

    def __call__(self):
        return self.name


@pytest.fixture
def replicas(cluster, tmp_path):
    serve.start(proxy_location="Disabled")
    yield serve.run(Resting.bind(tmp_path), name="resting", route_prefix=None)
    serve.shutdown()


def test_requests_pass_by_a_replica_that_rests_and_the_last_ones_serve(replicas, tmp_path):
    def asked():
        return {replicas.remote().result(timeout_s=10) for _ in range(20)}

    wait_for(lambda: len(asked()) == 2, 20, "not both of them serve")
    one, two = sorted(asked())
    (tmp_path / one).touch()
    took_s = wait_for(lambda: asked() == {two}, 20, "one that rests is asked")
    print(f"\npassed by after {took_s:.1f} s")
    (tmp_path / two).touch()
    wait_for(lambda: len(asked()) == 2, 20, "where all rest, not all serve")
    for name in (one, two):
        (tmp_path / name).unlink()
    wait_for(lambda: len(asked()) == 2, 20, "it is not woken")
