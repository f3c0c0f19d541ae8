"""The supported releases of packages of which undocumented parts are used.

docs/design.md lists these parts, and tests/common/test_internals.py tries each.
"""

from __future__ import annotations

from importlib.metadata import version

from fusechat_common.errors import RequestError

SUPPORTED = {
    "accelerate": ">=1.4",
    "huggingface_hub": ">=1",
    "mergekit": ">=0.1.5,<0.2",
    "numba": ">=0.61",
    "peft": ">=0.19",
    "torch": ">=2.8",
    "transformers": ">=5,<6",
    "trl": ">=1.16,<1.17",
}
"""Version specifiers by name, as in pyproject.toml."""


def require_supported(*names: str) -> None:
    """Refuse packages with which a command would fail only later.

    Raises:
        RequestError: other releases of them are installed.
    """
    from packaging.specifiers import SpecifierSet

    problems = []
    for name in names:
        installed, wanted = version(name), SUPPORTED[name]
        if not SpecifierSet(wanted).contains(installed, prereleases=True):
            problems.append(
                f"{name} {installed} is installed, supported is {wanted}; run"
                f" pip install '{name}{wanted}'"
            )
    if problems:
        raise RequestError(problems)
