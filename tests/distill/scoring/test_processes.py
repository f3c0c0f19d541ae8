"""Any number of processes, stopped at any moment, give the same store."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fusechat_common.errors import FusechatError
from fusechat_distill.inputs.open import open_inputs
from fusechat_distill.scoring.stage import placement, score_stages
from fusechat_distill.storage.processes import Processes
from tests.support import chain
from tests.support.chain import Silent, launched, parquet_files
from tests.support.killing import in_child, kill_at


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, mistral) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config = LlamaConfig(**chain.SIZES, vocab_size=len(mistral))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    mistral.save_pretrained(folder / "model")
    chance = random.Random(0)
    words = ["a", "cat", "reads", "naïve", "文", "books", "🙂", "and", "sleeps,", "two", "letters"]
    answers = [" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(900)]
    rows = [{"prompt": f"Say {i}", "completion": answer} for i, answer in enumerate(answers)]
    chain.write_rows(folder / "chats.jsonl", rows)

    def write(name: str) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(
            f"output: {folder / name}\npivot: {folder / 'model'}\nfusion: {{strategy: sft}}\n"
            f"dataset: {folder / 'chats.jsonl'}\nmax_length: 64\n"
            "scoring: {dtype: float32, device: cpu, batch_tokens: 512}\n"
        )
        return path

    return write


def stored(recipe: Path) -> dict[str, bytes]:
    folder = recipe.with_suffix("") / "scores" / "pivot"
    return parquet_files(folder) | {"manifest.json": (folder / "manifest.json").read_bytes()}


def score(recipe: Path) -> Callable[[], object]:
    inputs = open_inputs(recipe)
    return lambda: [stage.run(Processes("cpu"), Silent()) for stage in score_stages(inputs)]


def test_where_a_model_is_put(recipe):
    alone = Processes()
    several = torch.cuda.device_count() > 1
    assert placement("auto", alone) == ("spread" if several else alone.device)
    assert placement("cpu", alone) == "cpu"
    inputs = open_inputs(recipe("vllm"))
    scoring = inputs.recipe.scoring.model_copy(update={"engine": "vllm"})
    inputs = replace(inputs, recipe=inputs.recipe.model_copy(update={"scoring": scoring}))
    (stage,) = score_stages(inputs)
    assert (stage.status().done, stage.status().total) == (0, 900)
    alone.count = 2
    with pytest.raises(FusechatError, match="vllm spreads a model over devices itself; start it"):
        stage._scorer(alone)


@pytest.fixture(scope="module")
def expected(recipe) -> dict[str, bytes]:
    path = recipe("whole")
    assert in_child(score(path)) == 0
    made = stored(path)
    ranges = ("00000000-00000256", "00000256-00000512", "00000512-00000768", "00000768-00000900")
    assert list(made) == [*(f"{samples}.parquet" for samples in ranges), "manifest.json"]
    return made


def kill_after(seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_the_store_is_the_same(recipe, expected):
    path = recipe("killed")
    chance = random.Random(1)
    work = score(path)
    killed = 0
    for attempt in range(10):
        if attempt % 2:
            arm = partial(kill_after, chance.uniform(0.0, 0.6))
        else:
            arm = kill_at("", chance.randint(1, 12))
        status = in_child(work, arm)
        assert status in (0, -signal.SIGKILL, -signal.SIGALRM)
        killed += status != 0
    assert killed >= 5, "it was killed too seldom to show anything"
    assert in_child(work) == 0
    assert stored(path) == expected
    folder = path.with_suffix("") / "scores" / "pivot"
    assert not list(folder.glob(".*.part"))
    assert not (folder / "quarantine").exists(), "a kill left a torn shard under its final name"


def test_two_processes_give_the_same_store(recipe, expected):
    path = recipe("two")
    result = launched("score", path)
    assert result.returncode == 0, result.stderr
    assert stored(path) == expected
    assert result.stdout.startswith("score pivot: 900 of 900 samples; ")
    assert len(result.stdout.splitlines()) == 1, "only the first process speaks"
    log = path.with_suffix("") / "scores" / "pivot" / "log.jsonl"
    assert {json.loads(line)["process"] for line in log.read_text().splitlines()} == {0, 1}


def test_of_two_processes_one_says_what_is_wrong(recipe):
    path = recipe("wrong")
    path.write_text(path.read_text() + "seed: 1\n")
    result = launched("score", path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == [
        f"Error: {path}: seed: is not a key here; use one of alignment, dataset, fusion, "
        "max_length, merge, output, pivot, scoring, sources, training"
    ]
    assert not path.with_suffix("").exists()
