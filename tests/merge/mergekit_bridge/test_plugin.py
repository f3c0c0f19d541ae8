"""varm and fusechat_sce inside an unmodified mergekit and in fusechat-merge, against float64."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import mergekit.plan
import pytest
import torch
from click.testing import CliRunner
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.io import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods import (
    PerGroupValues,
    get,
    merge_state_dicts,
    merge_tensors,
    registered_methods,
)
from mergekit.scripts import merge_raw_pytorch, run_yaml
from safetensors.torch import save_file
from torch import Tensor

import fusechat_merge
from fusechat_common.errors import FusechatError, RequestError
from fusechat_merge import _autoload
from fusechat_merge.engine.execute import merge
from fusechat_merge.mergekit_bridge import plugin as mergekit_plugin
from tests.support.checkpoints import BIAS, granite, llama_family
from tests.support.merging import (
    Tensors,
    add_tokenizers,
    as_mergekit,
    assert_same,
    configuration,
    piece,
    read,
    run_mergekit,
    write_yaml,
)
from tests.support.tensors import BF16, F16, F32, F64, same_bits

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UNITS = ("matrix", "module", "layer", "model")


def granularities(*names: str) -> Any:
    return pytest.mark.parametrize("granularity", names)


def varm(paths: Sequence[Path], out: Path, granularity: Any, **parameters: Any) -> Tensors:
    """What checkpoints make, the base first."""
    parameters |= {"granularity": granularity}
    return as_mergekit(configuration(paths, parameters=parameters), out)


def in_memory(models: Sequence[Mapping[str, Tensor]], method: str = "varm", **parameters: Any):
    return merge_state_dicts(models, method, base=0, parameters=parameters)


def unit(name: str, granularity: str) -> str:
    if granularity == "model":
        return ""
    pattern = {"matrix": r".*", "layer": r".*?\.\d+(?=\.)", "module": r".*?\.\d+\.[^.]+"}
    found = re.match(pattern[granularity], name)
    return found[0] if found else name


Choice = Callable[[str], Any]


def reference(
    models: Sequence[Mapping[str, Tensor]],
    granularity: str | Choice = "matrix",
    weight: Choice = lambda name: None,
    lam: Choice = lambda name: 1.0,
    statistic: str = "square",
) -> Tensors:
    """The merge in float64. A name missing from any model counts for nobody's statistics."""
    base, *targets = models
    names = [n for n in base if all(n in t for t in targets)]
    deltas = {n: [t[n].to(F64) - base[n].to(F64) for t in targets] for n in names}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(targets))
    for name in names:
        for kind in UNITS:
            row = sums[kind, unit(name, kind)]
            for j, d in enumerate(deltas[name]):
                row[j] += float((d * d).sum() if statistic == "square" else d.abs().sum())
    merged = {}
    for name, values in base.items():
        kind = granularity(name) if callable(granularity) else granularity
        prior = weight(name) or [1.0] * len(targets)
        shares = [w * s for w, s in zip(prior, sums[kind, unit(name, kind)], strict=True)]
        update = torch.zeros_like(values, dtype=F64)
        here = [(s, t[name]) for s, t in zip(shares, targets, strict=True) if name in t]
        whole = sum(s for s, _ in here)
        for share, target in here:
            if whole:
                update += share / whole * (target.to(F64) - values.to(F64))
        merged[name] = values.to(F64) + lam(name) * update
    return merged


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in found.items():
        eps = torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.to(F64), expected[name], rtol=eps, atol=1e-7, msg=name)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """float32, untied; in two shards each."""
    return llama_family(tmp_path_factory.mktemp("fp32"), shards=2)


@pytest.fixture(scope="module")
def models(family):
    """The family's tensors, which no test changes."""
    return [read(path) for path in family]


@pytest.fixture(autouse=True)
def _no_leftover_loaders():
    """mergekit keeps one loader a path for the life of the process."""
    yield
    LoaderCache().loaders.clear()
    merge_raw_pytorch.SimpleLoaderCache().loaders.clear()


# -- units across tensors


@pytest.mark.parametrize("dtypes", [(F32,) * 4, (BF16, F32, F16)])
@pytest.mark.parametrize("statistic", ["square", "absolute"])
@granularities(*UNITS, "element")
def test_yaml_memory_and_reference_agree(tmp_path, dtypes, granularity, statistic):
    family = llama_family(tmp_path / "in", dtypes, shards=2)
    models = [read(path) for path in family]
    parameters = {"granularity": granularity, "statistic": statistic}
    found = varm(family, tmp_path, **parameters)
    assert {t.dtype for t in found.values()} == {F32}
    assert_same(found, in_memory(models, **parameters))
    if granularity == "element":
        for name, tensor in found.items():
            given = [model[name] for model in models]
            one = merge_tensors(given, "varm", base_index=0, parameters=parameters)
            assert same_bits(tensor, one), name
    else:
        assert_close(found, reference(models, granularity, statistic=statistic))


def test_filters_and_gradients(family, models, tmp_path):
    settings = configuration(
        family,
        parameters={
            "granularity": [
                {"filter": "q_proj", "value": "layer"},
                {"filter": "self_attn", "value": "module"},
                {"filter": "norm", "value": "model"},
                {"value": "matrix"},
            ],
            "lambda": [{"filter": "o_proj", "value": [1.7, "1e-1"]}, {"value": 0.9}],
            "weight": 0.25,
        },
    )
    filtered = [{"filter": "mlp", "value": 0}, {"value": 3}]
    for model, weight in zip(settings["models"], ([0.5, 2.0], filtered), strict=False):
        model["parameters"] = {"weight": weight}

    def kind(name):
        if "q_proj" in name:
            return "layer"
        if "self_attn" in name:
            return "module"
        return "model" if "norm" in name else "matrix"

    def prior(name):
        return [2.0 if "layers.1." in name else 0.5, 0.0 if "mlp" in name else 3.0, 0.25]

    def lam(name):
        return (0.1 if "layers.1." in name else 1.7) if "o_proj" in name else 0.9

    found = as_mergekit(settings, tmp_path)
    assert_close(found, reference(models, kind, prior, lam))


@granularities("module", "layer")
def test_slices(family, models, tmp_path, granularity):
    layers = ((1, (0, 1, 2)), (0, (0, 2, 3)), (1, (0, 1, 3)))  # (which layer, of which models)
    settings = {
        "merge_method": "varm",
        "base_model": str(family[0]),
        "slices": [piece([family[n] for n in of], layer, layer + 1) for layer, of in layers],
        "parameters": {"granularity": granularity},
    }
    expected: Tensors = {}
    for number, (layer, of) in enumerate(layers):
        stem, new = f"model.layers.{layer}.", f"model.layers.{number}."
        parts = [
            {new + n.removeprefix(stem): t for n, t in models[m].items() if n.startswith(stem)}
            for m in of
        ]
        expected |= reference(parts, granularity)
    for names, (_, of) in (([EMBEDDING], layers[0]), ([NORM, HEAD], layers[-1])):
        expected |= reference([{n: models[m][n] for n in names} for m in of], granularity)
    assert_close(as_mergekit(settings, tmp_path), expected)


def test_a_slice_with_another_base_and_one_without_targets(family, models, tmp_path):
    base, first, second, _ = family
    settings = {
        "merge_method": "varm",
        "base_model": str(base),
        "slices": [piece([first, second], 0, 1, base_model=str(first)), piece([base], 1, 2)],
        "parameters": {"granularity": "layer"},
    }
    for name, merged in as_mergekit(settings, tmp_path).items():
        moved = "layers.0." in name or "embed" in name  # by one target at λ = 1
        assert same_bits(merged, models[2 if moved else 0][name])


@granularities("matrix", "module", "model")
def test_dtypes_of_the_configuration(family, models, tmp_path, granularity):
    parameters = {"granularity": granularity}
    settings = configuration(family, parameters=parameters, dtype="bfloat16", out_dtype="float16")
    narrow = [{n: t.bfloat16() for n, t in model.items()} for model in models]
    expected = in_memory(narrow, granularity=granularity)
    assert {t.dtype for t in expected.values()} == {BF16}
    found = as_mergekit(settings, tmp_path)
    assert_same(found, {n: t.half() for n, t in expected.items()})


@granularities(*UNITS, "element")
def test_units_that_no_target_moved_are_copied(tmp_path, granularity):
    def still(label, tensors):
        for name in tensors:
            if "layers.0." in name or "norm" in name:
                tensors[name] = torch.full_like(tensors[name], -0.0)

    paths = llama_family(tmp_path / "in", (BF16,) * 3, edit=still)
    found = varm(paths, tmp_path, granularity, **{"lambda": 1.7})
    for name, tensor in read(paths[0]).items():
        if "layers.0." in name and granularity != "model":
            assert same_bits(found[name], tensor)


@granularities(*UNITS)
def test_one_target_is_copied(tmp_path, granularity):
    def zeros(label, tensors):
        for tensor in tensors.values():
            tensor.view(-1)[::7] = -0.0 if label == "t0" else 0.0

    paths = llama_family(tmp_path / "in", (BF16,) * 2, edit=zeros)
    assert_same(varm(paths, tmp_path, granularity), read(paths[1]))


# -- what task_arithmetic does with odd tensors


@granularities("matrix", "module", "model")
@pytest.mark.parametrize("phantom", [False, True])
def test_tied_embeddings(tmp_path, phantom, granularity):
    def edit(label, tensors):
        if phantom and label == "t1":
            tensors[HEAD] = tensors[EMBEDDING] * 1.5

    changes = {"tie_word_embeddings": True}
    paths = llama_family(tmp_path / "in", changes=changes, edit=edit)
    models = [read(path) for path in paths]
    if phantom:  # mergekit reads the embedding where a model has no lm_head
        models = [{HEAD: tensors[EMBEDDING], **tensors} for tensors in models]
    assert_close(varm(paths, tmp_path, granularity), reference(models, granularity))


@granularities(*UNITS)
def test_an_optional_tensor_missing_from_a_target_counts_for_nobody(tmp_path, granularity):
    paths = granite(tmp_path / "in", (F32,) * 4, base=0.0, t0=100.0, t2=200.0)
    models = [read(path) for path in paths]
    expected = reference(models, granularity)
    if granularity == "matrix":
        # Alone in its unit, whose statistics are those of the models that have it.
        expected |= reference([{BIAS: model[BIAS]} for model in models if BIAS in model])
    assert_close(varm(paths, tmp_path, granularity), expected)


@granularities("module", "layer")
def test_a_unit_of_nothing_but_a_missing_tensor_is_the_bases(tmp_path, granularity):
    def edit(label, tensors):
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn"
            tensors |= {f"{at}.q_norm.weight": torch.ones(8), f"{at}.k_norm.weight": torch.ones(8)}
            del tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
        if label == "t1":
            del tensors[HEAD]  # optional, and not tied in mergekit's table

    cohere = {"architectures": ["CohereForCausalLM"], "model_type": "cohere"}
    paths = llama_family(tmp_path / "in", changes=cohere, edit=edit)
    found = varm(paths, tmp_path, granularity)
    assert same_bits(found[HEAD], read(paths[0])[HEAD])


@granularities("matrix", "module", "element")
def test_nan_in_an_optional_tensor(tmp_path, granularity):
    paths = granite(tmp_path / "in", (F32,) * 4, base=1.0, t0=1.0, t2=math.nan)
    with pytest.raises(FusechatError) as caught:
        varm(paths, tmp_path, granularity)
    assert str(caught.value) == f"tensor {BIAS} of model {paths[3]} {BROKEN}"


def refusal(paths: Sequence[Path], tmp_path: Path, granularity: str) -> str:
    """What varm's ValueError says of checkpoints, which must be what task_arithmetic's does."""
    told = []
    for method, parameters in (
        ("varm", {"granularity": granularity}),
        ("task_arithmetic", {"weight": 0.3}),
    ):
        with pytest.raises(ValueError) as caught:
            run_mergekit(configuration(paths, method, parameters=parameters), tmp_path / method)
        told.append((type(caught.value), str(caught.value)))
    assert told == told[:1] * 2
    return told[0][1]


@granularities("matrix", "module", "element")
def test_an_optional_tensor_missing_from_the_base(tmp_path, granularity):
    paths = granite(tmp_path / "in", (F32,) * 4, t0=0.0, t1=1.0)
    assert "Base input is not present" in refusal(paths, tmp_path, granularity)


@granularities("matrix", "layer", "element")
def test_vocabulary_mismatch(tmp_path, granularity):
    def longer(label, tensors):
        if label == "t1":
            for name in (EMBEDDING, HEAD):
                tensors[name] = torch.cat([tensors[name], torch.ones(8, 32)])

    paths = llama_family(tmp_path / "in", edit=longer)
    assert refusal(paths, tmp_path / "refused", granularity).startswith("Tensor size mismatch for")
    other = configuration(paths, "task_arithmetic", parameters={"weight": 0.3})
    as_mergekit(other, tmp_path / "other", unsafe_truncate_embeddings=True)
    settings = configuration(paths, parameters={"granularity": granularity})
    found = as_mergekit(settings, tmp_path, unsafe_truncate_embeddings=True)
    models = [{n: t[:1100] for n, t in read(path).items()} for path in paths]
    assert_same(found, in_memory(models, granularity=granularity))


@granularities("matrix", "module")
def test_non_floating_buffers(tmp_path, granularity):
    odd, models = torch.arange(32) % 2 == 1, []

    def edit(label, tensors):
        models.append(dict(tensors))
        tensors[NORM] = ~odd if label == "t2" else odd

    paths = llama_family(tmp_path / "in", edit=edit)
    found = varm(paths[:3], tmp_path, granularity)
    assert torch.equal(found.pop(NORM), odd)
    expected = reference(models[:3], granularity)
    del expected[NORM]
    assert_close(found, expected)
    message = f"Non-floating buffer {NORM!r} differs between inputs; resolve it explicitly before"
    assert refusal(paths, tmp_path / "refused", granularity) == f"{message} merging"
    with pytest.raises(FusechatError, match=f"^{NORM}: .*differs between inputs"):
        merge(configuration(paths), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_permuted_vocabulary(tmp_path):
    size = 40
    paths = llama_family(tmp_path / "in", (F32,) * 3, changes={"vocab_size": size})
    order = torch.randperm(size - 1, generator=torch.Generator().manual_seed(1)) + 1
    words, mixed = ([f"w{n}" for n in ids] for ids in (range(1, size), order.tolist()))
    add_tokenizers(paths, words, mixed, words)
    settings = configuration(paths, tokenizer_source="base")
    models = [read(path) for path in paths]
    places = torch.cat([torch.zeros(1, dtype=torch.int64), order]).argsort()
    models[1] |= {name: models[1][name][places] for name in (EMBEDDING, HEAD)}
    assert_close(as_mergekit(settings, tmp_path / "all"), reference(models))
    # A granularity of several tensors is fine where none of them is permuted.
    parameters = {"granularity": [{"filter": "layers", "value": "layer"}, {"value": "matrix"}]}
    found = as_mergekit({**settings, "parameters": parameters}, tmp_path / "filtered")
    assert_close(found, reference(models, lambda n: "layer" if "layers" in n else "matrix"))


# -- reading


@pytest.fixture
def reads(monkeypatch):
    """How often which tensor was read."""
    counted = Counter()
    original = LazyTensorLoader.get_tensor

    def get_tensor(self, key, *args, **kwargs):
        counted[key] += 1
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", get_tensor)
    return counted


@pytest.mark.parametrize(
    ("granularity", "times"),
    [("matrix", 1), ("element", 1), ("module", 2), ("layer", 2), ("model", 2)],
)
def test_statistics_are_read_once_a_plan(family, tmp_path, reads, granularity, times):
    settings = configuration(family, parameters={"granularity": granularity})
    found = run_mergekit(settings, tmp_path / "out")
    assert reads == dict.fromkeys(found, times * len(family))


# -- NaN

BROKEN = "holds NaN or Inf: that checkpoint is broken, replace it"


def run_command(command: click.Command, file: Path, out: Path, *options: str) -> tuple[int, str]:
    """A script of mergekit's in this process: its exit status, and what it said."""
    result = CliRunner().invoke(command, [str(file), str(out), *options])
    return result.exit_code, result.output


@pytest.mark.parametrize("method", ["varm", "varm-module", "varm-element", "fusechat_sce"])
@pytest.mark.parametrize("broken", ["base", "t1"])
def test_nan_is_named(tmp_path, broken, method):
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(label, tensors):
        if label == broken:
            tensors[name][3, 4] = math.nan

    paths = llama_family(tmp_path / "in", edit=edit)
    method, _, granularity = method.partition("-")
    parameters = {"granularity": granularity} if granularity else {}
    file = write_yaml(tmp_path / "merge.yml", configuration(paths, method, parameters=parameters))
    code, output = run_command(run_yaml.main, file, tmp_path / "out", "--quiet")
    assert code == 1
    path = tmp_path / "in" / broken
    assert output.splitlines()[-1] == f"Error: tensor {name} of model {path} {BROKEN}"
    with pytest.raises(FusechatError) as caught:
        merge(file, tmp_path / "ours")
    assert str(caught.value) == f"tensor {name} of model {path} {BROKEN}"
    assert not (tmp_path / "ours").exists()
    models = {path.name: read(path) for path in paths}
    with pytest.raises(FusechatError) as caught:
        merge_state_dicts(models, method, base="base", parameters=parameters)
    assert str(caught.value) == f"tensor {name} of model {broken} {BROKEN}"


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_nan_in_a_nameless_tensor(method):
    with pytest.raises(FusechatError) as caught:
        merge_tensors([torch.zeros(2), torch.tensor([1.0, math.inf])], method, base_index=0)
    assert str(caught.value) == f"a tensor of model 1 {BROKEN}"


# -- refusals: before any tensor is read, with no output folder


TOKENIZER = (
    "granularity module, layer and model can't be combined with a tokenizer merge (tokenizer or"
    " tokenizer_source): use granularity matrix or element for the units of"
    " model.embed_tokens.weight, lm_head.weight, or bring the models to one vocabulary first"
)
VARM_TAKES = "it takes granularity, statistic, lambda, weight"
WEIGHTLESS = (
    "weight: every target's is 0 for {}; give at least one target a weight above 0, or use"
    " lambda: 0 to keep the pivot's"
)


def weightless(part: str, value: Any = 0) -> dict[str, Any]:
    return {"weight": [{"filter": part, "value": value}, {"value": 1}]}


@pytest.fixture
def files(tmp_path):
    """What mergekit-pytorch merges: files, not checkpoints."""
    made = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for number, file in enumerate(made):
        save_file({"w": torch.full((3,), float(number)), "norm": torch.ones(1)}, file)
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"weight": -1, "normalize": True}},
         "2 problems:\n  parameters.weight: -1 is below 0\n  parameters.normalize: varm has no"
         f" parameter 'normalize'; {VARM_TAKES}"),
        ({"base_model": None}, "base_model is missing: varm needs the pivot"),
        ({"parameters": weightless("model.norm")}, WEIGHTLESS.format("model.norm.weight")),
        ({"parameters": weightless("lm_head", [0])}, WEIGHTLESS.format(HEAD)),
        ({"parameters": {"granularity": "model"}, "tokenizer_source": "base"}, TOKENIZER),
        ({"parameters": {"granularity": "module"}, "tokenizer": {"source": "base"}}, TOKENIZER),
        ({"merge_method": "fusechat_sce", "parameters": {"select_topk": 2}},
         "parameters.select_topk: 2 is above 1"),
        ({"raw": True, "parameters": {"granularity": "layer"}},
         "mergekit-pytorch knows no modules or layers: use granularity matrix or element here, or"
         " mergekit-yaml or fusechat-merge run"),
        ({"raw": True, "parameters": {"lambda": ".nan"}},
         "parameters.lambda: '.nan' is not a finite number"),
        ({"raw": True, "parameters": weightless("norm")}, WEIGHTLESS.format("norm")),
    ],
)  # fmt: skip
def test_refused(family, files, tmp_path, reads, changes, message):
    raw = changes.get("raw")
    settings = configuration(files if raw else family) | changes
    settings.pop("raw", None)
    out, file = tmp_path / "out", write_yaml(tmp_path / "merge.yml", settings)
    code, output = run_command(merge_raw_pytorch.main if raw else run_yaml.main, file, out)
    assert code == 2
    assert output[output.index("Error: ") :] == f"Error: {message}\n"
    assert not out.exists()
    assert not reads
    if not raw:
        with pytest.raises(RequestError) as caught:
            run_mergekit(settings, out)
        assert str(caught.value) == message


def test_mergekit_pytorch_with_another_method(tmp_path, files):
    settings = configuration(files, "task_arithmetic", parameters={"weight": 0.5})
    config = write_yaml(tmp_path / "merge.yml", settings)
    code, output = run_command(merge_raw_pytorch.main, config, tmp_path / "out")
    assert code == 0, output
    assert read(tmp_path / "out")["w"].tolist() == [1.5] * 3


# -- in memory


def test_merge_tensors(models):
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = [model[name] for model in models]

    def merged(given=tensors, **options):
        return merge_tensors(given, "varm", **{"base_index": 0, **options})

    expected = merged()
    # The unit is the tensor that was given, whatever the granularity.
    for granularity in ("module", "layer", "model"):
        for given in (name, None):
            assert same_bits(merged(name=given, parameters={"granularity": granularity}), expected)
    assert merged(out_dtype=F16).dtype == F16
    moved = merged(tensors[::-1], base_index=3, parameters={"weight": [0, 0, 2]})
    assert same_bits(moved, tensors[1])
    with pytest.raises(ValueError, match="requires a base input"):
        merge_tensors(tensors, "varm")
    with pytest.raises(TypeError, match=r"Unknown parameter\(s\) for varm: lamda"):
        merged(parameters={"lamda": 1})
    for bad in ({"weight": -1.0}, {"granularity": "block"}, {"lambda": math.inf}):
        with pytest.raises(ValueError, match="validation error"):
            merged(parameters=bad)
    with pytest.raises(RequestError) as caught:
        merged(name=name, parameters={"weight": 0})
    assert str(caught.value) == WEIGHTLESS.format(name)


@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_only_a_base(method):
    base = torch.tensor([-0.0, 1.0])
    assert same_bits(merge_tensors([base], method, base_index=0), base)


@granularities("matrix", "layer")
def test_merge_state_dicts_of_modules_and_buffers(granularity):
    def module(shift):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(shift * torch.randn_like(parameter))
        return net

    models = {"base": module(0), "a": module(0.1), "b": module(0.2)}
    parameters = {"granularity": granularity, "weight": {"a": 2.0, "b": 1.0}}
    found = merge_state_dicts(models, "varm", base="base", parameters=parameters)
    count = "1.num_batches_tracked"
    assert torch.equal(found.pop(count), torch.tensor(0))
    # `0` and `1` are the layers here; the names begin with their digits.
    named = [
        {f"x.{n}": t for n, t in net.state_dict().items() if n != count} for net in models.values()
    ]
    assert all(t.is_floating_point() for t in named[0].values())
    expected = reference(named, granularity, lambda n: [2.0, 1.0])
    assert_close({f"x.{n}": t.detach() for n, t in found.items()}, expected)


def test_a_granularity_a_tensor_in_memory(models):
    names = list(models[0])
    kinds = ["module" if "attn" in n else "element" if "norm" in n else "layer" for n in names]
    found = in_memory(models, granularity=PerGroupValues(kinds))
    by_kind = {kind: in_memory(models, granularity=kind) for kind in set(kinds)}
    assert_same(found, {n: by_kind[kind][n] for n, kind in zip(names, kinds, strict=True)})


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("variant", ["paper", "fork"])
@pytest.mark.parametrize("topk", [0.0, 0.3, 1.0])
def test_sce_in_memory_and_from_checkpoints(tmp_path, dtype, variant, topk):
    paths = llama_family(tmp_path / "in", (dtype,) * 4)
    models = [read(path) for path in paths]
    parameters = {"select_topk": topk, "variant": variant}
    settings = configuration(paths, "fusechat_sce", parameters=parameters)
    found = as_mergekit(settings, tmp_path)
    assert_same(found, in_memory(models, "fusechat_sce", **parameters))
    base, *targets = models
    for name, tensor in found.items():
        alone = fusechat_merge.sce(base[name], [t[name] for t in targets], **parameters)
        assert same_bits(tensor, alone), name


# -- mergekit-evolve


def genome(paths: Sequence[Path], method: str, **settings: Any) -> ModelGenome:
    base, *targets = map(str, paths)
    fields = {"models": targets, "merge_method": method, "base_model": base, **settings}
    return ModelGenome(ModelGenomeDefinition.model_validate(fields))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layer_granularity": 1},
        {"filters": ["self_attn", "mlp"]},
        {"layer_granularity": 1, "smooth": True},
        {"layer_granularity": 1, "smooth": True, "filters": ["mlp"]},
    ],
)
@pytest.mark.parametrize("method", ["varm", "fusechat_sce"])
def test_genomes_can_be_merged(family, models, tmp_path, method, settings):
    one = genome(family, method, **settings)
    config = one.genotype_merge_config(one.initial_genotype(random=True))
    found = run_mergekit(config.model_dump(exclude_none=True, mode="json"), tmp_path / "out")
    assert set(found) == set(models[0])


def test_a_genomes_numbers_reach_the_merge(family):
    assert METHOD_PARAM_MAPS["varm"] == ["weight"]
    assert METHOD_PARAM_MAPS["fusechat_sce"] == ["select_topk"]
    values = torch.tensor([0.5, -2.0, 3.0])
    config = genome(family, "varm").genotype_merge_config(values)
    (piece,) = config.slices
    weights = [{"weight": 0.5}, {"weight": 2.0}, {"weight": 3.0}, None]
    assert [s.parameters for s in piece.sources] == weights
    assert config.parameters is None
    sce = genome(family, "fusechat_sce")
    (piece,) = sce.genotype_merge_config(torch.tensor([0.2, 0.4, 0.6])).slices
    assert piece.parameters == {"select_topk": pytest.approx(0.4)}
    assert not any(source.parameters for source in piece.sources)
    assert sce.genotype_merge_config(values).slices[0].parameters == {"select_topk": 0.5}


def test_other_genomes_are_left_alone(family):
    config = genome(family, "task_arithmetic").genotype_merge_config(torch.rand(3))
    assert config.parameters == {"normalize": False, "int8_mask": True}
    (piece,) = config.slices
    assert all("weight" in source.parameters for source in piece.sources[:3])


# -- registration


def test_registering_twice_is_harmless():
    before, planner = registered_methods(), mergekit.plan.MergePlanner._plan
    mergekit_plugin.register_methods()
    mergekit_plugin.extend_planner()
    mergekit_plugin.extend_raw_planner()
    mergekit_plugin.extend_genome()
    _autoload.install()
    assert registered_methods() == before
    assert [m.spec.name for m in before].count("varm") == 1
    assert mergekit.plan.MergePlanner._plan is planner
    assert get("varm").spec.pretty_name == "VaRM"
