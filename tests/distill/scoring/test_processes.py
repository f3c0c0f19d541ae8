"""Any number of processes, stopped at any moment, give the same store."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fusechat_common.errors import FusechatError
from fusechat_distill.inputs.open import open_inputs
from fusechat_distill.scoring.stage import placement, score_stages
from fusechat_distill.storage.processes import Processes

ROOT = Path(__file__).parents[3]


class Silent:
    """Progress that nobody watches."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, mistral) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(mistral),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "model")
    mistral.save_pretrained(folder / "model")
    chance = random.Random(0)
    words = ["a", "cat", "reads", "naïve", "文", "books", "🙂", "and", "sleeps,", "two", "letters"]
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for i in range(900):
            answer = " ".join(chance.choices(words, k=chance.randint(1, 6)))
            file.write(json.dumps({"prompt": f"Say {i}", "completion": answer}) + "\n")

    def write(name: str) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(
            f"output: {folder / name}\npivot: {folder / 'model'}\nfusion: {{strategy: sft}}\n"
            f"dataset: {folder / 'chats.jsonl'}\nmax_length: 64\n"
            "scoring: {dtype: float32, device: cpu, batch_tokens: 512}\n"
        )
        return path

    return write


def store(recipe: Path) -> dict[str, bytes]:
    folder = recipe.with_suffix("") / "scores" / "pivot"
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".parquet")
    }


def in_child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """`work` in a forked process with one thread: its exit status, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            before()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


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
    made = store(path)
    assert sorted(made) == [
        "00000000-00000256.parquet",
        "00000256-00000512.parquet",
        "00000512-00000768.parquet",
        "00000768-00000900.parquet",
        "manifest.json",
    ]
    return made


def kill_after(seconds: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def kill_at_file_operation(number: int) -> None:
    """End without any clean-up when the n-th file is about to be opened, renamed or removed."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in ("os.rename", "os.remove", "os.mkdir") or (
            event == "open" and str(arguments[1]).startswith(("w", "a"))
        ):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_the_store_is_the_same(recipe, expected):
    path = recipe("killed")
    chance = random.Random(1)
    work = score(path)
    killed = 0
    for attempt in range(10):
        if attempt % 2:
            moment = chance.uniform(0.0, 0.6)
            status = in_child(work, lambda moment=moment: kill_after(moment))
        else:
            number = chance.randint(1, 12)
            status = in_child(work, lambda number=number: kill_at_file_operation(number))
        assert status in (0, -signal.SIGKILL, -signal.SIGALRM)
        killed += status != 0
    assert killed >= 5, "it was killed too seldom to show anything"
    assert in_child(work) == 0
    assert store(path) == expected
    folder = path.with_suffix("") / "scores" / "pivot"
    assert not list(folder.glob(".*.part"))
    assert not (folder / "quarantine").exists(), "a kill left a torn shard under its final name"


def launch(recipe: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", str(port)),
        *("-m", "fusechat_distill", "score", str(recipe)),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_two_processes_give_the_same_store(recipe, expected):
    path = recipe("two")
    result = launch(path)
    assert result.returncode == 0, result.stderr
    assert store(path) == expected
    assert result.stdout.startswith("score pivot: 900 of 900 samples; ")
    assert len(result.stdout.splitlines()) == 1, "only the first process speaks"
    log = path.with_suffix("") / "scores" / "pivot" / "log.jsonl"
    assert {json.loads(line)["process"] for line in log.read_text().splitlines()} == {0, 1}


def test_of_two_processes_one_says_what_is_wrong(recipe):
    path = recipe("wrong")
    path.write_text(path.read_text() + "seed: 1\n")
    result = launch(path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == [
        f"Error: {path}: seed: is not a key here; use one of alignment, dataset, fusion, "
        "max_length, merge, output, pivot, scoring, sources, training"
    ]
    assert not path.with_suffix("").exists()
