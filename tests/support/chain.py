"""Pico models of two families with a tokenizer each, a recipe, its commands, a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.support.real_tokenizers import CHATML

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
PLAIN = (
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'A: ' + message['content'] + '</s>' }}{% else %}{{ 'Q: ' + message['content'] + '\\n' }}"
    "{% endif %}{% endfor %}"
)
SCORING = {"dtype": "float32", "device": "cpu", "top_k": 6}
ANSWERS = [
    "The cat sat on the mat.",
    "Paris — and 東京 🙂.",
    "def f(x):\n    return x + 1\n",
    "Two plus two is four, naïve café.",
    "the mat, the cat and the hat",
    "one",
]


def rows(count: int) -> list[dict[str, Any]]:
    made = []
    for i in range(count):
        messages = []
        for turn in range(1 + i % 2):
            messages.append({"role": "user", "content": f"Say {i}, please ({turn})"})
            messages.append({"role": "assistant", "content": ANSWERS[(i + turn) % len(ANSWERS)]})
        made.append({"messages": messages})
    return made


TEXTS = [*ANSWERS, "Say 1, please"] * 3


def tokenizer(
    size: int, specials: list[str], template: str, texts: list[str] = TEXTS
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=specials[0],
        pad_token=specials[0],
        chat_template=template,
    )


def save_models(folder: Path) -> None:
    """`pivot` (Llama, 300 tokens) and the sources `neox` (GPT-NeoX, 340) and `twin` (Llama)."""
    llama = tokenizer(300, ["<|im_end|>", "<|im_start|>"], CHATML)
    neox = tokenizer(340, ["</s>", "<s>"], PLAIN)
    for seed, name in enumerate(("pivot", "twin")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **SIZES,
            vocab_size=len(llama),
            num_key_value_heads=1,
            eos_token_id=llama.eos_token_id,
            pad_token_id=llama.pad_token_id,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        llama.save_pretrained(folder / name)
    torch.manual_seed(7)
    config = GPTNeoXConfig(**SIZES | {"hidden_size": 24}, vocab_size=len(neox))
    GPTNeoXForCausalLM(config).save_pretrained(folder / "neox")
    neox.save_pretrained(folder / "neox")


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def recipe(
    folder: Path, models: Path, name: str = "recipe", count: int = 300, **sections: Any
) -> Path:
    """A recipe of these models: sections as given, instead of or beside what makes it quick."""
    write_rows(folder / "chats.jsonl", rows(count))
    content: dict[str, Any] = {
        "output": str(folder / "out"),
        "pivot": str(models / "pivot"),
        "sources": [str(models / "neox")],
        "max_length": 64,
        "scoring": SCORING,
        "alignment": {"vocabulary": "bytes"},
    } | sections
    content["dataset"] = {"path": str(folder / "chats.jsonl"), "eval_fraction": 0.1} | sections.get(
        "dataset", {}
    )
    content["training"] = {
        "lambda": 0.5,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "logging_steps": 2,
    } | sections.get("training", {})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


class Silent:
    """Progress that nobody watches."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...


def run(*arguments: object) -> Result:
    """`fusechat-distill` with these arguments, in this process."""
    from fusechat_distill.cli import commands

    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    """What `fusechat-distill` prints with these arguments; it has to succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def printed_json(*arguments: object) -> Any:
    """What `fusechat-distill` prints with these arguments and `--json`."""
    return json.loads(printed(*arguments, "--json"))


def copied(folder: Path, target: Path, contents: dict[str, str] | None = None, without: str = "-"):
    """A copy of a model's folder, with other contents of some files and without some.

    Args:
        folder: the model's.
        target: the copy; made here.
        contents: files of the copy by name.
        without: the pattern of files that are left out.
    """
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without))
    for name, content in (contents or {}).items():
        (target / name).write_text(content, encoding="utf-8")
    return target


def refused(*arguments: object, status: int = 2) -> str:
    """What `fusechat-distill` says in the error stream; it has to end with this exit status."""
    result = run(*arguments)
    assert result.exit_code == status, result.output
    return result.stderr


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`fusechat-distill` with these arguments, in two processes."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0"),
        *("-m", "fusechat_distill", *map(str, arguments)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def parquet_files(folder: Path) -> dict[str, bytes]:
    """The content of the shards in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}
