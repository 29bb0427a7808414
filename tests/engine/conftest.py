"""The engines that tests share: each starts once, in some 20 s."""

import pytest

from .harness import run_engine


@pytest.fixture(scope="module")
def dense_engine(tmp_path_factory):
    """A dense model at the CPU's own pace."""
    yield from run_engine("tiny-dense", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def paced_engine(tmp_path_factory):
    """An MoE model on two of four virtual A100s, standing for Mixtral-8x7B at time scale 2."""
    yield from run_engine("tiny-moe", tmp_path_factory.mktemp("models"), virtual_gpus=4, tensor_parallel_size=2)
