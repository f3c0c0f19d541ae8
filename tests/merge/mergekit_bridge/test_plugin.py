"""varm and fusechat_sce inside an unmodified mergekit, in memory and from checkpoints."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import METHOD_PARAM_MAPS, ModelGenome, ModelGenomeDefinition
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.merge_methods import (
    PerGroupValues,
    get,
    merge_state_dicts,
    merge_tensors,
    registered_methods,
)
from mergekit.options import MergeOptions
from mergekit.scripts import merge_raw_pytorch, run_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusechat_common.errors import FusechatError, RequestError

F64 = torch.float64
Family = Callable[..., list[Path]]


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def configuration(paths: Sequence[Path], method: str = "varm", **settings: Any) -> dict[str, Any]:
    base, *targets = map(str, paths)
    return {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": target} for target in targets],
        **settings,
    }


def merge(settings: Mapping[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    config = MergeConfiguration.model_validate(settings)
    run_merge(config, str(out), MergeOptions(quiet=True, **options))
    return read(out)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.reshape(-1), b.reshape(-1)
    return a.dtype == b.dtype and a.view(torch.uint8).equal(b.view(torch.uint8))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert [name for name in found if not same_bits(found[name], expected[name])] == []


def unit(name: str, granularity: str) -> str:
    if granularity == "model":
        return ""
    found = re.match(
        {"matrix": r".*", "layer": r".*?\.\d+(?=\.)", "module": r".*?\.\d+\.[^.]+"}[granularity],
        name,
    )
    return found[0] if found else name


Choice = Callable[[str], Any]


def reference(
    base: Mapping[str, Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    granularity: Choice = lambda name: "matrix",
    weight: Choice = lambda name: None,
    lam: Choice = lambda name: 1.0,
    statistic: str = "square",
) -> dict[str, Tensor]:
    """The merge in float64. A name missing from any model counts for nobody's statistics."""
    names = [n for n in base if all(n in t for t in targets)]
    deltas = {n: [t[n].to(F64) - base[n].to(F64) for t in targets] for n in names}
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(targets))
    for name in names:
        for kind in ("matrix", "module", "layer", "model"):
            row = sums[kind, unit(name, kind)]
            for j, d in enumerate(deltas[name]):
                row[j] += float((d * d).sum() if statistic == "square" else d.abs().sum())
    merged = {}
    for name, values in base.items():
        kind = granularity(name)
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
def family(llama_family: Family, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """float32, untied; t1 in two shards."""
    return llama_family(tmp_path_factory.mktemp("fp32"), shards=2)


# -- units across tensors


@pytest.mark.parametrize("statistic", ["square", "absolute"])
@pytest.mark.parametrize("granularity", ["matrix", "module", "layer", "model", "element"])
def test_yaml_memory_and_reference_agree(
    family: list[Path], tmp_path: Path, granularity: str, statistic: str
) -> None:
    parameters = {"granularity": granularity, "statistic": statistic}
    found = merge(configuration(family, parameters=parameters), tmp_path / "out")
    base, *targets = map(read, family)
    models = dict(enumerate([base, *targets]))
    assert_same(found, merge_state_dicts(models, "varm", base=0, parameters=parameters))
    if granularity == "element":
        assert_same(
            found,
            {
                name: merge_tensors(
                    [base[name], *(t[name] for t in targets)],
                    "varm",
                    base_index=0,
                    parameters=parameters,
                )
                for name in base
            },
        )
    else:
        assert_close(found, reference(base, targets, lambda name: granularity, statistic=statistic))


def test_units_give_different_merges(family: list[Path], tmp_path: Path) -> None:
    found = [
        merge(configuration(family, parameters={"granularity": g}), tmp_path / g)
        for g in ("matrix", "module", "layer", "model")
    ]
    name = "model.layers.1.self_attn.q_proj.weight"
    assert len({tensors[name].numpy().tobytes() for tensors in found}) == 4


def test_filters_and_gradients(family: list[Path], tmp_path: Path) -> None:
    base, first, second, third = map(str, family)
    found = merge(
        {
            "merge_method": "varm",
            "base_model": base,
            "models": [
                {"model": first, "parameters": {"weight": [0.5, 2.0]}},
                {
                    "model": second,
                    "parameters": {"weight": [{"filter": "mlp", "value": 0}, {"value": 3}]},
                },
                {"model": third},
            ],
            "parameters": {
                "granularity": [
                    {"filter": "q_proj", "value": "layer"},
                    {"filter": "self_attn", "value": "module"},
                    {"filter": "norm", "value": "model"},
                    {"value": "matrix"},
                ],
                "lambda": [{"filter": "o_proj", "value": [1.7, "1e-1"]}, {"value": 0.9}],
                "weight": 0.25,
            },
        },
        tmp_path / "out",
    )

    def kind(name: str) -> str:
        if "q_proj" in name:
            return "layer"
        if "self_attn" in name:
            return "module"
        return "model" if "norm" in name else "matrix"

    def prior(name: str) -> list[float]:
        return [2.0 if "layers.1." in name else 0.5, 0.0 if "mlp" in name else 3.0, 0.25]

    def lam(name: str) -> float:
        return (0.1 if "layers.1." in name else 1.7) if "o_proj" in name else 0.9

    pivot, *targets = map(read, family)
    assert_close(found, reference(pivot, targets, kind, prior, lam))


def test_slices(family: list[Path], tmp_path: Path) -> None:
    base, first, second, third = map(str, family)

    def piece(layer: int, *models: str, **more: Any) -> dict[str, Any]:
        return {
            "sources": [{"model": m, "layer_range": [layer, layer + 1]} for m in models],
            **more,
        }

    layers = ((1, first, second), (0, second, third), (1, first, third))
    settings = {
        "merge_method": "varm",
        "base_model": base,
        "slices": [piece(layer, base, *targets) for layer, *targets in layers],
    }
    found = {
        granularity: merge(
            {**settings, "parameters": {"granularity": granularity}}, tmp_path / granularity
        )
        for granularity in ("module", "layer")
    }
    tensors = {str(path): read(path) for path in family}
    for granularity, merged in found.items():
        expected: dict[str, Tensor] = {}
        for number, (layer, *targets) in enumerate(layers):
            stem, new = f"model.layers.{layer}.", f"model.layers.{number}."
            piece_of = [
                {new + n[len(stem) :]: t for n, t in tensors[m].items() if n.startswith(stem)}
                for m in (base, *targets)
            ]
            expected |= reference(piece_of[0], piece_of[1:], lambda name, kind=granularity: kind)
        for names, (_, *targets) in (
            (("model.embed_tokens.weight",), layers[0]),
            (("model.norm.weight", "lm_head.weight"), layers[-1]),
        ):
            rest = [{n: tensors[m][n] for n in names} for m in (base, *targets)]
            expected |= reference(rest[0], rest[1:], lambda name, kind=granularity: kind)
        assert_close(merged, expected)


def test_a_slice_with_another_base_and_one_without_targets(
    family: list[Path], tmp_path: Path
) -> None:
    base, first, second, _ = map(str, family)

    def sources(layer: int, *models: str) -> list[dict[str, Any]]:
        return [{"model": model, "layer_range": [layer, layer + 1]} for model in models]

    found = merge(
        {
            "merge_method": "varm",
            "base_model": base,
            "slices": [
                {"sources": sources(0, first, second), "base_model": first},
                {"sources": sources(1, base)},
            ],
            "parameters": {"granularity": "layer"},
        },
        tmp_path / "out",
    )
    tensors = {str(path): read(path) for path in family}
    for name, merged in found.items():
        if "layers.0." in name or "embed" in name:
            assert same_bits(merged, tensors[second][name])  # one target at λ = 1
        else:
            assert same_bits(merged, tensors[base][name])


@pytest.mark.parametrize("granularity", ["matrix", "module", "model"])
def test_dtypes_of_the_configuration(family: list[Path], tmp_path: Path, granularity: str) -> None:
    parameters = {"granularity": granularity}
    settings = configuration(family, parameters=parameters, dtype="bfloat16", out_dtype="float16")
    found = merge(settings, tmp_path / "out")
    narrow = [{n: t.bfloat16() for n, t in read(path).items()} for path in family]
    expected = merge_state_dicts(narrow, "varm", base=0, parameters=parameters)
    assert {t.dtype for t in expected.values()} == {torch.bfloat16}
    assert_same(found, {n: t.half() for n, t in expected.items()})


@pytest.mark.parametrize("granularity", ["matrix", "module"])
def test_checkpoints_of_several_dtypes(
    llama_family: Family, tmp_path: Path, granularity: str
) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)
    paths = llama_family(tmp_path / "in", dtypes)
    parameters = {"granularity": granularity}
    found = merge(configuration(paths, parameters=parameters), tmp_path / "out")
    models = [read(path) for path in paths]
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert_same(found, merge_state_dicts(models, "varm", base=0, parameters=parameters))
    assert_close(found, reference(models[0], models[1:], lambda name: granularity))


@pytest.mark.parametrize("granularity", ["matrix", "module", "layer", "model"])
def test_units_that_no_target_moved_are_copied(
    llama_family: Family, tmp_path: Path, granularity: str
) -> None:
    def still(label: str, tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "layers.0." in name or "norm" in name:
                tensors[name] = torch.full_like(tensors[name], -0.0)

    paths = llama_family(tmp_path / "in", (torch.bfloat16,) * 3, edit=still)
    base = read(paths[0])
    parameters = {"granularity": granularity, "lambda": 1.7}
    found = merge(configuration(paths, parameters=parameters), tmp_path / "out")
    for name in base:
        if "layers.0." in name and granularity != "model":
            assert same_bits(found[name], base[name])


def test_one_target_is_copied(llama_family: Family, tmp_path: Path) -> None:
    def zeros(label: str, tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[::7] = -0.0 if label == "t0" else 0.0

    paths = llama_family(tmp_path / "in", (torch.bfloat16,) * 2, edit=zeros)
    for granularity in ("matrix", "module", "layer", "model"):
        parameters = {"granularity": granularity}
        found = merge(configuration(paths, parameters=parameters), tmp_path / granularity)
        assert_same(found, read(paths[1]))


# -- what task_arithmetic does with odd tensors


def test_tied_embeddings(llama_family: Family, tmp_path: Path) -> None:
    paths = llama_family(tmp_path / "in", changes={"tie_word_embeddings": True})
    found = merge(configuration(paths, parameters={"granularity": "model"}), tmp_path / "out")
    models = [read(path) for path in paths]
    assert "lm_head.weight" not in found
    assert_close(found, reference(models[0], models[1:], lambda name: "model"))


@pytest.mark.parametrize("granularity", ["matrix", "module", "model"])
def test_a_phantom_lm_head(llama_family: Family, tmp_path: Path, granularity: str) -> None:
    def phantom(label: str, tensors: dict[str, Tensor]) -> None:
        if label == "t1":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5

    paths = llama_family(tmp_path / "in", changes={"tie_word_embeddings": True}, edit=phantom)
    parameters = {"granularity": granularity}
    found = merge(configuration(paths, parameters=parameters), tmp_path / "out")
    # mergekit reads the embedding where a model has no lm_head.
    models = [
        {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}
        for tensors in map(read, paths)
    ]
    assert_close(found, reference(models[0], models[1:], lambda name: granularity))


GRANITE = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
BIAS = "model.layers.0.self_attn.q_proj.bias"


def with_bias(
    *labels: str, value: Callable[[int], float] = float
) -> Callable[[str, dict[str, Tensor]], None]:
    """An ``edit`` that gives the optional bias of Granite to some models only."""

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label in labels:
            tensors[BIAS] = torch.full((32,), value(labels.index(label)))

    return edit


@pytest.mark.parametrize("granularity", ["matrix", "module", "layer", "model"])
def test_an_optional_tensor_missing_from_a_target_counts_for_nobody(
    llama_family: Family, tmp_path: Path, granularity: str
) -> None:
    edit = with_bias("base", "t0", "t2", value=lambda i: 100.0 * i)
    paths = llama_family(tmp_path / "in", changes=GRANITE, edit=edit)
    parameters = {"granularity": granularity}
    found = merge(configuration(paths, parameters=parameters), tmp_path / "out")
    models = [read(path) for path in paths]
    expected = reference(models[0], models[1:], lambda name: granularity)
    if granularity == "matrix":
        # Alone in its unit, whose statistics are those of the models that have it.
        bias = [{BIAS: model[BIAS]} for model in models if BIAS in model]
        expected |= reference(bias[0], bias[1:])
    assert_close(found, expected)


@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_a_unit_of_nothing_but_a_missing_tensor_is_the_bases(
    llama_family: Family, tmp_path: Path, granularity: str
) -> None:
    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn"
            tensors |= {f"{at}.q_norm.weight": torch.ones(8), f"{at}.k_norm.weight": torch.ones(8)}
        if label == "t1":
            del tensors["lm_head.weight"]  # optional, and not tied in mergekit's table

    cohere = {"architectures": ["CohereForCausalLM"], "model_type": "cohere"}
    paths = llama_family(tmp_path / "in", changes=cohere, edit=edit)
    found = merge(configuration(paths, parameters={"granularity": granularity}), tmp_path / "out")
    assert same_bits(found["lm_head.weight"], read(paths[0])["lm_head.weight"])


@pytest.mark.parametrize("granularity", ["matrix", "module", "element"])
def test_nan_in_an_optional_tensor(llama_family: Family, tmp_path: Path, granularity: str) -> None:
    edit = with_bias("base", "t0", "t2", value=lambda i: math.nan if i == 2 else 1.0)
    paths = llama_family(tmp_path / "in", changes=GRANITE, edit=edit)
    with pytest.raises(FusechatError) as caught:
        merge(configuration(paths, parameters={"granularity": granularity}), tmp_path / "out")
    assert str(caught.value) == (
        f"tensor {BIAS} of model {paths[3]} holds NaN or Inf: that checkpoint is broken, replace it"
    )


def outcome(settings: Mapping[str, Any], out: Path, **options: Any) -> Any:
    """The names and shapes that a merge writes, or its error."""
    try:
        merged = merge(settings, out, **options)
    except Exception as error:
        return type(error), str(error)
    return {name: (tensor.shape, tensor.dtype) for name, tensor in merged.items()}


def compared(paths: Sequence[Path], tmp_path: Path, granularity: str, **options: Any) -> Any:
    """What varm and task_arithmetic make of the same checkpoints, which must be the same."""
    ours = configuration(paths, parameters={"granularity": granularity})
    theirs = configuration(paths, "task_arithmetic", parameters={"weight": 0.3})
    found = outcome(ours, tmp_path / "varm", **options)
    assert found == outcome(theirs, tmp_path / "task_arithmetic", **options)
    return found


@pytest.mark.parametrize("granularity", ["matrix", "module", "element"])
def test_an_optional_tensor_missing_from_the_base(
    llama_family: Family, tmp_path: Path, granularity: str
) -> None:
    paths = llama_family(tmp_path / "in", changes=GRANITE, edit=with_bias("t0", "t1"))
    kind, message = compared(paths, tmp_path, granularity)
    assert kind is ValueError
    assert "Base input is not present" in message


@pytest.mark.parametrize("granularity", ["matrix", "layer", "element"])
def test_vocabulary_mismatch(llama_family: Family, tmp_path: Path, granularity: str) -> None:
    def longer(label: str, tensors: dict[str, Tensor]) -> None:
        if label == "t1":
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = torch.cat([tensors[name], torch.ones(8, 32)])

    paths = llama_family(tmp_path / "in", edit=longer)
    kind, message = compared(paths, tmp_path / "refused", granularity)
    assert kind is ValueError
    assert message.startswith("Tensor size mismatch for")
    parameters = {"granularity": granularity}
    settings = configuration(paths, parameters=parameters)
    found = merge(settings, tmp_path / "out", unsafe_truncate_embeddings=True)
    models = [{n: t[:1100] for n, t in read(path).items()} for path in paths]
    assert_same(found, merge_state_dicts(models, "varm", base=0, parameters=parameters))


@pytest.mark.parametrize("granularity", ["matrix", "module"])
@pytest.mark.parametrize("agree", [True, False])
def test_non_floating_buffers(
    write_checkpoint: Callable[..., Path], tmp_path: Path, agree: bool, granularity: str
) -> None:
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 6,
        "hidden_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 4,
    }
    stem = "gpt_neox.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (6, 4),
        "embed_out.weight": (6, 4),
        f"{stem}.attention.masked_bias": (),
        f"{stem}.attention.rotary_emb.inv_freq": (1,),
        f"{stem}.attention.query_key_value.weight": (12, 4),
        f"{stem}.attention.query_key_value.bias": (12,),
    }
    for part in ("attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"):
        shapes |= {f"{stem}.{part}.weight": (4, 4), f"{stem}.{part}.bias": (4,)}
    for norm in (
        "layers.0.input_layernorm",
        "layers.0.post_attention_layernorm",
        "final_layer_norm",
    ):
        shapes |= {f"gpt_neox.{norm}.weight": (4,), f"gpt_neox.{norm}.bias": (4,)}
    buffer = f"{stem}.attention.bias"
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    paths = []
    for number in range(3):
        g = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        tensors[buffer] = causal if agree or number < 2 else ~causal
        paths.append(write_checkpoint(tmp_path / str(number), tensors, config))
    found = compared(paths, tmp_path, granularity)
    if agree:
        assert found[buffer] == (causal.shape, torch.bool)
        merged = read(tmp_path / "varm")
        assert torch.equal(merged.pop(buffer), causal)
        models = [{n: t for n, t in read(path).items() if n != buffer} for path in paths]
        assert_close(merged, reference(models[0], models[1:], lambda name: granularity))
    else:
        assert found == (
            ValueError,
            f"Non-floating buffer {buffer!r} differs between inputs; resolve it explicitly before"
            " merging",
        )


def test_a_permuted_vocabulary(llama_family: Family, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    size = 40
    paths = llama_family(tmp_path / "in", (torch.float32,) * 3, changes={"vocab_size": size})
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    for number, path in enumerate(paths):
        ids = order.tolist() if number == 1 else range(size)
        vocabulary = {f"w{word}": int(place) for word, place in enumerate(ids)}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    settings = configuration(paths, tokenizer_source="base")
    found = merge(settings, tmp_path / "out")
    models = [read(path) for path in paths]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        models[1][name] = models[1][name][order]
    assert_close(found, reference(models[0], models[1:]))
    # A granularity of several tensors is fine where none of them is permuted.
    parameters = {"granularity": [{"filter": "layers", "value": "layer"}, {"value": "matrix"}]}
    found = merge({**settings, "parameters": parameters}, tmp_path / "filtered")
    assert_close(
        found,
        reference(models[0], models[1:], lambda n: "layer" if "layers" in n else "matrix"),
    )


# -- reading


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often which tensor was read."""
    counted: Counter[str] = Counter()
    original = LazyTensorLoader.get_tensor

    def get_tensor(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        counted[key] += 1
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(LazyTensorLoader, "get_tensor", get_tensor)
    return counted


@pytest.mark.parametrize(
    ("granularity", "times"),
    [("matrix", 1), ("element", 1), ("module", 2), ("layer", 2), ("model", 2)],
)
def test_statistics_are_read_once_a_plan(
    family: list[Path], tmp_path: Path, reads: Counter[str], granularity: str, times: int
) -> None:
    found = merge(configuration(family, parameters={"granularity": granularity}), tmp_path / "out")
    assert reads == dict.fromkeys(found, times * len(family))


# -- NaN


@pytest.mark.parametrize("method", ["varm", "varm-module", "varm-element", "fusechat_sce"])
@pytest.mark.parametrize("broken", ["base", "t1"])
def test_nan_is_named(llama_family: Family, tmp_path: Path, broken: str, method: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label == broken:
            tensors[name][3, 4] = math.nan

    paths = llama_family(tmp_path / "in", edit=edit)
    method, _, granularity = method.partition("-")
    parameters = {"granularity": granularity} if granularity else {}
    settings = configuration(paths, method, parameters=parameters)
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(run_yaml.main, [str(file), str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: tensor {name} of model {tmp_path / 'in' / broken} holds NaN or Inf: that checkpoint"
        " is broken, replace it"
    )
    models = {path.name: read(path) for path in paths}
    with pytest.raises(FusechatError) as caught:
        merge_state_dicts(models, method, base="base", parameters=parameters)
    assert str(caught.value) == (
        f"tensor {name} of model {broken} holds NaN or Inf: that checkpoint is broken, replace it"
    )


def test_nan_in_a_nameless_tensor() -> None:
    tensors = [torch.zeros(2), torch.tensor([1.0, math.inf])]
    for method in ("varm", "fusechat_sce"):
        with pytest.raises(FusechatError) as caught:
            merge_tensors(tensors, method, base_index=0)
        assert str(caught.value) == (
            "a tensor of model 1 holds NaN or Inf: that checkpoint is broken, replace it"
        )


# -- refusals: before any tensor is read, with no output folder


TOKENIZER = (
    "granularity module, layer and model can't be combined with a tokenizer merge (tokenizer or"
    " tokenizer_source): use granularity matrix or element for the units of"
    " model.embed_tokens.weight, lm_head.weight, or bring the models to one vocabulary first"
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parameters": {"granularity": "modules"}},
            "parameters.granularity: 'modules' is unknown (did you mean 'module'?); use one of"
            " matrix, module, layer, model, element",
        ),
        (
            {"parameters": {"lamda": 1}},
            "parameters.lamda: varm has no parameter 'lamda' (did you mean 'lambda'?); it takes"
            " granularity, statistic, lambda, weight",
        ),
        (
            {"parameters": {"weight": -1, "normalize": True}},
            "2 problems:\n  parameters.weight: -1 is below 0\n  parameters.normalize: varm has no"
            " parameter 'normalize'; it takes granularity, statistic, lambda, weight",
        ),
        ({"base_model": None}, "base_model is missing: varm needs the pivot"),
        (
            {"parameters": {"weight": [{"filter": "model.norm", "value": 0}, {"value": 1}]}},
            "weight: every target's is 0 for model.norm.weight; give at least one target a weight above 0, or use lambda: 0 to keep the pivot's",
        ),
        (
            {"parameters": {"weight": [{"filter": "lm_head", "value": [0]}, {"value": 1}]}},
            "weight: every target's is 0 for lm_head.weight; give at least one target a weight above 0, or use lambda: 0 to keep the pivot's",
        ),
        ({"parameters": {"granularity": "model"}, "tokenizer_source": "base"}, TOKENIZER),
        ({"parameters": {"granularity": "module"}, "tokenizer": {"source": "base"}}, TOKENIZER),
        (
            {"merge_method": "fusechat_sce", "parameters": {"select_topk": 2}},
            "parameters.select_topk: 2 is above 1",
        ),
    ],
)
def test_refused(
    family: list[Path],
    tmp_path: Path,
    reads: Counter[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**configuration(family), **changes}, sort_keys=False))
    result = CliRunner().invoke(run_yaml.main, [str(file), str(out), "--quiet"])
    assert result.exit_code == 2
    assert result.output[result.output.index("Error: ") :] == f"Error: {message}\n"
    assert not out.exists()
    assert not reads
    with pytest.raises(RequestError) as caught:
        merge({**configuration(family), **changes}, out)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"granularity": "layer"},
            "mergekit-pytorch knows no modules or layers: use granularity matrix or element here, or"
            " mergekit-yaml or fusechat-merge run",
        ),
        ({"lambda": ".nan"}, "parameters.lambda: '.nan' is not a finite number"),
        (
            {"weight": [{"filter": "norm", "value": 0}, {"value": 1}]},
            "weight: every target's is 0 for norm; give at least one target a weight above 0, or use lambda: 0 to keep the pivot's",
        ),
    ],
)
def test_mergekit_pytorch_refuses(
    tmp_path: Path, reads: Counter[str], parameters: dict[str, Any], message: str
) -> None:
    for name in ("base", "a", "b"):
        save_file({"w": torch.ones(3), "norm": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    settings = configuration(files, parameters=parameters)
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    result = CliRunner().invoke(merge_raw_pytorch.main, [str(config), str(out)])
    assert result.exit_code == 2
    assert result.output[result.output.index("Error: ") :] == f"Error: {message}\n"
    assert not out.exists()
    assert not reads


def test_mergekit_pytorch_with_another_method(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "a", "b")):
        save_file({"w": torch.full((3,), float(number))}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    config = tmp_path / "merge.yml"
    config.write_text(
        yaml.safe_dump(configuration(files, "task_arithmetic", parameters={"weight": 0.5}))
    )
    result = CliRunner().invoke(merge_raw_pytorch.main, [str(config), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "out")["w"].tolist() == [1.5] * 3


# -- in memory


def test_merge_tensors(family: list[Path]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = [read(path)[name] for path in family]
    expected = merge_tensors(tensors, "varm", base_index=0)
    # The unit is the tensor that was given, whatever the granularity.
    for granularity in ("module", "layer", "model"):
        for given in (name, None):
            found = merge_tensors(
                tensors, "varm", base_index=0, name=given, parameters={"granularity": granularity}
            )
            assert same_bits(found, expected)
    assert merge_tensors(tensors, "varm", base_index=0, out_dtype=torch.float16).dtype == (
        torch.float16
    )
    moved = merge_tensors(tensors[::-1], "varm", base_index=3, parameters={"weight": [0, 0, 2]})
    assert same_bits(moved, tensors[1])
    with pytest.raises(ValueError, match="requires a base input"):
        merge_tensors(tensors, "varm")
    with pytest.raises(TypeError, match=r"Unknown parameter\(s\) for varm: lamda"):
        merge_tensors(tensors, "varm", base_index=0, parameters={"lamda": 1})
    for bad in ({"weight": -1.0}, {"granularity": "block"}, {"lambda": math.inf}):
        with pytest.raises(ValueError, match="validation error"):
            merge_tensors(tensors, "varm", base_index=0, parameters=bad)
    with pytest.raises(RequestError) as caught:
        merge_tensors(tensors, "varm", base_index=0, name=name, parameters={"weight": 0})
    assert str(caught.value) == (
        f"weight: every target's is 0 for {name or 'the tensor'}; give at least one target a weight above 0, or use lambda: 0 to keep the pivot's"
    )


def test_only_a_base() -> None:
    base = torch.tensor([-0.0, 1.0])
    for method in ("varm", "fusechat_sce"):
        assert same_bits(merge_tensors([base], method, base_index=0), base)


def test_merge_state_dicts_of_modules_and_buffers() -> None:
    def module(shift: float) -> torch.nn.Module:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(shift * torch.randn_like(parameter))
        return net

    models = {"base": module(0), "a": module(0.1), "b": module(0.2)}
    for granularity in ("matrix", "layer"):
        parameters = {"granularity": granularity, "weight": {"a": 2.0, "b": 1.0}}
        found = merge_state_dicts(models, "varm", base="base", parameters=parameters)
        states = [dict(m.state_dict()) for m in models.values()]
        count = {n for n, t in states[0].items() if not t.is_floating_point()}
        assert count == {"1.num_batches_tracked"}
        assert torch.equal(found["1.num_batches_tracked"], torch.tensor(0))
        for state in (found, *states):
            for name in count:
                del state[name]
        # ``0`` and ``1`` are the layers here; the names begin with their digits.
        named = [{f"x.{n}": t for n, t in state.items()} for state in states]
        expected = reference(
            named[0], named[1:], lambda n, kind=granularity: kind, lambda n: [2.0, 1.0]
        )
        assert_close({f"x.{n}": t.detach() for n, t in found.items()}, expected)


def test_a_granularity_a_tensor_in_memory(family: list[Path]) -> None:
    models = [read(path) for path in family]
    names = list(models[0])
    kinds = ["module" if "attn" in n else "element" if "norm" in n else "layer" for n in names]
    found = merge_state_dicts(
        models, "varm", base=0, parameters={"granularity": PerGroupValues(kinds)}
    )
    by_kind = {
        kind: merge_state_dicts(models, "varm", base=0, parameters={"granularity": kind})
        for kind in set(kinds)
    }
    assert_same(found, {n: by_kind[kind][n] for n, kind in zip(names, kinds, strict=True)})


def test_sce_in_memory_and_from_checkpoints(family: list[Path], tmp_path: Path) -> None:
    import fusechat_merge

    parameters = {"select_topk": 0.4, "variant": "fork"}
    found = merge(configuration(family, "fusechat_sce", parameters=parameters), tmp_path / "out")
    models = [read(path) for path in family]
    assert_same(found, merge_state_dicts(models, "fusechat_sce", base=0, parameters=parameters))
    base, *targets = models
    assert_same(
        found,
        {n: fusechat_merge.sce(base[n], [t[n] for t in targets], **parameters) for n in base},
    )


# -- mergekit-evolve


def genome(paths: Sequence[Path], method: str, **settings: Any) -> ModelGenome:
    base, *targets = map(str, paths)
    return ModelGenome(
        ModelGenomeDefinition.model_validate(
            {"models": targets, "merge_method": method, "base_model": base, **settings}
        )
    )


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
def test_genomes_can_be_merged(
    family: list[Path], tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    one = genome(family, method, **settings)
    config = one.genotype_merge_config(one.initial_genotype(random=True))
    found = merge(config.model_dump(exclude_none=True, mode="json"), tmp_path / "out")
    assert set(found) == set(read(family[0]))


def test_a_genomes_numbers_reach_the_merge(family: list[Path]) -> None:
    assert METHOD_PARAM_MAPS["varm"] == ["weight"]
    assert METHOD_PARAM_MAPS["fusechat_sce"] == ["select_topk"]
    values = torch.tensor([0.5, -2.0, 3.0])
    config = genome(family, "varm").genotype_merge_config(values)
    (piece,) = config.slices
    assert [s.parameters for s in piece.sources] == [
        {"weight": 0.5},
        {"weight": 2.0},
        {"weight": 3.0},
        None,
    ]
    assert config.parameters is None
    config = genome(family, "fusechat_sce").genotype_merge_config(torch.tensor([0.2, 0.4, 0.6]))
    (piece,) = config.slices
    assert piece.parameters == {"select_topk": pytest.approx(0.4)}
    assert not any(source.parameters for source in piece.sources)
    assert genome(family, "fusechat_sce").genotype_merge_config(values).slices[0].parameters == {
        "select_topk": 0.5
    }


def test_other_genomes_are_left_alone(family: list[Path]) -> None:
    config = genome(family, "task_arithmetic").genotype_merge_config(torch.rand(3))
    assert config.parameters == {"normalize": False, "int8_mask": True}
    (piece,) = config.slices
    assert all("weight" in source.parameters for source in piece.sources[:3])


# -- registration


def test_registering_twice_is_harmless() -> None:
    from fusechat_merge import _autoload
    from fusechat_merge.mergekit_bridge import plugin as mergekit_plugin

    before = registered_methods()
    planner = __import__("mergekit.plan").plan.MergePlanner._plan
    mergekit_plugin.register_methods()
    mergekit_plugin.extend_planner()
    mergekit_plugin.extend_raw_planner()
    mergekit_plugin.extend_genome()
    _autoload.install()
    assert registered_methods() == before
    assert [m.spec.name for m in before].count("varm") == 1
    assert __import__("mergekit.plan").plan.MergePlanner._plan is planner
    assert get("varm").spec.pretty_name == "VaRM"


@pytest.fixture(autouse=True)
def _no_leftover_loaders() -> Iterator[None]:
    """mergekit keeps one loader a path for the life of the process."""
    from mergekit.io.tasks import LoaderCache

    yield
    LoaderCache().loaders.clear()
    merge_raw_pytorch.SimpleLoaderCache().loaders.clear()
