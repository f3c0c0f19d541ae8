"""Small chat models of several families, each with its own tokenizer and chat template.

    python examples/quickstart/models.py DESIGN CHATS.jsonl OUT [--seed N]

trains the model `DESIGN` (pivot, documentation or code) from scratch on the chats, in one thread,
and writes an ordinary checkpoint with its tokenizer to OUT.

From Python: `train(replace(DESIGNS["code"], layers=2), rows, folder, seed=1)`, with `replace` of
`dataclasses` and any `Design`. The same design, rows and seed give the same bytes.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|prompter|>' + m.content + '</s>' }}"
    "{% else %}{{ '<|assistant|>' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Design:
    """What a model is and how it is trained."""

    family: str  # transformers' `model_type`
    template: str
    specials: tuple[str, ...]  # end of an answer, padding, then the others
    sentencepiece: bool  # a BPE with ▁ and byte fallback like Llama's, else byte-level
    vocabulary: int  # at least 512
    hidden: int
    epochs: int
    layers: int = 4
    heads: int = 4
    learning_rate: float = 3e-3
    length: int = 256  # tokens of a window
    batch: int = 8  # windows of a step


DESIGNS = {
    "pivot": Design(  # 1.0 million parameters
        family="llama",
        template=TURNS,
        specials=("</s>", "<unk>", "<|prompter|>", "<|assistant|>"),
        sentencepiece=True,
        vocabulary=2048,
        hidden=128,
        epochs=3,
    ),
    "documentation": Design(  # 1.3 million
        family="gpt_neox",
        template=CHATML,
        specials=("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
        sentencepiece=False,
        vocabulary=4096,
        hidden=128,
        epochs=2,
    ),
    "code": Design(  # 1.7 million
        family="phi3",
        template=ROLES,
        specials=("<|end|>", "<unk>", "<|user|>", "<|assistant|>"),
        sentencepiece=True,
        vocabulary=3072,
        hidden=160,
        epochs=1,
    ),
}


def train(design: Design, rows: Sequence[dict[str, Any]], folder: Path, *, seed: int = 0) -> None:
    """Train a tokenizer and a model on chats, rows with `messages`, and write both to `folder`.

    The chats stand one after the other, cut into windows, and every token counts.
    """
    contents = (message["content"] for row in rows for message in row["messages"])
    tokenizer = train_tokenizer(design, contents)
    torch.manual_seed(seed)
    model = new_model(design, tokenizer)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for i in torch.randperm(len(rows)) for token in encoded[i]])
    _fit(model, tokens.unfold(0, design.length + 1, design.length), design)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(design: Design, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a BPE of the design's kind and size."""
    specials = [AddedToken(token, special=True, normalized=False) for token in design.specials]
    train = _sentencepiece if design.sentencepiece else _byte_level
    backend = train(texts, design.vocabulary, specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=design.specials[0],
        pad_token=design.specials[1],
        chat_template=design.template,
    )


def _byte_level(texts: Iterable[str], size: int, specials: list[AddedToken]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _sentencepiece(texts: Iterable[str], size: int, specials: list[AddedToken]) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Letters, digits and the rest are kept apart, and of several spaces the last goes with a word.
    words = Regex(r"▁+(?=▁)|▁?\p{L}+|▁?\p{N}|▁?[^▁\p{L}\p{N}\n]+|▁|\n")
    backend.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 256, special_tokens=specials, limit_alphabet=128, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    # After the special tokens come the 256 bytes, for text that no other token has.
    trained = json.loads(backend.to_str())
    pieces = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces[len(specials) : len(specials)] = fallback
    trained["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer.from_str(json.dumps(trained))


def new_model(design: Design, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model of the design with random weights."""
    ungated = design.family == "gpt_neox"
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": design.hidden,
        "intermediate_size": design.hidden * 4 if ungated else design.hidden * 8 // 3,
        "num_hidden_layers": design.layers,
        "num_attention_heads": design.heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not ungated:
        sizes["num_key_value_heads"] = design.heads
    config = AutoConfig.for_model(design.family, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _fit(model: PreTrainedModel, windows: torch.Tensor, design: Design) -> None:
    """Train on all windows, shuffled each epoch: AdamW, warm-up, cosine."""
    steps = design.epochs * math.ceil(len(windows) / design.batch)
    warmup = math.ceil(steps / 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=design.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, (1 + math.cos(math.pi * i / steps)) / 2)
    )
    model.train()
    progress = tqdm(_batches(windows, design), total=steps, unit="step", mininterval=10)
    for rows in progress:
        logits = model(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def _batches(windows: torch.Tensor, design: Design) -> Iterator[torch.Tensor]:
    for _ in range(design.epochs):
        for rows in torch.randperm(len(windows)).split(design.batch):
            yield windows[rows]


def main() -> None:
    """Read the command line and train a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("design", metavar="DESIGN", choices=DESIGNS)
    parser.add_argument("chats", metavar="CHATS.jsonl", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    sizes = ("vocabulary", "hidden", "layers", "epochs")
    for size in sizes:
        parser.add_argument(f"--{size}", metavar="N", type=int, help="default: the design's")
    options = parser.parse_args()
    changed = {size: getattr(options, size) for size in sizes if getattr(options, size)}
    torch.set_num_threads(1)  # another number of threads would change the last digits
    logging.disable_progress_bar()  # not useful for so small a model
    with options.chats.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    train(replace(DESIGNS[options.design], **changed), rows, options.out, seed=options.seed)


if __name__ == "__main__":
    main()
