"""Pico Llama checkpoints, written with safetensors alone: a base and targets that moved from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "vocab_size": 1100,  # 1,100 x 32 is more than one grid cell of 2^15
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _llama_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    vocab, hidden, inner = (config[k] for k in ("vocab_size", "hidden_size", "intermediate_size"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{at}.self_attn.v_proj.weight": (hidden // 2, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], shards: int = 1
) -> Path:
    """An ordinary checkpoint on disk, its tensors dealt out over `shards` files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    placed = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def llama_family(
    folder: Path,
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 4,
    scale: float = 1e-2,
    shards: int = 1,
    changes: Mapping[str, object] | None = None,
    edit: Callable[[str, dict[str, Tensor]], None] | None = None,
) -> list[Path]:
    """``llama_family(folder, ...)``: checkpoints ``base``, ``t0``, ``t1``, ... under ``folder``.

    Every target moved from the base, another amount in every tensor, so that no two units have the
    same weights.

    Args:
        folder: made here.
        dtypes: one a checkpoint, the base first; as many checkpoints as dtypes.
        scale: of the targets' deltas.
        shards: files a checkpoint.
        changes: keys of config.json to change, ``tie_word_embeddings`` for one.
        edit: called with (checkpoint's name, tensors) before they are written.
    """
    config = {**LLAMA, **(changes or {})}
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator) * 0.3
        for name, shape in _llama_shapes(config).items()
    }
    made = []
    for number, dtype in enumerate(dtypes):
        tensors = {}
        for place, (name, values) in enumerate(base.items()):
            if number:
                amount = scale * (1 + (place * 7 + number * 3) % 5)
                values = values + amount * torch.randn(values.shape, generator=generator)
            tensors[name] = values.to(dtype)
        label = f"t{number - 1}" if number else "base"
        if edit is not None:
            edit(label, tensors)
        stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
        made.append(write_checkpoint(folder / label, tensors, {**config, **stored}, shards))
    return made


BIAS = "model.layers.0.self_attn.q_proj.bias"


def granite(folder: Path, dtypes: Sequence[torch.dtype], **bias: float) -> list[Path]:
    """Checkpoints of which these only have the optional `BIAS`: a row of numbers from a value."""

    def edit(label: str, tensors: dict[str, Tensor]) -> None:
        if label in bias:
            tensors[BIAS] = (torch.arange(32.0) + bias[label]).to(dtypes[0])

    changes = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    return llama_family(folder, dtypes, changes=changes, edit=edit)


FACTORS = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
PAIR = {FACTORS.format("A"): torch.ones(2, 32), FACTORS.format("B"): torch.ones(48, 2)}
"""A LoRA of one matrix of `LLAMA`, of rank 2."""


def write_adapter(folder: Path, tensors: Mapping[str, Tensor] = PAIR, **settings: object) -> Path:
    """A LoRA adapter on disk; `settings` are keys of its adapter_config.json."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder
