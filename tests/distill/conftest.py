"""Makes the real tokenizers importable and gives them as fixtures."""

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from tests.support import real_tokenizers

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def mistral() -> PreTrainedTokenizerFast:
    return real_tokenizers.mistral()


@pytest.fixture(scope="session")
def qwen() -> PreTrainedTokenizerFast:
    return real_tokenizers.qwen()
