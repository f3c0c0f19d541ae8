"""Which unit a tensor belongs to."""

from __future__ import annotations

import pytest

from fusechat_merge.methods.granularity import GRANULARITIES, unit_of


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        (
            "model.layers.3.self_attn.q_proj.weight",
            "model.layers.3.self_attn",
            "model.layers.3",
        ),
        (
            "model.layers.12.input_layernorm.weight",
            "model.layers.12.input_layernorm",
            "model.layers.12",
        ),
        # Only the first all-digit component: experts belong to their layer's MLP.
        (
            "model.layers.0.block_sparse_moe.experts.7.w1.weight",
            "model.layers.0.block_sparse_moe",
            "model.layers.0",
        ),
        ("transformer.h.5.attn.c_attn.bias", "transformer.h.5.attn", "transformer.h.5"),
        ("gpt_neox.layers.1.mlp", "gpt_neox.layers.1.mlp", "gpt_neox.layers.1"),
        ("0.weight", "0.weight", "0"),
        ("blocks.07.w", "blocks.07.w", "blocks.07"),
        ("layers.3", "layers.3", "layers.3"),
        # Outside the layers a tensor is a unit of its own.
        ("model.embed_tokens.weight", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight", "lm_head.weight"),
        ("weight", "weight", "weight"),
        # Not all digits, or not the digits 0 to 9.
        ("model.layer3.attn.w", "model.layer3.attn.w", "model.layer3.attn.w"),
        ("model.h.1a.attn.w", "model.h.1a.attn.w", "model.h.1a.attn.w"),
        ("model.h.³.attn.w", "model.h.³.attn.w", "model.h.³.attn.w"),
        ("model.h.٣.attn.w", "model.h.٣.attn.w", "model.h.٣.attn.w"),
        ("model..attn.w", "model..attn.w", "model..attn.w"),
    ],
)
def test_units(name: str, module: str, layer: str) -> None:
    assert unit_of(name, "matrix") == name
    assert unit_of(name, "element") == name
    assert unit_of(name, "module") == module
    assert unit_of(name, "layer") == layer
    assert unit_of(name, "model") == "model"


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        unit_of("w", "block")
    assert str(caught.value) == (
        "unknown granularity 'block': use one of matrix, module, layer, model, element"
    )


def test_mergekit_is_told_the_same_granularities() -> None:
    from typing import get_args

    from fusechat_merge.mergekit_bridge.methods import VarmMethod

    (spec,) = (p for p in VarmMethod.spec.parameters if p.name == "granularity")
    assert get_args(spec.value_type) == GRANULARITIES
