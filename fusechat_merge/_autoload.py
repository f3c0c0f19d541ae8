"""Make mergekit know our methods: a hook that costs nothing until mergekit is imported.

`import fusechat_merge` calls `install`, also at the end of `import torch` (`fusechat_autoload`).
Standard library only, and no exception may leave this module: it would break `import torch`.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any

# mergekit's module -> the function of fusechat_merge.mergekit_bridge.plugin to call once it has run
_AFTER = {
    "mergekit.merge_methods.registry": "register_methods",
    "mergekit.plan": "extend_planner",
    "mergekit.scripts.merge_raw_pytorch": "extend_raw_planner",
    "mergekit.evo.genome": "extend_genome",
}
_PLUGIN = "fusechat_merge.mergekit_bridge.plugin"


def install() -> None:
    """Have our methods registered as soon as mergekit's registry is imported, or at once."""
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        for name in list(_AFTER):
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if spec is None:
                continue
            if getattr(spec, "_initializing", False):
                # We are inside its own `import torch`.
                spec.__class__ = _WatchedSpec
            else:
                _extend(name)
    except Exception as error:
        _report(error)


class _Finder:
    """Finds nothing itself: has the plugin and the modules in `_AFTER` watched."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _AFTER and name != _PLUGIN:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    try:
                        spec.__class__ = _WatchedSpec
                    except Exception as error:
                        _report(error)
                    return spec
        return None


class _WatchedSpec(ModuleSpec):
    """The spec of a module being imported; importlib clears `_initializing` when it has run."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:  # else the import failed
                install() if self.name == _PLUGIN else _extend(self.name)


def _extend(name: str) -> None:
    if name not in _AFTER:
        return  # an earlier failure has been reported
    try:
        from importlib import import_module

        plugin = import_module(_PLUGIN)
        # While the plugin itself is being imported (it imports mergekit) its functions don't exist
        # yet: they are called when it has run.
        extend = getattr(plugin, _AFTER[name], None)
        if extend is not None:
            extend()
    except Exception as error:
        _AFTER.clear()
        _report(error)


def _report(error: Exception) -> None:
    try:
        sys.stderr.write(f"fusechat: mergekit won't know varm and fusechat_sce: {error!r}\n")
    except Exception:
        return
