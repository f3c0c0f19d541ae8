"""Tokenizers, adapters and pickles that do harm, for the tests' pico checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import write_adapter

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}

TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4},
              "unk_token": "<unk>"},
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
    "eos_token": "</s>", "chat_template": "{{ messages }}",
}  # fmt: skip


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


def adapter(folder: Path, base: Path, seed: int = 0, rank: int = 2) -> Path:
    """A LoRA adapter with random factors for the base's query and down projections."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, into in (("self_attn.q_proj", hidden), ("mlp.down_proj", inner)):
            at = f"base_model.model.model.layers.{layer}.{module}"
            factors[f"{at}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
            factors[f"{at}.lora_B.weight"] = torch.randn(hidden, rank, generator=generator) / 50
    return write_adapter(
        folder, factors, r=rank, target_modules=["q_proj", "down_proj"], bias="none",
        base_model_name_or_path=str(base), rank_pattern={}, alpha_pattern={}, use_dora=False,
        use_rslora=False, fan_in_fan_out=False, modules_to_save=None,
    )  # fmt: skip


class Trap:
    """Unpickled, it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.mark), 0o777, True)
