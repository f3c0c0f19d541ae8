"""`make demo`, much reduced: the same code on a fiftieth of the text, with smaller models."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fusechat_distill.text.tokens import token_bytes

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[1] / "examples" / "quickstart"
DOMAINS = ["documentation", "code"]
MODELS = ["pivot", *DOMAINS]
MOMENTS = [
    "models/code/config:1",
    "fusion/scores/code/0:1",
    "fusion/aligned/documentation/0:1",
    "fusion/fused/code/0:1",
    "fusion/training/documentation/checkpoint-4:1",
    "fusion/targets/.code.part/README:1",
    "sft/training/sft/checkpoint-2:1",
    ".merged.partial/:3",
    "fusion/evaluation/:3",
]
"""A file of each stage, and which time it is about to be written."""

Demo = tuple[Path, subprocess.CompletedProcess[str]]


def run_demo(folder: Path, *moments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HERE / "reduced_demo.py", *moments],
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "quickstart", done


def test_a_table_and_a_picture_of_every_model_in_every_domain(demo):
    out, done = demo
    found = json.loads((out / "fusion" / "evaluation.json").read_text())
    roles = {name: model["role"] for name, model in found["models"].items()}
    assert sorted(roles.values()) == [*["model"] * 2, "pivot", *["source"] * 2, *["target"] * 2]
    assert roles["merged"] == roles["sft"] == "model"
    assert set(found["groups"]) == {"all", *DOMAINS}
    for name, model in found["models"].items():
        shown = f"source {name}" if model["role"] == "source" else name
        assert f"│ {shown} " in done.stdout
        for group in model["groups"].values():
            assert f"{group['value']:.4f}" in done.stdout
    picture = out / "fusion" / "report" / "evaluation.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "runs/quickstart/fusion/report/evaluation.png" in done.stdout


def test_what_is_merged_is_varm(demo):
    out, done = demo
    base = load_file(out / "models" / "pivot" / "model.safetensors")
    folders = [out / "fusion" / "targets" / domain for domain in DOMAINS]
    targets = [load_file(folder / "model.safetensors") for folder in folders]
    merged = load_file(out / "merged" / "model.safetensors")
    assert merged.keys() == base.keys()
    for name, pivot in base.items():
        deltas = torch.stack([target[name].double() - pivot.double() for target in targets])
        shares = deltas.square().flatten(1).mean(1)
        shares /= shares.sum()
        expected = pivot.double() + torch.einsum("k,k...->...", shares, deltas)
        bound = expected.abs() * 2.0**-23 + 1e-9  # one rounding to float32
        assert ((merged[name].double() - expected).abs() <= bound).all(), name
    assert "wrote the same bits" in done.stdout


def test_every_command_is_printed_to_be_repeated(demo):
    out, done = demo
    export, *lines = [line[2:] for line in done.stderr.splitlines() if line.startswith("$ ")]
    assert export == "export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE"
    commands = []
    for line in lines:
        program, *words = shlex.split(line)
        if words[0].endswith(".py"):
            program, *words = words
        commands.append(" ".join([Path(program).name, *words]))
    there = "runs/quickstart"
    small = "--hidden 32 --layers 1 --vocabulary 600 --epochs 1"
    assert sorted(commands) == sorted(
        [
            f"corpus.py {there}/text --target-bytes 12000 --pivot-bytes 20000 --source-bytes 30000",
            *(
                f"models.py {name} {there}/text/{name}.jsonl {there}/models/{name} {small}"
                for name in MODELS
            ),
            f"fusechat-distill run {there}/fusion.yaml",
            f"fusechat-distill run {there}/sft.yaml",
            f"mergekit-yaml {there}/fusion/merge.yml {there}/merged-by-mergekit",
            f"fusechat-merge run {there}/fusion/merge.yml {there}/merged --overwrite",
            f"fusechat-distill evaluate {there}/fusion.yaml --model merged={there}/merged "
            f"--model sft={there}/sft/targets/sft",
        ]
    )
    before = {path: path.read_bytes() for path in (out / "text").iterdir()}
    subprocess.run(lines[0], shell=True, cwd=out.parents[1], check=True)
    assert {path: path.read_bytes() for path in (out / "text").iterdir()} == before


def test_a_second_run_uses_what_is_finished(demo):
    out, first = demo
    times = {
        path: path.stat().st_mtime_ns
        for path in out.rglob("*")
        if path.suffix in (".safetensors", ".jsonl", ".parquet", ".key")
    }
    second = run_demo(out.parents[1])
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert second.stderr.count(": there already") == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_every_stage_it_ends_the_same(demo, tmp_path):
    out, whole = demo
    killed = tmp_path / "runs" / "quickstart"
    for kept in ("text", ".made/text.key"):  # reading the library again would take a while
        (killed / kept).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (out / kept).is_dir() else shutil.copy2
        copy(out / kept, killed / kept)
    done = run_demo(tmp_path, *MOMENTS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == whole.stdout
    weights = sorted(path.relative_to(out) for path in out.rglob("*.safetensors"))
    assert weights == sorted(path.relative_to(killed) for path in killed.rglob("*.safetensors"))
    assert len(weights) == 8
    for file in weights:
        assert (killed / file).read_bytes() == (out / file).read_bytes(), file
    measured = [
        json.loads((folder / "fusion" / "evaluation.json").read_text())["models"]
        for folder in (out, killed)
    ]
    for of_whole, of_killed in zip(*(models.values() for models in measured), strict=True):
        assert of_killed["groups"] == of_whole["groups"]


def test_nobody_has_seen_the_target_rows(demo):
    out, _ = demo
    rows = {
        name: [json.loads(line) for line in (out / "text" / f"{name}.jsonl").open()]
        for name in ("target", *MODELS)
    }
    answers = {name: {row["messages"][1]["content"] for row in rows[name]} for name in rows}
    assert not answers["target"] & (answers["documentation"] | answers["code"])
    assert answers["pivot"] < answers["documentation"] | answers["code"]
    assert {row["domain"] for row in rows["code"]} == {"code"}
    size = {name: sum(map(len, answers[name])) for name in answers}
    for domain in DOMAINS:
        own = [row["messages"][1]["content"] for row in rows["target"] if row["domain"] == domain]
        assert sum(map(len, own)) == pytest.approx(size["target"] / 2, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_of_both_kinds_keep_every_byte(demo, name):
    out, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(out / "models" / name)
    assert len(tokenizer) == 600
    has_fallback = "<0x0A>" in tokenizer.get_vocab()
    assert has_fallback == (name != "documentation")
    text = "def f(x):\n    return 'naïve ☃' + x\t\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spelt = b"".join(token_bytes(tokenizer, ids)).decode()
    assert spelt == (f" {text}" if has_fallback else text)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert tokenizer.eos_token in rendered.removeprefix(prompt)


def test_refuses_a_folder_of_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("demo").main()
    assert ended.value.code == 2
    message = f"{tmp_path} was not made by this demo; name another folder with --out"
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    return importlib.import_module("parts")


def test_a_part_is_made_once_and_again_when_what_it_is_made_from_changes(
    parts, tmp_path, monkeypatch
):
    made = []

    def command(label, folder, content):
        made.append(label)
        folder.mkdir()
        (folder / "content").write_text(content)

    monkeypatch.setattr(parts, "command", command)
    make = parts.Parts(tmp_path / "out").make
    folder = tmp_path / "out" / "merged" / "varm"
    for made_from, content in ((["a"], "1"), (["a"], "1"), (["b"], "1"), (["b"], "2")):
        assert make("merged/varm", made_from, folder, content) == folder
        assert (folder / "content").read_text() == content
    assert made == ["merged/varm"] * 3


@pytest.mark.parametrize("resumes", [False, True])
def test_a_part_that_was_stopped_is_made_anew_or_gone_on_from(
    parts, tmp_path, monkeypatch, resumes
):
    found = []

    def command(label, folder):
        found.append(folder.exists())
        folder.mkdir(exist_ok=True)
        if len(found) == 1:
            raise SystemExit("Error: the disk is full")

    monkeypatch.setattr(parts, "command", command)
    make = parts.Parts(tmp_path).make
    with pytest.raises(SystemExit, match="disk is full"):
        make("text", ["a"], tmp_path / "text", resumes=resumes)
    make("text", ["a"], tmp_path / "text", resumes=resumes)
    assert found == [False, resumes]
    make("text", ["b"], tmp_path / "text", resumes=resumes)
    assert found == [False, resumes, False]  # nothing of another part is gone on from


def test_a_command_that_fails_ends_the_demo(parts, tmp_path, capfd):
    script = tmp_path / "fails.py"
    script.write_text("import sys; print('half'); sys.exit(3)")
    with pytest.raises(SystemExit, match="fails.py ended with status 3"):
        parts.command("text", script)
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[1]) == ("", "text | half")
    with pytest.raises(SystemExit, match=r"no-such-program is not in .*; install fusechat there"):
        parts.command("text", "no-such-program")
