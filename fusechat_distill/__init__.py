"""Knowledge fusion of chat LLMs, stage one: score, align, fuse, train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusechat_distill.trainer.trainer import DataCollatorForFusion, FusionConfig, FusionTrainer

__all__ = ["DataCollatorForFusion", "FusionConfig", "FusionTrainer"]


def __getattr__(name: str) -> Any:
    # `import fusechat_distill` costs nothing; torch and TRL come with the first use of a name.
    if name in __all__:
        return getattr(importlib.import_module("fusechat_distill.trainer.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
