"""Every way in which a user starts mergekit, in a process of its own that imports nothing of ours."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file

from tests.support.checkpoints import llama_family
from tests.support.merging import assert_same, configuration, read, run_program

SCRIPTS = Path(sys.executable).parent


IN_PYTHON = """
import json, sys, yaml
from mergekit.merge import run_merge, MergeOptions
from mergekit.config import MergeConfiguration
assert not any(name.startswith("fusechat_merge.mergekit_bridge.plugin.") for name in sys.modules)
config, paths, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
with open(config) as file:
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(file)), out + "/run_merge", MergeOptions(quiet=True))

from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import load_file, save_file
models = [load_file(path + "/model.safetensors") for path in paths]
save_file(merge_state_dicts(models, "varm", base=0, parameters={"granularity": "layer"}), out + "/dicts")
name = "model.norm.weight"
merged = merge_tensors([m[name] for m in models], "fusechat_sce", base_index=0)
save_file({name: merged}, out + "/tensors")

from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
print(json.dumps([METHOD_PARAM_MAPS["varm"], METHOD_PARAM_MAPS["fusechat_sce"]]))
genome = ModelGenome(ModelGenomeDefinition(models=paths[1:], merge_method="varm", base_model=paths[0]))
config = genome.genotype_merge_config(genome.initial_genotype())
run_merge(config, out + "/genome", MergeOptions(quiet=True))
"""

OTHER_METHODS = """
import json, sys, torch
from mergekit.merge_methods import merge_state_dicts, registered_methods
from safetensors.torch import load_file, save_file
paths, out = json.loads(sys.argv[1]), sys.argv[2]
models = [load_file(path + "/model.safetensors") for path in paths]
names = sorted({m.spec.name for m in registered_methods()} - {"varm", "fusechat_sce"})
kept = {}
for name in names:
    torch.manual_seed(0)
    (method,) = (m for m in registered_methods() if m.spec.name == name)
    parameters = {p.name: 0.5 for p in method.spec.parameters if p.required}
    for count in (4, 3, 2, 1):
        try:
            merged = merge_state_dicts(models[:count], name, base=0, parameters=parameters)
        except Exception as error:
            kept[f"{name} {count} {type(error).__name__} {error}"] = torch.zeros(0)
        else:
            kept |= {f"{name} {count} {key}": value.clone() for key, value in merged.items()}
save_file(kept, out)
print(json.dumps([sorted(names), "fusechat_merge" in sys.modules]))
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return llama_family(tmp_path_factory.mktemp("models"), (torch.bfloat16,) * 4)


@pytest.fixture(scope="module")
def done(paths, tmp_path_factory):
    """Every command run once, two at a time: the folder they wrote to, and how they ended."""
    home = tmp_path_factory.mktemp("runs")
    base, *targets = map(str, paths)
    module = configuration(paths, parameters={"granularity": "module"})
    files = [Path(path) / "model.safetensors" for path in paths]
    documents = {
        "module": [module],
        "misspelt": [configuration(paths, parameters={"granularty": "module", "weight": -1})],
        "raw": [configuration(files, parameters={"granularity": "element"})],
        "multi": [
            {**module, "name": "inner", "models": module["models"][:2]},
            configuration(
                [base, "inner", targets[2]], "fusechat_sce", parameters={"select_topk": 0.5}
            ),
        ],
    }
    for name, content in documents.items():
        (home / f"{name}.yml").write_text(yaml.safe_dump_all(content, sort_keys=False))
    (home / "in_python").mkdir()
    given = json.dumps([base, *targets])

    def script(name, document, *arguments):
        return [str(SCRIPTS / name), f"{home}/{document}.yml", *arguments]

    def python(program, *arguments):
        return [sys.executable, "-c", program, *arguments]

    commands = {
        "mergekit-yaml": script("mergekit-yaml", "module", f"{home}/yaml"),
        "misspelt": script("mergekit-yaml", "misspelt", f"{home}/misspelt"),
        "mergekit-multi": script(
            "mergekit-multi", "multi", "-I", f"{home}/inner", "--out-path", f"{home}/multi"
        ),
        "mergekit-pytorch": script("mergekit-pytorch", "raw", f"{home}/raw"),
        "in Python": python(IN_PYTHON, f"{home}/module.yml", given, f"{home}/in_python"),
        "others with": python(OTHER_METHODS, given, f"{home}/with.safetensors"),
        "others without": python(OTHER_METHODS, given, f"{home}/without.safetensors"),
    }
    off = {"others without": {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}}
    with ThreadPoolExecutor(2) as pool:
        ended = {
            name: pool.submit(run_program, command, HF_HUB_OFFLINE="1", **off.get(name, {}))
            for name, command in commands.items()
        }
    return home, {name: future.result() for name, future in ended.items()}


@pytest.fixture(scope="module")
def models(paths):
    return [read(path) for path in paths]


@pytest.mark.parametrize(
    "name", ["mergekit-yaml", "mergekit-multi", "mergekit-pytorch", "in Python", "others with"]
)
def test_they_succeed_and_say_nothing_of_us(done, name):
    _, ended = done
    assert ended[name].returncode == 0, ended[name].stderr
    assert "fusechat:" not in ended[name].stderr


def test_mergekit_yaml(done, models):
    home, _ = done
    expected = merge_state_dicts(models, "varm", base=0, parameters={"granularity": "module"})
    assert_same(read(home / "yaml"), expected)
    assert (home / "yaml" / "config.json").exists()
    assert "varm" in (home / "yaml" / "README.md").read_text()


def test_mergekit_yaml_with_a_misspelt_parameter(done):
    home, ended = done
    result = ended["misspelt"]
    assert result.returncode == 2
    assert result.stderr[result.stderr.index("Error: ") :] == (
        "Error: 2 problems:\n"
        "  parameters.granularty: varm has no parameter 'granularty' (did you mean 'granularity'?);"
        " it takes granularity, statistic, lambda, weight\n"
        "  parameters.weight: -1 is below 0\n"
    )
    assert "Traceback" not in result.stderr
    assert not (home / "misspelt").exists()


def test_mergekit_multi(done, models):
    home, _ = done
    base, first, second, third = models
    inner = merge_state_dicts(
        [base, first, second], "varm", base=0, parameters={"granularity": "module"}
    )
    assert_same(read(home / "inner" / "inner"), inner)
    outer = merge_state_dicts(
        [base, inner, third], "fusechat_sce", base=0, parameters={"select_topk": 0.5}
    )
    assert_same(read(home / "multi"), outer)


def test_mergekit_pytorch(done, models):
    home, _ = done
    expected = merge_state_dicts(models, "varm", base=0, parameters={"granularity": "element"})
    assert_same(read(home / "raw"), expected)


def test_in_python(done, models):
    home, ended = done
    out = home / "in_python"
    assert_same(read(out / "run_merge"), read(home / "yaml"))
    layer = merge_state_dicts(models, "varm", base=0, parameters={"granularity": "layer"})
    assert_same(load_file(out / "dicts"), layer)
    name = "model.norm.weight"
    sce = merge_state_dicts([{name: m[name]} for m in models], "fusechat_sce", base=0)
    assert_same(load_file(out / "tensors"), sce)
    assert json.loads(ended["in Python"].stdout.splitlines()[-1]) == [["weight"], ["select_topk"]]
    # A genome's first guess gives every target the same weight.
    assert_same(read(out / "genome"), merge_state_dicts(models, "varm", base=0))


def test_other_methods_give_the_same_bytes_without_us(done):
    home, ended = done
    names, ours = json.loads(ended["others with"].stdout)
    assert ours
    assert {"linear", "task_arithmetic", "ties", "sce", "slerp", "model_stock"} <= set(names)
    assert json.loads(ended["others without"].stdout) == [names, False]
    found = load_file(home / "with.safetensors")
    for name in names:
        assert any(key.startswith(f"{name} ") and t.numel() for key, t in found.items()), name
    assert_same(found, load_file(home / "without.safetensors"))
