"""Makes hypothesis deterministic; the real tokenizers and the pico models as fixtures."""

from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from tests.support import chain, real_tokenizers

settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def mistral() -> PreTrainedTokenizerFast:
    return real_tokenizers.mistral()


@pytest.fixture(scope="session")
def qwen() -> PreTrainedTokenizerFast:
    return real_tokenizers.qwen()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `pivot`, `neox` and `twin` of `tests.support.chain`; not changed."""
    folder = tmp_path_factory.mktemp("models")
    chain.save_models(folder)
    return folder
