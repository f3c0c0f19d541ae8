"""Stage 1 of fusechat: one target checkpoint per source LLM; score, align, fuse, train.

The public names are lazy: PyTorch and TRL are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat_common.errors import RequestError as RequestError
    from fusechat_distill.alignment.positions import match_positions as match_positions
    from fusechat_distill.alignment.stage import aligned_samples as aligned_samples
    from fusechat_distill.alignment.vocabularies import PairCounts as PairCounts
    from fusechat_distill.alignment.vocabularies import VocabularyMap as VocabularyMap
    from fusechat_distill.recipe.schema import load_recipe as load_recipe
    from fusechat_distill.storage.shards import ScoreStore as ScoreStore
    from fusechat_distill.storage.shards import Shards as Shards
    from fusechat_distill.text.tokens import first_tokens as first_tokens
    from fusechat_distill.text.tokens import token_bytes as token_bytes
    from fusechat_distill.text.tokens import tokenize as tokenize
    from fusechat_distill.text.tokens import vocabulary as vocabulary
    from fusechat_distill.trainer.trainer import DataCollatorForFusion as DataCollatorForFusion
    from fusechat_distill.trainer.trainer import FusionConfig as FusionConfig
    from fusechat_distill.trainer.trainer import FusionTrainer as FusionTrainer

_NAMES = {
    "fusechat_common.errors": ("RequestError",),
    "fusechat_distill.alignment.positions": ("match_positions",),
    "fusechat_distill.alignment.stage": ("aligned_samples",),
    "fusechat_distill.alignment.vocabularies": ("PairCounts", "VocabularyMap"),
    "fusechat_distill.recipe.schema": ("load_recipe",),
    "fusechat_distill.storage.shards": ("ScoreStore", "Shards"),
    "fusechat_distill.text.tokens": ("first_tokens", "token_bytes", "tokenize", "vocabulary"),
    "fusechat_distill.trainer.trainer": ("DataCollatorForFusion", "FusionConfig", "FusionTrainer"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
