"""One profile of hypothesis for all tests: the same examples each time, so that a verdict is about the code alone.

`make fuzz` looks for new ones (`--hypothesis-profile=search`). No example has a deadline: speed is for benchmarks.
"""

from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("reproducible")
