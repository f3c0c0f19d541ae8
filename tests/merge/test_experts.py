"""Stacks of experts: each matrix by itself in both programs, when resumed and when verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fusechat_merge.engine.execute import merge
from fusechat_merge.engine.verify import verify
from fusechat_merge.methods.stacks import Matrix, down_of, has_halves, is_stack, matrices
from tests.support.families import FAMILIES, family
from tests.support.merging import configuration, read, record, rewrite, run_mergekit

STACKED = ["gpt-oss", "Qwen3-VL-MoE"]  # the second with halves
SETTINGS = [
    ("varm", {"statistic": "absolute"}),
    ("varm", {"granularity": "element"}),
    ("varm", {"granularity": "module"}),
    ("fusechat_sce", {"select_topk": 0.3}),
]


def test_matrices_of_a_stack() -> None:
    up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    assert is_stack(up, (4, 6, 5))
    assert not is_stack(up + "_bias", (4, 6))
    assert not is_stack("model.layers.0.conv.weight", (4, 1, 5))
    assert not is_stack("model.layers.0.mlp.experts.conv.weight", (4, 1, 5))
    assert down_of(up) == down
    assert (
        down_of("a.block_sparse_moe.input_linear.weight")
        == "a.block_sparse_moe.output_linear.weight"
    )
    assert down_of(down) is None
    assert has_halves((4, 6, 5), (4, 5, 3))
    assert not has_halves((4, 5, 6), (4, 3, 5))
    assert list(matrices((2, 6, 5), halves=True)) == [
        Matrix("[0].gate", 0, (3, 5)), Matrix("[0].up", 15, (3, 5)),
        Matrix("[1].gate", 30, (3, 5)), Matrix("[1].up", 45, (3, 5)),
    ]  # fmt: skip
    assert [m.label for m in matrices((2, 6, 5), halves=False)] == ["[0]", "[1]"]


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize(("method", "parameters"), SETTINGS)
def test_both_programs_give_the_same(
    name: str, method: str, parameters: dict, tmp_path: Path
) -> None:
    settings = configuration(
        family(name, tmp_path), method, parameters=parameters, dtype="bfloat16"
    )
    ours, theirs = tmp_path / "ours", tmp_path / "mergekit"
    merge(settings, ours)
    run_mergekit(settings, theirs)
    load = getattr(transformers, FAMILIES[name].model).from_pretrained
    expected = load(theirs).state_dict()
    for tensor, value in load(ours).state_dict().items():
        assert torch.equal(value, expected[tensor]), tensor


def test_a_target_that_moved_one_expert_has_it_alone(tmp_path: Path) -> None:
    """mergekit hands the method all experts at once."""
    paths = family("Mixtral", tmp_path)
    moved = [f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in range(4)]
    base = read(paths[0])
    for number, path in enumerate(paths):
        save_file(
            {n: t + (n == moved[number]) * 1.0 for n, t in base.items()}, path / "model.safetensors"
        )
    settings = configuration(paths)
    out = read(merge(settings, tmp_path / "out"))
    assert [float((out[n] - base[n]).mean()) for n in moved] == pytest.approx(
        [0, 1, 1, 0], abs=1e-6
    )
    by_name = {unit["name"]: unit["weights"] for unit in record(tmp_path / "out")["units"]}
    assert (by_name[moved[1]], by_name[moved[2]]) == ([1.0, 0.0], [0.0, 1.0])
    run_mergekit(settings, tmp_path / "mergekit")
    load = transformers.MixtralForCausalLM.from_pretrained
    ours, theirs = load(tmp_path / "out").state_dict(), load(tmp_path / "mergekit").state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_tensors_in_memory(tmp_path: Path) -> None:
    """Also where the stacks of a layer come together, in mergekit's `merge_state_dicts`."""
    from mergekit.merge_methods import merge_state_dicts

    paths = family("Qwen3-VL-MoE", tmp_path)
    base, *targets = [{n: t for n, t in read(path).items() if ".experts." in n} for path in paths]
    expected = read(merge(configuration(paths), tmp_path / "out"))
    merged = merge_state_dicts(dict(enumerate([base, *targets])), "varm", base=0)
    assert all(torch.equal(tensor, expected[n]) for n, tensor in merged.items())


@pytest.mark.parametrize("name", STACKED)
def test_verify_names_the_matrix(name: str, tmp_path: Path) -> None:
    paths, out = family(name, tmp_path), tmp_path / "out"
    settings = configuration(paths)
    merge(settings, out)
    assert verify(settings, out) == []
    stack = next(n for n in read(out) if n.endswith("experts.down_proj"))
    rewrite(out, lambda tensors: tensors[stack][2].view(-1)[5:6].add_(1))
    assert verify(settings, out) == [
        f"{stack}[2]: differs from what its sources give, first in element 5"
    ]
