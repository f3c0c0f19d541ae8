"""Configurations of the recipes' models, from the shapes that their authors publish."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import (
    Gemma3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

EIGHT_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
HEADS_OF_128 = {"head_dim": 128}

# name, parameters by the model's page, class, vocabulary, hidden, intermediate, layers, heads,
# key-value heads, other keys
_TABLE: list[tuple[str, float, type[PreTrainedConfig], int, int, int, int, int, int, dict]] = [
    ("openchat/openchat_3.5", 7.24e9,
     MistralConfig, 32_002, 4096, 14336, 32, 32, 8, {}),
    ("berkeley-nest/Starling-LM-7B-alpha", 7.24e9,
     MistralConfig, 32_002, 4096, 14336, 32, 32, 8, {}),
    ("NousResearch/Nous-Hermes-2-SOLAR-10.7B", 10.7e9,
     LlamaConfig, 32_002, 4096, 14336, 48, 32, 8, {}),
    # InternLM2's own code lies in its repository; its shape is a Llama's.
    ("internlm/internlm2-chat-20b", 19.9e9,
     LlamaConfig, 92_544, 6144, 16384, 48, 48, 8, {}),
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7e9,
     MixtralConfig, 32_000, 4096, 14336, 32, 32, 8, EIGHT_EXPERTS),
    ("NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO", 46.7e9,
     MixtralConfig, 32_002, 4096, 14336, 32, 32, 8, EIGHT_EXPERTS),
    ("Qwen/Qwen1.5-72B-Chat", 72.3e9,
     Qwen2Config, 152_064, 8192, 24576, 80, 64, 64, {}),
    ("Qwen/Qwen3-8B", 8.19e9,
     Qwen3Config, 151_936, 4096, 12288, 36, 32, 8, HEADS_OF_128),
    ("Qwen/Qwen3-4B-Instruct-2507", 4.02e9,
     Qwen3Config, 151_936, 2560, 9728, 36, 32, 8, HEADS_OF_128 | {"tie_word_embeddings": True}),
    ("meta-llama/Llama-3.1-8B-Instruct", 8.03e9,
     LlamaConfig, 128_256, 4096, 14336, 32, 32, 8, {}),
    ("google/gemma-3-12b-it", 12.2e9,
     Gemma3Config, 262_208, 3840, 15360, 48, 16, 8, {"head_dim": 256}),
    ("google/gemma-3-4b-it", 4.3e9,
     Gemma3Config, 262_208, 2560, 10240, 34, 8, 4, {"head_dim": 256}),
    ("mistralai/Mistral-Small-24B-Instruct-2501", 23.6e9,
     MistralConfig, 131_072, 5120, 32768, 40, 32, 8, HEADS_OF_128),
]  # fmt: skip


def _config(kind: type[PreTrainedConfig], *sizes: Any) -> PreTrainedConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    keys = dict(zip(names, sizes, strict=False)) | sizes[-1]
    if kind is Gemma3Config:
        return kind(text_config=keys, vision_config=dict(VISION), dtype="bfloat16")
    return kind(**{"tie_word_embeddings": False, "dtype": "bfloat16"} | keys)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    name: partial(_config, *row) for name, _, *row in _TABLE
}
PARAMETERS = {name: parameters for name, parameters, *_ in _TABLE}
"""What the models' pages say."""
