"""Somebody else's Serve application, which ours must leave alone."""

from ray import serve


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    def __call__(self):
        return "still here"


app = Other.bind()
