"""Make mergekit know our methods: a hook that costs nothing until mergekit is imported.

PyTorch calls ``install`` at the end of ``import torch`` (entry point group ``torch.backends``), and
``import fusechat_merge`` calls it too. Standard library only, and nothing may escape from here: an
exception would break every ``import torch``.
"""

import sys
from importlib.abc import Loader, MetaPathFinder

# module -> function of fusechat_merge.mergekit_plugin to call once the module has run
_AFTER = {
    "mergekit.merge_methods.registry": "register_methods",
    "mergekit.plan": "check_plans",
    "mergekit.scripts.merge_raw_pytorch": "check_raw_plans",
    "mergekit.evo.genome": "extend_genome_parameters",
}


def install() -> None:
    """Arrange for the methods to be registered as soon as mergekit's registry is imported."""
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        for name in _AFTER:
            if name in sys.modules and not _is_being_imported(sys.modules[name]):
                _call(name)
    except Exception as error:
        _warn(error)


def _is_being_imported(module):
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def _call(name):
    try:
        from importlib import import_module

        getattr(import_module("fusechat_merge.mergekit_plugin"), _AFTER[name])()
    except Exception as error:
        _warn(error)


def _warn(error):
    try:
        sys.stderr.write(
            f"fusechat: varm and fusechat_sce could not be registered with mergekit: {error!r}\n"
        )
    except Exception:
        pass


class _Finder(MetaPathFinder):
    """Finds nothing itself; wraps the loader of the modules in ``_AFTER``."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _AFTER:
            return None
        try:
            for finder in sys.meta_path:
                if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                    continue
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)
                    return spec
        except Exception as error:
            _warn(error)
        return None


class _Loader(Loader):
    """The module's own loader, followed by our call."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _call(module.__name__)
