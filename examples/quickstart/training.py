"""A small Llama pivot, targets tuned from it, and their held-out loss, with a plain loop."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

logging.disable_progress_bar()  # of reading and writing so small a model


@dataclass(frozen=True)
class Settings:
    """Sizes of the demo: a model of 1.3 million parameters and 2.4 MB of text."""

    every: int = 1  # use every n-th document only
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    length: int = 256  # tokens a window
    batch: int = 8  # windows a step
    pivot_epochs: int = 2
    pivot_learning_rate: float = 2e-3
    target_epochs: int = 2
    target_learning_rate: float = 1.5e-3


def train_pivot(settings: Settings, text: Path, domain: str, checkpoint: Path) -> None:
    """Train a new Llama on a domain of the folder `text` and write it to `checkpoint`."""
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.hidden * 8 // 3,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.hidden // 32,
            num_key_value_heads=settings.hidden // 32,
            max_position_embeddings=512,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokens, _ = _read(text / "train.json", domain, tokenizer)
    epochs, learning_rate = settings.pivot_epochs, settings.pivot_learning_rate
    _train(model, tokens, "pivot", epochs, learning_rate, settings)
    _save(model, tokenizer, checkpoint)


def train_target(
    settings: Settings, text: Path, domain: str, pivot: Path, checkpoint: Path
) -> None:
    """Train a copy of the checkpoint `pivot` on a domain and write it to `checkpoint`."""
    tokenizer = AutoTokenizer.from_pretrained(pivot)
    model = _load(pivot)
    tokens, _ = _read(text / "train.json", domain, tokenizer)
    epochs, learning_rate = settings.target_epochs, settings.target_learning_rate
    _train(model, tokens, domain, epochs, learning_rate, settings)
    _save(model, tokenizer, checkpoint)


@torch.no_grad()
def held_out_loss(settings: Settings, text: Path, domain: str, checkpoint: Path) -> float:
    """Bits per byte of the held-out text, each token predicted from the window before it.

    Per byte, so that models with other tokenizers can be compared too.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = _load(checkpoint).eval()
    tokens, size = _read(text / "held_out.json", domain, tokenizer)
    length = settings.length
    windows = (tokens[None, i : i + length + 1] for i in range(0, len(tokens) - 1, length))
    nats = sum(_losses(model, window).sum(dtype=torch.float64).item() for window in windows)
    return nats / math.log(2) / size


def _load(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Path) -> None:
    """Write an ordinary checkpoint: bfloat16 safetensors, config, tokenizer."""
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def _read(file: Path, domain: str, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, int]:
    """One row of token ids, each text between two end tokens; and the texts' size in bytes."""
    texts = json.loads(file.read_text(encoding="utf-8"))[domain]
    ids = [tokenizer.eos_token_id]
    for encoded in tokenizer(texts)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids), sum(len(text.encode()) for text in texts)


def _train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    name: str,
    epochs: int,
    learning_rate: float,
    settings: Settings,
) -> None:
    """Train on all windows, shuffled each epoch: AdamW, warm-up, cosine."""
    windows = tokens.unfold(0, settings.length + 1, settings.length)  # neighbours share a token
    steps = epochs * math.ceil(len(windows) / settings.batch)
    warmup = math.ceil(steps / 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (1 + math.cos(math.pi * i / steps)) / 2)
    )
    shuffle = torch.Generator().manual_seed(0)
    model.train()
    with tqdm(total=steps, desc=f"training {name}", unit="step") as progress:  # on stderr
        for _ in range(epochs):
            for rows in torch.randperm(len(windows), generator=shuffle).split(settings.batch):
                loss = _losses(model, windows[rows]).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
                progress.update()


def _losses(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first of each window: [B, L + 1] -> [B · L]."""
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
