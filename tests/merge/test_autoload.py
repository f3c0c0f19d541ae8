"""How mergekit comes to know us: every order of imports, and nothing that can break torch's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECK = """
import sys
from mergekit.merge_methods import get, registered_methods
names = [m.spec.name for m in registered_methods()]
assert names.count("varm") == names.count("fusechat_sce") == 1, names
import mergekit.plan, mergekit.scripts.merge_raw_pytorch, mergekit.evo.genome
assert mergekit.plan.MergePlanner._plan._fusechat
assert mergekit.scripts.merge_raw_pytorch.plan_flat_merge._fusechat
assert mergekit.evo.genome.METHOD_PARAM_MAPS["varm"] == ["weight"]
assert mergekit.evo.genome.ModelGenome.genotype_merge_config._fusechat
# What was watched is an ordinary module again.
from importlib.machinery import ModuleSpec
for name in ("merge_methods.registry", "plan", "scripts.merge_raw_pytorch", "evo.genome"):
    assert type(sys.modules["mergekit." + name].__spec__) is ModuleSpec, name
print("known")
"""


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=240,
        check=False,
    )


OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
ORDERS: dict[str, tuple[str, dict[str, str]]] = {
    "torch first": ("import torch", {}),
    "get first": ("from mergekit.merge_methods import get", {}),
    "the planner first": ("import mergekit.plan", {}),
    "raw merges first": (
        "from mergekit.scripts.merge_raw_pytorch import plan_flat_merge as plan",
        {},
    ),
    "genomes first": ("import mergekit.evo.genome", {}),
    "we first": ("import fusechat_merge", {}),
    "the plugin first": ("import fusechat_merge.mergekit_plugin", {}),
    "off, we first": ("import fusechat_merge", OFF),
    "off, we last": (
        "import mergekit.plan, mergekit.scripts.merge_raw_pytorch, mergekit.evo.genome\n"
        "from mergekit.merge_methods import registered_methods\n"
        "assert 'varm' not in {m.spec.name for m in registered_methods()}\n"
        "import fusechat_merge",
        OFF,
    ),
}


@pytest.fixture(scope="module")
def ended() -> dict[str, subprocess.CompletedProcess[str]]:
    """The orders in which torch itself is imported somewhere inside, each in a new process."""
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(python, first + "\n" + CHECK, **environment)
            for name, (first, environment) in ORDERS.items()
        }
    return {name: future.result() for name, future in started.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_order(ended: dict[str, subprocess.CompletedProcess[str]], order: str) -> None:
    assert ended[order].returncode == 0, ended[order].stderr
    assert ended[order].stdout == "known\n"
    assert ended[order].stderr == ""


def test_any_module_of_mergekit_first() -> None:
    """A process that has torch and transformers forks; each child then comes to mergekit its way."""
    program = f"""
    import os, pkgutil, sys, traceback, warnings
    from importlib import import_module
    from importlib.util import find_spec
    import torch, transformers, numpy, pydantic, click, yaml, safetensors, accelerate
    assert "mergekit" not in sys.modules and "fusechat_merge" not in sys.modules
    (root,) = find_spec("mergekit").submodule_search_locations
    names = ["mergekit"]
    for folder, folders, files in os.walk(root):
        place = ["mergekit", *os.path.relpath(folder, root).split(os.sep)]
        place = ".".join(part for part in place if part != ".")
        names += [f"{{place}}.{{file[:-3]}}" for file in sorted(files) if file.endswith(".py")]
    names = [n.removesuffix(".__init__") for n in names if "._data" not in n]
    check = {CHECK!r}
    failed = []
    for name in names:
        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                from fusechat_merge._autoload import install
                install()  # as torch does at the end of its import
                try:
                    import_module(name)
                except ImportError:  # needs a package that mergekit doesn't require
                    if name.startswith(("mergekit.merge", "mergekit.plan", "mergekit.io")):
                        raise
                    os._exit(0)
                with open(os.devnull, "w") as sys.stdout:
                    exec(check, {{}})
            except BaseException:
                traceback.print_exc()
                status = 1
            os._exit(status)
        if os.waitpid(pid, 0)[1]:
            failed.append(name)
    print(len(names), failed)
    """
    result = python(program, **OFF)
    assert result.returncode == 0, result.stderr
    count, _, failed = result.stdout.strip().partition(" ")
    assert failed == "[]", result.stderr
    assert int(count) > 60
    assert "fusechat:" not in result.stderr


def test_the_stub_imports_the_standard_library_only() -> None:
    program = """
    import sys
    before = set(sys.modules)
    from fusechat_merge._autoload import install
    install()
    import fusechat_merge
    install()
    own = {n for n in sys.modules if n.partition(".")[0] == "fusechat_merge"}
    assert own == {"fusechat_merge", "fusechat_merge._autoload"}, own
    others = {n.partition(".")[0] for n in set(sys.modules) - before} - {"fusechat_merge"}
    assert others <= sys.stdlib_module_names, others
    hooks = [f for f in sys.meta_path if type(f).__module__.startswith("fusechat_merge")]
    assert len(hooks) == 1, hooks
    # Not even of the standard library is much imported: nothing that isn't there after a start.
    assert others <= {"__future__", "typing", "importlib", "collections", "functools", "operator",
                      "contextlib", "re", "types", "copyreg", "enum", "keyword", "reprlib",
                      "itertools", "warnings"}, others
    print(sorted(dir(fusechat_merge)) == sorted(set(dir(fusechat_merge))))
    """
    result = python(program, **OFF)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True\n"


def test_torch_imports_nothing_more_of_us() -> None:
    result = python(
        """
        import sys, torch
        print([n for n in sorted(sys.modules) if n.startswith(("fusechat", "mergekit", "click"))])
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['fusechat_merge', 'fusechat_merge._autoload']\n"
    assert result.stderr == ""


BROKEN = {
    # The plugin, or anything that it imports, raises.
    "plugin": ("fusechat_merge/mergekit_plugin.py", "raise RuntimeError('no plugin')"),
    "plugin leaves": ("fusechat_merge/mergekit_plugin.py", "raise SystemExit('no plugin')"),
    "methods": ("fusechat_merge/methods/varm.py", "raise ImportError('no methods')"),
    "syntax": ("fusechat_merge/parameters.py", "def ("),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_it_imports_may_raise(tmp_path: Path, broken: str) -> None:
    import shutil

    source = Path(__file__).parents[2] / "fusechat_merge"
    shutil.copytree(source, tmp_path / "fusechat_merge")
    file, text = BROKEN[broken]
    (tmp_path / file).write_text(text)
    result = python(
        """
        import torch
        assert torch.ones(2).sum() == 2
        import mergekit.plan, mergekit.scripts.merge_raw_pytorch
        from mergekit.merge_methods import get, registered_methods
        assert get("linear")
        print(any(m.spec.name == "varm" for m in registered_methods()))
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "False\n"
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("fusechat: mergekit won't know varm and fusechat_sce: ")


def test_everything_the_stub_itself_uses_may_raise() -> None:
    program = """
    import importlib, sys
    class Refusal:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("fusechat_merge", "mergekit") and not name.endswith(
                ("fusechat_merge", "_autoload")
            ):
                raise RuntimeError("refused " + name)
    sys.meta_path.insert(0, Refusal())
    sys.stderr = None
    import torch
    from fusechat_merge import _autoload
    class Frozen(list):
        def insert(self, *args):
            raise RuntimeError("no hooks here")
    sys.meta_path = Frozen(f for f in sys.meta_path if type(f).__module__ != _autoload.__name__)
    _autoload.install()
    try:
        import mergekit
    except RuntimeError as error:
        assert str(error) == "refused mergekit"
    print(float(torch.ones(2).sum()))
    """
    result = python(program)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2.0\n"


def test_lazy_names_are_real() -> None:
    import fusechat_merge

    for name in fusechat_merge.__all__:
        assert callable(getattr(fusechat_merge, name)), name
        assert name in dir(fusechat_merge)
    with pytest.raises(AttributeError, match=r"^module 'fusechat_merge' has no attribute 'vram'$"):
        _ = fusechat_merge.vram
    assert json.dumps(fusechat_merge.__version__)
