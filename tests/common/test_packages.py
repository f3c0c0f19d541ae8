"""The packages' public names: all there, and nothing imported before one is used."""

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = pytest.mark.parametrize("name", ["fusechat_distill", "fusechat_merge"])


@PACKAGES
def test_every_public_name_is_there(name):
    package = import_module(name)
    for public in package.__all__:
        assert callable(getattr(package, public)), public
        assert public in dir(package)
    with pytest.raises(AttributeError, match=rf"^module '{name}' has no attribute 'vram'$"):
        _ = package.vram


def printed(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@PACKAGES
def test_a_package_alone_imports_the_standard_library_only(name):
    program = (
        f"import sys\nbefore = set(sys.modules)\nimport {name}\n"
        f"assert set({name}.__all__) <= set(dir({name}))\n"
        "imported = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(imported - sys.stdlib_module_names))\n"
    )
    assert printed(program) == f"['{name}']\n"


@pytest.mark.parametrize("words", [["fusechat-distill", "score"], ["fusechat-merge"]])
def test_help_imports_nothing_heavy(words):
    shown = printed(
        f"import sys\nsys.argv = {[*words, '--help']}\n"
        f"from {words[0].replace('-', '_')}.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'mergekit', 'numpy', 'pyarrow', 'rich', 'trl'}\n"
        "    print(heavy & set(sys.modules))\n"
    )
    assert f"Usage: {' '.join(words)}" in shown
    assert shown.endswith("\nset()\n")
