"""Models of a few thousand parameters, random targets, and the loss written out densely."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig

from fusechat_distill.trainer.trainer import FusionConfig, FusionTrainer

# TRL reports every trainer it makes to the hub unless told not to.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every `train()` collects garbage; without the imported modules that takes a tenth of the time.
gc.freeze()

VOCABULARY = 61

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip

CONFIGS: dict[str, Any] = {
    "untied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "bias": lambda: PhiConfig(
        **{**_SIZES, "num_key_value_heads": 2}, tie_word_embeddings=False, resid_pdrop=0.0
    ),
    "soft_cap": lambda: Gemma2Config(
        **_SIZES, head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8
    ),
    "logit_scale": lambda: CohereConfig(**_SIZES, logit_scale=0.4),
    "logits_scaling": lambda: GraniteConfig(**_SIZES, logits_scaling=3.0),
}


def model(kind: str = "untied", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in net.parameters():
            # Larger than a fresh model's, so that logits differ enough to tell losses apart.
            spread = 0.3 if parameter.dim() > 1 else 0.05
            parameter.add_(spread * torch.randn_like(parameter))
    return net.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def rows(
    lengths: tuple[int, ...] = (9, 5, 12, 7), width: int = 3, seed: int = 0, prompt: int = 2
) -> Dataset:
    """Random rows; targets with full mass, with a tail, and without any, one of the three a token.

    Rows that the loss ignores hold rubbish on purpose.
    """
    generator = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "fusion_ids", "fusion_probs")
    }
    for length in lengths:
        ids = generator.integers(3, VOCABULARY, length)
        labels = ids.copy()
        labels[: min(prompt, length)] = -100
        if length > 6:
            labels[length // 2] = -100  # a hole, as a second user turn leaves it
        entries = np.stack([generator.permutation(VOCABULARY)[:width] for _ in range(length)])
        probs = generator.dirichlet(np.ones(width), length)
        probs[1::3] *= 0.6
        probs[2::3] = 0.0
        entries[3::4, 0] = ids[3::4]  # the label is one of the entries
        ignored = labels == -100
        ignored[0] = True
        entries[ignored] = 10**6
        probs[ignored] = np.nan
        columns["input_ids"].append(ids.tolist())
        columns["labels"].append(labels.tolist())
        columns["fusion_ids"].append(entries.tolist())
        columns["fusion_probs"].append(probs.astype(np.float32).tolist())
    return Dataset.from_dict(columns)


def dense_targets(row: dict[str, Any]) -> torch.Tensor:
    """The columns' contract written out: a full distribution a token, [tokens, vocabulary]."""
    length = len(row["input_ids"])
    full = torch.zeros(length, VOCABULARY, dtype=torch.float64)
    for t in range(1, length):
        label = row["labels"][t]
        if label == -100:
            continue
        for token, probability in zip(row["fusion_ids"][t], row["fusion_probs"][t], strict=True):
            full[t, token] += probability
        full[t, label] += 1.0 - sum(row["fusion_probs"][t])
    return full


def dense_losses(net: Any, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Σ NLL, Σ CE against the full targets, and their number, row by row, with [T, V] logits."""
    clm = fusion = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in dataset:
        ids = torch.tensor([row["input_ids"]])
        log_q = net(input_ids=ids).logits[0].double().log_softmax(-1)
        full = dense_targets(row)
        for t in range(1, len(row["input_ids"])):
            label = row["labels"][t]
            if label != -100:
                clm = clm - log_q[t - 1, label]
                fusion = fusion - (full[t] * log_q[t - 1]).sum()
                count += 1
    return clm, fusion, count


def dense_gradients(net: Any, dataset: Dataset, clm_weight: float) -> dict[str, torch.Tensor]:
    net.zero_grad()
    clm, fusion, count = dense_losses(net, dataset)
    ((clm_weight * clm + (1 - clm_weight) * fusion) / count).backward()
    return gradients(net)


def gradients(net: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }


class Recorder(TrainerCallback):
    """The gradients that each optimizer step starts from, and every log."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(gradients(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain settings for a deterministic step on CPU in float32."""
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, **changes,
    }  # fmt: skip


def trainer(
    folder: Path,
    net: Any = None,
    dataset: Any = None,
    *,
    kind: Any = FusionTrainer,
    args: Any = None,
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of a pico model on pico rows.

    Args:
        folder: its output.
        net: `model()` where it is not given.
        dataset: `rows()` where it is not given.
        kind: `FusionTrainer` or TRL's `SFTTrainer`.
        args: its configuration, instead of `arguments(folder, **changes)`.
        given: more of the trainer's own arguments.
        changes: keys of the configuration.
    """
    config = FusionConfig if kind is FusionTrainer else SFTConfig
    return kind(
        net or model(),
        args or config(**arguments(folder, **changes)),
        **{"train_dataset": rows() if dataset is None else dataset, "processing_class": tokenizer()}
        | (given or {}),
    )
