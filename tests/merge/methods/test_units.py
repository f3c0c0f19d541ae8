"""Which unit a tensor belongs to."""

from __future__ import annotations

import pytest

from fusechat_merge.methods.units import Unit, members_of, shared_unit, unit_name


@pytest.mark.parametrize(
    ("name", "module", "layer"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn", "model.layers.3"),
        ("model.layers.12.input_layernorm.weight", "model.layers.12.input_layernorm",
         "model.layers.12"),
        # Only the first all-digit component: experts belong to their layer's MLP.
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.block_sparse_moe",
         "model.layers.0"),
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
)  # fmt: skip
def test_units(name, module, layer):
    assert unit_name(name, "matrix") == name
    assert unit_name(name, "element") == name
    assert unit_name(name, "module") == module
    assert unit_name(name, "layer") == layer
    assert unit_name(name, "model") == "model"


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError) as caught:
        unit_name("w", "block")
    assert str(caught.value) == (
        "unknown granularity 'block': use one of matrix, module, layer, model, element"
    )


SHARED_BY = {"granularity": "layer", "statistic": "absolute"}


def test_only_some_granularities_have_units_of_several_tensors():
    name = "model.layers.3.mlp.up_proj.weight"
    assert shared_unit(name, SHARED_BY) == Unit("model.layers.3", "layer", "absolute")
    assert shared_unit(name, SHARED_BY | {"granularity": "matrix"}) is None
    assert shared_unit(name, SHARED_BY | {"granularity": "element"}) is None


def test_members_are_found_by_name_in_the_order_of_the_tensors():
    names = ["layers.1.b", "lm_head", "layers.0.a", "layers.1.a", "lm_head"]
    layer, head = Unit("layers.1", "layer", "square"), Unit("lm_head", "module", "square")
    everything = Unit("model", "model", "absolute")
    nothing = Unit("layers.7", "layer", "square")
    found = members_of([layer, head, everything, layer, nothing], names)
    assert list(found) == [layer, head, everything, nothing]
    assert list(found.values()) == [[0, 3], [1, 4], [0, 1, 2, 3, 4], []]
