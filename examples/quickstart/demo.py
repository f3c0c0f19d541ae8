"""Fuse two small chat models into a third one of another family, from scratch and offline.

    python examples/quickstart/demo.py

Trains the models on local text, makes a target for each source with `fusechat-distill`, merges the
targets and evaluates the result. Every command is printed. The next run reuses finished parts, and
makes a part again if its inputs have changed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import corpus
import yaml
from parts import Parts, command, digest, export, together
from safetensors import deserialize

HERE = Path(__file__).parent
SOURCES = corpus.DOMAINS


@dataclass(frozen=True)
class Settings:
    """Settings with which a smaller demo differs."""

    text: tuple[str, ...] = ()
    """Options of corpus.py."""
    models: tuple[str, ...] = ()
    """Options of models.py."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipes' `training`."""


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/quickstart"))
    out = parser.parse_args().out
    if Parts(out).are_foreign():
        parser.error(f"{out} was not made by this demo; name another folder with --out")
    run(out, Settings())


def run(out: Path, settings: Settings) -> None:
    """Make what isn't there yet below `out`, then print the result."""
    # The number of threads affects the last digits, so it is the same everywhere. Waiting threads
    # sleep, since two commands run at a time.
    export(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
    make = Parts(out).make

    made_from: list[object] = [sys.version, digest([HERE / "corpus.py", HERE / "models.py"])]
    made_from += installed("tokenizers", "transformers", "torch")
    text = make("text", made_from, HERE / "corpus.py", out / "text", *settings.text)

    def train_model(name: str) -> Path:
        words: tuple[str | Path, ...] = (
            HERE / "models.py",
            name,
            text / f"{name}.jsonl",
            out / "models" / name,
        )
        return make(f"models/{name}", [*made_from, settings.text], *words, *settings.models)

    *sources, pivot = together(*(partial(train_model, name) for name in (*SOURCES, "pivot")))

    made_from += [settings, *installed("fusechat_distill", "trl", "accelerate")]

    def train_targets(name: str, strategy: str) -> Path:
        content = yaml.safe_dump(
            recipe(out / name, strategy, text, pivot, sources, settings), sort_keys=False
        )
        file = out / f"{name}.yaml"
        file.write_text(content, encoding="utf-8")
        return make(name, [*made_from, content], "fusechat-distill", "run", file, resumes=True)

    fusion, sft = together(
        partial(train_targets, "fusion", "pairwise"), partial(train_targets, "sft", "sft")
    )

    config = fusion / "merge.yml"
    made_from += [config.read_text(encoding="utf-8"), *installed("fusechat_merge", "mergekit")]
    merge: list[tuple[str | Path, ...]] = [
        ("mergekit-yaml", config, out / "merged-by-mergekit"),
        ("fusechat-merge", "run", config, out / "merged", "--overwrite"),
    ]
    by_mergekit, merged = together(
        lambda: make("merged-by-mergekit", made_from, *merge[0]),
        lambda: make("merged", made_from, *merge[1], resumes=True),
    )
    if not same_bits(merged, by_mergekit):
        raise SystemExit(f"Error: {merged} and {by_mergekit} hold different tensors")

    models = [f"merged={merged}", f"sft={sft / 'targets' / 'sft'}"]
    options = [word for model in models for word in ("--model", model)]
    command(None, "fusechat-distill", "evaluate", out / "fusion.yaml", *options)

    print(f"\nmergekit-yaml and fusechat-merge run wrote the same bits of {merged}")
    print(f"the picture      {fusion / 'report' / 'evaluation.png'}")
    print(f"try another way  edit {config} and run this again")


def recipe(
    output: Path,
    strategy: str,
    text: Path,
    pivot: Path,
    sources: Sequence[Path],
    settings: Settings,
) -> dict[str, Any]:
    """The recipe: little data, many epochs, half of the loss from the sources."""
    return {
        "output": str(output),
        "pivot": str(pivot),
        "sources": [str(source) for source in sources],
        "dataset": {"path": str(text / "target.jsonl"), "eval_fraction": 0.35},
        "max_length": 512,
        "scoring": {"top_k": 64, "dtype": "float32", "device": "cpu"},
        "fusion": {"strategy": strategy},
        "training": {
            "lambda": 0.5,
            "num_train_epochs": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,  # a share of all steps
            "packing": True,
            "per_device_train_batch_size": 2,
            "gradient_checkpointing": False,
            "logging_steps": 50,
            "save_steps": 100,
            "report_to": [],
            **settings.training,
        },
        "merge": {"merge_method": "varm", "dtype": "float32"},
    }


def same_bits(one: Path, other: Path) -> bool:
    """Whether two checkpoints of one file each have the same tensors, bit for bit."""
    first, second = (
        dict(deserialize((folder / "model.safetensors").read_bytes())) for folder in (one, other)
    )
    return first == second


def installed(*packages: str) -> list[str]:
    """What identifies the state of a package: its version, or the source of our own."""
    return [
        digest(sorted(HERE.parents[1].glob(f"{package}/**/*.py")))
        if package.startswith("fusechat_")
        else version(package)
        for package in packages
    ]


if __name__ == "__main__":
    main()
