"""Fuse two small chat models into a third of another family, from nothing and offline.

    python examples/quickstart/demo.py

Trains the models on text at hand, has `fusechat-distill` make a target for each source, merges the
targets, and measures what came of it. Every command is printed. What is finished is used again by
the next run, and made anew once what it was made from has changed.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import corpus
import yaml
from parts import Parts, command, digest, together

HERE = Path(__file__).parent
SOURCES = corpus.DOMAINS


@dataclass(frozen=True)
class Settings:
    """What a smaller demo does otherwise."""

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
    # Each of two commands at a time has one thread; more would change the last digits.
    os.environ["OMP_NUM_THREADS"] = "1"
    make = Parts(out).make

    made_from: list[object] = [sys.version, digest([HERE / "corpus.py", HERE / "models.py"])]
    made_from += installed("tokenizers", "transformers", "torch")
    text = make("text", made_from, HERE / "corpus.py", out / "text", *settings.text)

    def train_model(name: str) -> Path:
        words = [HERE / "models.py", name, text / f"{name}.jsonl", out / "models" / name]
        return make(f"models/{name}", [*made_from, settings.text], *words, *settings.models)

    *sources, pivot = together(*(partial(train_model, name) for name in (*SOURCES, "pivot")))

    made_from += [settings, *installed("fusechat_distill", "trl", "accelerate")]

    def train_targets(name: str, strategy: str) -> Path:
        content = yaml.safe_dump(recipe(out / name, strategy, text, pivot, sources, settings), sort_keys=False)
        file = out / f"{name}.yaml"
        file.write_text(content, encoding="utf-8")
        return make(name, [*made_from, content], "fusechat-distill", "run", file, resumes=True)

    fusion, sft = together(
        partial(train_targets, "fusion", "pairwise"), partial(train_targets, "sft", "sft")
    )

    config = fusion / "merge.yml"
    made_from += [config.read_text(encoding="utf-8"), *installed("fusechat_merge", "mergekit")]
    merge = [
        ("merged-by-mergekit", "mergekit-yaml", config, out / "merged-by-mergekit"),
        ("merged", "fusechat-merge", "run", config, out / "merged", "--overwrite"),
    ]
    by_mergekit, merged = together(*(partial(make, name, made_from, *words) for name, *words in merge))
    same = same_tensors(merged, by_mergekit)

    evaluate...
