"""Configurations of the recipes' models, from the shapes that their authors publish."""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

BFLOAT16 = {"dtype": "bfloat16"}
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
} | BFLOAT16
"""Mistral-7B's shape, and with another vocabulary Llama-3.1-8B's."""


def _gemma3(hidden: int, intermediate: int, layers: int, heads: int, kv: int) -> Gemma3Config:
    return Gemma3Config(
        text_config={
            "vocab_size": 262_208,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": 256,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
        **BFLOAT16,
    )


CONFIGS: dict[str, Any] = {
    "openchat/openchat_3.5": lambda: MistralConfig(**SEVEN, vocab_size=32_002),
    "berkeley-nest/Starling-LM-7B-alpha": lambda: MistralConfig(**SEVEN, vocab_size=32_002),
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": lambda: LlamaConfig(
        **SEVEN | {"num_hidden_layers": 48}, vocab_size=32_002
    ),
    # InternLM2's own code lies in its repository; its shape is a Llama's.
    "internlm/internlm2-chat-20b": lambda: LlamaConfig(
        vocab_size=92_544,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=48,
        num_attention_heads=48,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        **BFLOAT16,
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": lambda: MixtralConfig(
        **SEVEN, num_local_experts=8, num_experts_per_tok=2, vocab_size=32_000
    ),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": lambda: MixtralConfig(
        **SEVEN, num_local_experts=8, num_experts_per_tok=2, vocab_size=32_002
    ),
    "Qwen/Qwen1.5-72B-Chat": lambda: Qwen2Config(
        vocab_size=152_064,
        hidden_size=8192,
        intermediate_size=24576,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=64,
        tie_word_embeddings=False,
        **BFLOAT16,
    ),
    "Qwen/Qwen3-8B": lambda: Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        **BFLOAT16,
    ),
    "Qwen/Qwen3-4B-Instruct-2507": lambda: Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        **BFLOAT16,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": lambda: LlamaConfig(**SEVEN, vocab_size=128_256),
    "google/gemma-3-12b-it": lambda: _gemma3(3840, 15360, 48, 16, 8),
    "google/gemma-3-4b-it": lambda: _gemma3(2560, 10240, 34, 8, 4),
    "mistralai/Mistral-Small-24B-Instruct-2501": lambda: MistralConfig(
        vocab_size=131_072,
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        **BFLOAT16,
    ),
}

PARAMETERS = {
    "openchat/openchat_3.5": 7.24e9,
    "berkeley-nest/Starling-LM-7B-alpha": 7.24e9,
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": 10.7e9,
    "internlm/internlm2-chat-20b": 19.9e9,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46.7e9,
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": 46.7e9,
    "Qwen/Qwen1.5-72B-Chat": 72.3e9,
    "Qwen/Qwen3-8B": 8.19e9,
    "Qwen/Qwen3-4B-Instruct-2507": 4.02e9,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03e9,
    "google/gemma-3-12b-it": 12.2e9,
    "google/gemma-3-4b-it": 4.3e9,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23.6e9,
}
"""What the models' pages say."""
