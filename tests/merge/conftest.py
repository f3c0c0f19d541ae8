"""A family of pico Llama checkpoints of a test's own, and PyTorch's number of threads."""

import pytest
import torch

from tests.support import checkpoints


@pytest.fixture
def paths(tmp_path):
    """A base and two targets, bfloat16, below tmp_path/in."""
    return checkpoints.llama_family(tmp_path / "in", (torch.bfloat16,) * 3)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
