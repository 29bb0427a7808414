import tempfile
from pathlib import Path

import pytest

from tests.support import fleets


@pytest.fixture(scope="module")
def scratch():
    """A folder with a short name: Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="pals-e2e-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def clean_machine():
    """No engine of anybody's runs before, and none of ours after."""
    assert not fleets.engine_processes(), "vLLM engines are running already; this machine holds one fleet at a time"
    fleets.forget_dead_cluster()
    yield
    for process in fleets.engine_processes():
        process.kill()
    fleets.wait_for(lambda: not fleets.guardians(), 20, "a guardian stays behind")
