"""How mergekit comes to know us: every order of imports, and nothing that can break torch's."""

from __future__ import annotations

import shutil
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from fusechat_merge import _autoload
from fusechat_merge.mergekit_bridge import plugin as mergekit_plugin
from tests.support.merging import run_program

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


def python(program: str, folder: Path | None = None, **environment: str) -> CompletedProcess[str]:
    return run_program([sys.executable, "-c", textwrap.dedent(program)], folder, **environment)


def succeeded(program: str, folder: Path | None = None, **environment: str) -> tuple[str, str]:
    """What a program printed, and what it said."""
    result = python(program, folder, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
ORDERS: dict[str, tuple[str, dict[str, str]]] = {
    "torch first": ("import torch", {}),
    "get first": ("from mergekit.merge_methods import get", {}),
    "the planner first": ("import mergekit.plan", {}),
    "raw merges first": ("from mergekit.scripts.merge_raw_pytorch import plan_flat_merge", {}),
    "genomes first": ("import mergekit.evo.genome", {}),
    "we first": ("import fusechat_merge", {}),
    "off, we first": ("import fusechat_merge", OFF),
    "off, the plugin first": ("import fusechat_merge.mergekit_bridge.plugin", OFF),
    **{
        f"{module} first": (f"import fusechat_merge.{module}", {})
        for module in ("mergekit_bridge.parameters", "mergekit_bridge.methods", "planning.planner")
    },
    "off, we last": (
        "import mergekit.plan, mergekit.scripts.merge_raw_pytorch, mergekit.evo.genome\n"
        "from mergekit.merge_methods import registered_methods\n"
        "assert 'varm' not in {m.spec.name for m in registered_methods()}\n"
        "import fusechat_merge",
        OFF,
    ),
}


@pytest.fixture(scope="module")
def ended():
    """The orders in which torch itself is imported somewhere inside, each in a new process."""
    with ThreadPoolExecutor(2) as pool:
        started = {
            name: pool.submit(python, first + "\n" + CHECK, **environment)
            for name, (first, environment) in ORDERS.items()
        }
    return {name: future.result() for name, future in started.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_order(ended, order):
    assert ended[order].returncode == 0, ended[order].stderr
    assert ended[order].stdout == "known\n"
    assert ended[order].stderr == ""


def test_any_module_of_mergekit_first():
    """One process imports all that mergekit needs, forgets mergekit, and forks: each child then
    comes to mergekit by another of its modules."""
    program = f"""
    import os, sys, traceback
    from importlib import import_module
    from importlib.util import find_spec
    import torch, mergekit.merge, mergekit.plan, mergekit.scripts.merge_raw_pytorch
    import mergekit.evo.genome, mergekit.scripts.multimerge
    for name in list(sys.modules):
        if name.partition(".")[0] == "mergekit":
            del sys.modules[name]
    assert not any(name.startswith("fusechat") for name in sys.modules)
    (root,) = find_spec("mergekit").submodule_search_locations
    names = []
    for folder, folders, files in os.walk(root):
        place = ["mergekit", *os.path.relpath(folder, root).split(os.sep)]
        place = ".".join(part for part in place if part != ".")
        names += [f"{{place}}.{{file[:-3]}}" for file in sorted(files) if file.endswith(".py")]
    names = sorted(n.removesuffix(".__init__") for n in names)
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
                except ModuleNotFoundError as error:
                    if error.name.startswith("mergekit"):
                        raise
                    os._exit(0)  # needs a package that mergekit doesn't require
                with open(os.devnull, "w") as sys.stdout:
                    exec({CHECK!r}, {{}})
            except BaseException:
                traceback.print_exc()
                status = 1
            os._exit(status)
        if os.waitpid(pid, 0)[1]:
            failed.append(name)
    print(len(names), failed)
    """
    printed, said = succeeded(program, **OFF)
    count, _, failed = printed.strip().partition(" ")
    assert failed == "[]", said
    assert int(count) > 60
    assert "fusechat:" not in said


def test_the_stub_imports_the_standard_library_only():
    program = """
    import sys
    before = set(sys.modules)
    from fusechat_autoload import install
    install()
    import fusechat_merge
    install()
    own = {n for n in sys.modules if n.partition(".")[0] == "fusechat_merge"}
    assert own == {"fusechat_merge", "fusechat_merge._autoload"}, own
    own = {"fusechat_autoload", "fusechat_merge"}
    others = {n.partition(".")[0] for n in set(sys.modules) - before} - own
    assert others <= sys.stdlib_module_names, others
    hooks = [f for f in sys.meta_path if type(f).__module__.startswith("fusechat_merge")]
    assert len(hooks) == 1, hooks
    print(sorted(dir(fusechat_merge)) == sorted(set(dir(fusechat_merge))))
    """
    assert succeeded(program, **OFF)[0] == "True\n"


def test_torch_imports_nothing_more_of_us():
    program = """
    import sys, torch
    print([n for n in sorted(sys.modules) if n.startswith(("fusechat", "mergekit", "click"))])
    """
    expected = "['fusechat_autoload', 'fusechat_merge', 'fusechat_merge._autoload']\n"
    assert succeeded(program) == (expected, "")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        # The plugin, or anything that it imports, raises.
        ("mergekit_bridge/plugin.py", "raise RuntimeError('no plugin')"),
        ("mergekit_bridge/parameters.py", "def ("),
    ],
)
def test_what_it_imports_may_raise(tmp_path, file, text):
    source = Path(__file__).parents[2] / "fusechat_merge"
    shutil.copytree(source, tmp_path / "fusechat_merge")
    (tmp_path / "fusechat_merge" / file).write_text(text)
    program = """
    import torch
    assert torch.ones(2).sum() == 2
    import mergekit.plan, mergekit.scripts.merge_raw_pytorch
    from mergekit.merge_methods import get, registered_methods
    assert get("linear")
    print(any(m.spec.name == "varm" for m in registered_methods()))
    """
    printed, said = succeeded(program, tmp_path)  # where `python -c` looks first
    assert printed == "False\n"
    assert "Traceback" not in said
    (line,) = said.splitlines()
    assert line.startswith("fusechat: mergekit won't know varm and fusechat_sce: ")


def test_everything_the_stub_itself_uses_may_raise():
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
    assert succeeded(program)[0] == "2.0\n"


def test_what_other_finders_do_stays_their_own(monkeypatch, capsys):
    finder = _autoload._Finder()
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec("mergekit.plan") is None

    class Broken(Loader):
        def exec_module(self, module):
            raise ImportError("half installed")

    class Other:
        def find_spec(self, name, path, target):
            return spec_from_loader(name, Broken()) if broken else SimpleNamespace(name=name)

    sys.meta_path.append(Other())
    broken = True
    with pytest.raises(ImportError, match="^half installed$"):
        module = module_from_spec(finder.find_spec("mergekit.plan"))
        module.__spec__._initializing = True
        try:
            module.__spec__.loader.exec_module(module)
        finally:
            monkeypatch.delitem(sys.modules, "mergekit.plan", raising=False)
            module.__spec__._initializing = False
    assert type(module.__spec__) is ModuleSpec
    assert capsys.readouterr().err == ""
    broken = False  # a spec of a kind that can't be watched
    assert finder.find_spec("mergekit.plan").name == "mergekit.plan"
    assert "won't know varm and fusechat_sce: TypeError(" in capsys.readouterr().err


def test_one_failure_is_reported_once(monkeypatch, capsys):
    def extend():
        raise RuntimeError("another mergekit")

    monkeypatch.setattr(_autoload, "_AFTER", dict(_autoload._AFTER))
    monkeypatch.setattr(mergekit_plugin, "extend_planner", extend)
    monkeypatch.setattr(mergekit_plugin, "extend_genome", extend)
    _autoload._extend("mergekit.plan")
    _autoload._extend("mergekit.evo.genome")
    assert capsys.readouterr().err == (
        "fusechat: mergekit won't know varm and fusechat_sce: RuntimeError('another mergekit')\n"
    )
