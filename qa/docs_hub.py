"""Tiny real models, and a dataset, in folders of the names that the pages use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

from tests.support import chain

PROMPT = "{% if add_generation_prompt %}{{ PROMPT }}{% endif %}"
CHATML = chain.CHATML + PROMPT.replace("PROMPT", "'<|im_start|>assistant\\n'")
PLAIN = chain.PLAIN + PROMPT.replace("PROMPT", "'A: '")

MODELS = {
    "openchat/openchat_3.5": "llama",
    "FuseAI/OpenChat-3.5-7B-Mixtral": "openchat/openchat_3.5",
    "FuseAI/OpenChat-3.5-7B-Solar": "openchat/openchat_3.5",
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": "llama",
    "Qwen/Qwen1.5-72B-Chat": "neox",
    "Qwen/Qwen3-0.6B": "llama",
    "Qwen/Qwen3-4B-Instruct-2507": "neox",
}
"""{name: its family, or the pivot that it was tuned from}."""

DATASET = "FuseAI/FuseChat-Mixture"
CHATS = slice(170, 290)  # of which the pages' eval_fraction of 0.02 holds out two


def chats() -> list[dict[str, Any]]:
    """Conversations in ShareGPT's layout."""
    roles = {"user": "human", "assistant": "gpt"}
    return [
        {"conversations": [{"from": roles[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in chain.rows(CHATS.stop)[CHATS]
    ]  # fmt: skip


def _model(family: str, size: int) -> Model:
    shape: dict[str, Any] = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 4096}
    shape |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, tie_word_embeddings=False))


def _tokenizer(family: str) -> Tokenizer:
    if family == "neox":
        return chain.tokenizer(340, ["</s>", "<s>"], PLAIN)
    return chain.tokenizer(300, ["<|im_end|>", "<|im_start|>"], CHATML)


def prepare(folder: Path) -> None:
    """Save all models of `MODELS` and the dataset below `folder` under their names.

    mergekit, transformers and datasets prefer a folder of that name to the hub's repository.
    """
    models: dict[str, Model] = {}
    for number, (name, family) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        tokenizer = _tokenizer(family)
        if pivot := models.get(family):
            model = _moved(pivot, 0.002 * number)
        else:
            model = models[name] = _model(family, len(tokenizer))
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / DATASET).mkdir(parents=True)
    chain.write_rows(folder / DATASET / "train.jsonl", chats())
    chain.write_rows(folder / "chats.jsonl", chats())


def _moved(pivot: Model, by: float) -> Model:
    model = type(pivot)(pivot.config)
    olds = pivot.state_dict().values()
    for (name, value), old in zip(model.named_parameters(), olds, strict=True):
        # Attention and MLP move differently, so that granularities differ.
        scale = by * (2.0 if "self_attn" in name else 1.0)
        value.data.copy_(old.float() + scale * torch.randn(old.shape))
    return model


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
