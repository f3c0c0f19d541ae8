"""Stage 2 of fusechat: merge target checkpoints by VaRM or SCE, in mergekit or as a stream.

This module runs inside `import torch` (see `_autoload`), so it imports the standard library only.
The public names are lazy: PyTorch and mergekit are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusechat_merge import _autoload

if TYPE_CHECKING:
    from fusechat_common.errors import RequestError as RequestError
    from fusechat_merge.engine.execute import merge as merge
    from fusechat_merge.methods.sce import sce as sce
    from fusechat_merge.methods.varm import varm as varm
    from fusechat_merge.methods.varm import varm_weights as varm_weights
    from fusechat_merge.planning.planner import plan as plan

__version__ = "0.1.0"

_HOME = {
    "RequestError": "fusechat_common.errors",
    "merge": "fusechat_merge.engine.execute",
    "plan": "fusechat_merge.planning.planner",
    "sce": "fusechat_merge.methods.sce",
    "varm": "fusechat_merge.methods.varm",
    "varm_weights": "fusechat_merge.methods.varm",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_autoload.install()
