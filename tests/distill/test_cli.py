"""The commands, end to end: real tokenizers, small random models, exact messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config, T5Config

from fusechat_common.errors import RequestError
from fusechat_distill.inputs.models import open_model
from fusechat_distill.recipe.schema import Model, load_recipe
from fusechat_distill.storage.shards import ScoreStore
from fusechat_distill.text.conversations import Renderer, open_conversations
from tests.support import chain
from tests.support.chain import (
    copied,
    parquet_files,
    printed,
    printed_json,
    read_json,
    refused,
    run,
    write_rows,
)
from tests.support.real_tokenizers import INSTRUCT

SFT = "fusion: {strategy: sft}"
"""A line of the fixture's recipe."""
TINY = chain.SIZES | {"num_key_value_heads": 1, "max_position_embeddings": 256}
CHATS = [
    [("user", "Name two cities."), ("assistant", "Paris — and 東京 🙂.")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "  Hello,\nfriend \n")],
    [("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "Zwei, naïve café.")],
    [("user", "code"), ("assistant", "def f(x):\n\n    return x + 1\n")],
    [("user", "नमस्ते"), ("assistant", "नमस्ते दुनिया " * 12)],
]


def save(folder: Path, config, tokenizer, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": role, "content": f"{content} {i}" if role == "user" else content}
                for role, content in CHATS[i % len(CHATS)]
            ]
        }
        for i in range(count)
    ]


def scores_of(recipe: Path, name: str = "pivot") -> Path:
    return recipe.parent / "out" / "scores" / name


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what must not be imported or said."""
    command = [sys.executable, *arguments]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables)


@pytest.fixture(scope="session")
def llama(tmp_path_factory, mistral) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save(folder, LlamaConfig(**TINY, vocab_size=len(mistral)), mistral)


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory, qwen) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    config = Qwen3Config(**TINY, head_dim=8, vocab_size=len(qwen) + 290, tie_word_embeddings=True)
    return save(folder, config, qwen, seed=1)


@pytest.fixture
def recipe(tmp_path, llama) -> Path:
    """A pivot and no source: the least that scores."""
    write_rows(tmp_path / "chats.jsonl", rows(30))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path / 'out'}\npivot: {llama}\nfusion: {{strategy: sft}}\n"
        f"dataset: {tmp_path / 'chats.jsonl'}\nmax_length: 96\n"
        "scoring: {dtype: float32, device: cpu}\n",
        encoding="utf-8",
    )
    return path


def change(path: Path, *replacements: tuple[str, str]) -> Path:
    text = path.read_text("utf-8")
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return path


def test_scores_of_two_families_are_the_dense_reference(recipe, tmp_path, llama, qwen3):
    printed("score", change(recipe, (SFT, f"sources: [{qwen3}]")))
    conversations = open_conversations(str(tmp_path / "chats.jsonl"))
    pivot = Renderer(AutoTokenizer.from_pretrained(llama))
    for name, folder in (("pivot", llama), ("qwen3", qwen3)):
        store = ScoreStore(tmp_path / "out" / "scores" / name)
        assert list(store) == conversations.keys
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        renderer = pivot if name == "pivot" else Renderer(tokenizer)
        some = conversations[:6]
        for conversation, rendering, of_pivot in zip(
            some, renderer(some), pivot(some), strict=True
        ):
            kept, cut = of_pivot.cut_to(96)
            rendering = kept if name == "pivot" else rendering.cut_at(cut)
            sample = store[conversation.key]
            assert sample.row == conversation.row
            assert len(sample.responses) == len(rendering.responses) > 0
            with torch.no_grad():
                logits = model(torch.tensor(rendering.input_ids)[None]).logits[0].double()
            logprobs = logits[:, : len(tokenizer)].log_softmax(-1).numpy()
            for scored, response in zip(sample.responses, rendering.responses, strict=True):
                expected = logprobs[response.state_slice()]
                gold = rendering.input_ids[response.token_slice()]
                np.testing.assert_array_equal(scored.tokens, gold)
                np.testing.assert_array_equal(scored.ends, response.ends)
                for field in ("turn", "begin", "end", "pending", "stop"):
                    assert getattr(scored, field) == getattr(response, field)
                of_gold = expected[np.arange(len(gold)), gold]
                np.testing.assert_allclose(scored.gold_logprobs, of_gold, atol=1e-5)
                best = -np.sort(-expected, 1)[:, :10]
                np.testing.assert_allclose(scored.logprobs, best, rtol=1e-3)
                named = np.take_along_axis(expected, scored.ids.astype(np.int64), 1)
                np.testing.assert_allclose(named, best, atol=1e-5)


def test_what_is_done_is_not_done_again_and_what_is_torn_is(recipe, tmp_path, caplog):
    write_rows(tmp_path / "chats.jsonl", rows(300))
    printed("score", recipe)
    folder = scores_of(recipe)
    before = parquet_files(folder)
    assert list(before) == ["00000000-00000256.parquet", "00000256-00000300.parquet"]
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))]
    printed("score", recipe)
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))]

    torn = folder / "00000256-00000300.parquet"
    torn.write_bytes(torn.read_bytes()[:-100])
    printed("score", recipe)
    assert parquet_files(folder) == before
    assert (folder / "quarantine" / torn.name).exists()
    assert any("moved to" in message for message in caplog.messages)


def test_status_says_what_is_done_and_what_is_left(recipe, tmp_path, llama):
    write_rows(tmp_path / "chats.jsonl", rows(300))
    change(recipe, (SFT, f"sources: [{{model: {llama}, name: twin}}]"))
    stages = ("score pivot", "score twin", "align twin")
    assert printed("status", recipe).splitlines()[:3] == [f"{s}: not begun" for s in stages]
    printed("score", recipe, "--model", "pivot")
    (scores_of(recipe) / "00000256-00000300.parquet").unlink()
    line, following = printed("status", recipe).splitlines()[:2]
    assert line.startswith("score pivot: 256 of 300 samples; ")
    assert " response tokens; " in line
    assert " tokens/s a process; about 0:00:0" in line
    assert following == "score twin: not begun"
    entry, other = printed_json("status", recipe)[:2]
    shown = [entry[key] for key in ("stage", "name", "done", "total")]
    assert shown == ["score", "pivot", 256, 300]
    assert entry["response_tokens"] > 0
    assert entry["seconds_left"] > 0
    assert entry["cut"] > 0, "the long answers do not fit into 96 tokens"
    assert (other["done"], other["total"]) == (0, None)
    (scores_of(recipe) / "log.jsonl").unlink()
    line = printed("status", recipe).splitlines()[0]
    assert line.startswith("score pivot: 256 of 300 samples; ")
    assert "tokens/s" not in line


def test_turns_and_samples_that_a_model_can_not_take_are_counted(recipe, tmp_path, llama):
    def chat(asked: str, *answer: dict) -> dict:
        return {"messages": [{"role": "user", "content": asked}, *answer]}

    spelling = {"role": "assistant", "content": "it is <|end_of_turn|> here"}
    made = rows(4)
    made += [chat("spell it", spelling), chat("no answer")]
    made += [chat(asked, *made[2]["messages"][1:]) for asked in ("a poem", "word " * 99)]
    write_rows(tmp_path / "chats.jsonl", made)
    refuses = "{{ raise_exception('No poems.') if messages[0].content == 'a poem' }}"
    strict = copied(llama, tmp_path / "strict", {"chat_template.jinja": refuses + INSTRUCT})
    change(recipe, (SFT, f"sources: [{strict}]"))
    first, second = printed("score", recipe).splitlines()
    assert first.startswith("score pivot: 7 of 7 samples; ")
    assert "; 2 left out; 1 answers as context only (1 the answer spells the special" in first
    assert "; 1 with the system prompt in the first user message" in second
    pivot, other = printed_json("status", recipe)[:2]
    spelt = [4, "the answer spells the special token <|end_of_turn|>"]
    cut = [7, "no answer within max_length"]
    assert pivot["left_out"] == [spelt, cut]
    assert other["left_out"] == [spelt, [6, "the chat template rejects it: No poems."], cut]


def test_validate_says_what_will_be_done(recipe, tmp_path, llama):
    made = [*rows(23), {"messages": []}]
    write_rows(tmp_path / "chats.jsonl", made)
    change(recipe, (SFT, f"sources: [{{model: {llama}, name: twin}}]"))
    lines = printed("validate", recipe).splitlines()
    assert lines[:2] == [
        "dataset: 23 conversations (messages), 1 rows left out",
        "  row 23: no assistant turn",
    ]
    for line, name in zip(lines[2:4], ("pivot", "twin"), strict=True):
        assert line.startswith(f"{name}: {llama} (llama, 32,002 tokens), about ")
    facts = printed_json("validate", recipe)
    assert facts["dataset"]["left_out"] == [{"row": 23, "reason": "no assistant turn"}]
    assert set(facts["models"]) == {"pivot", "twin"}
    assert not (tmp_path / "out").exists()
    write_rows(tmp_path / "chats.jsonl", [*made, *made[-1:] * 22])
    lines = printed("validate", recipe).splitlines()
    assert lines[20:22] == ["  row 42: no assistant turn", "  ... and 3 more (--json lists all)"]


def test_validate_names_every_problem_at_once(recipe, tmp_path, llama):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    adapter, missing = tmp_path / "adapter", tmp_path / "missing"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    pickled = copied(
        llama, tmp_path / "pickled", {"pytorch_model.bin": ""}, without="*.safetensors"
    )
    plain = copied(llama, tmp_path / "plain", without="chat_template.jinja")
    split = copied(llama, tmp_path / "split", {"model.safetensors.index.json": json.dumps(index)})
    torn = copied(llama, tmp_path / "torn")
    os.truncate(torn / "model.safetensors", 1000)
    silent = copied(llama, tmp_path / "silent", without="*token*")
    (tmp_path / "file").write_text("")
    change(
        recipe,
        (SFT, f"sources: [{pickled}, {plain}, {adapter}, {missing}, {split}, {torn}, {silent}]"),
        ("max_length: 96", "max_length: 9999"),
        ("output: " + str(tmp_path / "out"), f"output: {tmp_path / 'file'}"),
        ("scoring: {", "scoring: {top_k: 99, topk: 3, "),
        ("device: cpu", "device: cuda:77"),
        ("dataset: ", "dataset: {column: chat, path: "),
        ("chats.jsonl", "chats.jsonl}"),
    )
    result = run("validate", recipe)
    assert result.exit_code == 2
    assert result.stdout == ""
    heading, *problems = result.stderr.splitlines()
    too_long = "takes 256 tokens at most; set max_length to 256 or less (it is 9999)"
    assert [line.strip() for line in problems] == [
        "scoring.topk: is not a key here; did you mean `top_k`?",
        f"dataset {tmp_path}/chats.jsonl: no column 'chat'; it has 'messages'",
        f"pivot ({llama}): {too_long}",
        f"pickled ({pickled}): has no weights in safetensors; convert them with "
        "`save_pretrained`, since pickled weights are never loaded",
        f"plain ({plain}): {too_long}",
        f"plain ({plain}): it has no chat template; put its chat_template.jinja beside its "
        "tokenizer, or name its chat model (a source can borrow the pivot's with `template: "
        "pivot`)",
        f"adapter ({adapter}): is an adapter; merge it into its base model first (PEFT's "
        "`merge_and_unload`)",
        f"missing ({missing}): there is no such folder",
        f"split ({split}): lacks model-2.safetensors, which model.safetensors.index.json names; "
        "copy them again",
        f"torn ({torn}): model.safetensors is truncated or not a safetensors file (Error while "
        "deserializing header: invalid header length); copy it again",
        f"silent ({silent}): has no tokenizer; copy the tokenizer files of its base model there",
        f"output: {tmp_path / 'file'} is a file; set `output` to a folder",
        f"scoring.device: cuda:77 is not available ({torch.cuda.device_count()} cuda devices); set it "
        "to auto",
    ]
    assert heading == f"Error: {recipe} has {len(problems)} problems:"


def test_what_a_recipe_asks_too_much_of(recipe, tmp_path, llama):
    """Each is said once, with a pivot that can't be opened and without."""
    text = recipe.read_text("utf-8")

    def problems(*replacements: tuple[str, str]) -> str:
        recipe.write_text(text, encoding="utf-8")
        said = refused("validate", change(recipe, *replacements))
        return said.removeprefix(f"Error: {recipe}: ")

    reason = f"pivot ({llama}): of the first 30 conversations none can be scored ("
    assert problems(("max_length: 96", "max_length: 3")) == (
        f"{reason}nothing is left within 3 tokens); check its template, or max_length\n"
    )
    few = tmp_path / "few"
    save(few, LlamaConfig(**TINY, vocab_size=300), AutoTokenizer.from_pretrained(llama))
    lines = problems((str(llama), str(few)), ("scoring: {", "scoring: {top_k: 301, ")).splitlines()
    assert f"pivot ({few}): has 300 tokens; set scoring.top_k to at most that" in lines[1]
    without = copied(llama, tmp_path / "without", without="chat_template.jinja")
    sources = f"sources: [{{model: {llama}, template: pivot, name: twin}}]\n"
    broken = problems(
        (f"pivot: {llama}", f"pivot: {without}"),
        (f"{SFT}\n", sources + "training: {learning_rate: 1e-3}\n"),
    )
    assert broken.startswith(f"pivot ({without}): it has no chat template; put")
    assert broken.count("\n") == 1
    recipe.write_text("[", encoding="utf-8")
    assert "is not YAML" in refused("validate", recipe)


@pytest.mark.parametrize(
    ("command", "old", "new", "status", "said"),
    [
        (
            "validate",
            "max_length: 96",
            "max_lenght: 96",
            2,
            "{recipe}: max_lenght: is not a key here; did you mean `max_length`?\n",
        ),
        pytest.param(
            "validate",
            "device: cpu",
            "device: cpu, engine: vllm",
            2,
            "{recipe}: scoring.engine: vllm is not installed; install it with `pip install",
            marks=pytest.mark.skipif(
                find_spec("vllm") is not None, reason="says what to do without vLLM"
            ),
        ),
        (
            "score",
            "pivot: {llama}",
            "pivot: {{model: {llama}, load: {{device_mop: auto}}}}",
            1,
            "pivot ({llama}): can't be loaded, check its `load`",
        ),
        (
            "score",
            "output: {folder}/out",
            "output: {llama}/out",
            2,
            "{recipe}: output: is inside the model pivot ({llama}); set",
        ),
        (
            "score",
            "output: {folder}/out",
            "output: ~/out",
            2,
            "{recipe}: output: ~/out would be a folder called ~; write the path in full",
        ),
    ],
)
def test_one_change_is_one_problem(recipe, llama, command, old, new, status, said):
    names = {"recipe": recipe, "llama": llama, "folder": recipe.parent}
    change(recipe, (old.format(**names), new.format(**names)))
    found = refused(command, recipe, status=status)
    assert found.startswith(f"Error: {said.format(**names)}")
    assert found.count("\n") == 1
    assert "device_mop" not in new or "device_mop" in found


def test_nothing_is_written_where_it_can_not(recipe, tmp_path, monkeypatch):
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode, **options: not mode & os.W_OK)
    assert f"output: {tmp_path} is not writable; set" in refused("score", recipe)


def test_an_error_is_not_among_what_libraries_say(recipe, tmp_path):
    """Each of these would be a warning or a log line beside it."""
    with open(tmp_path / "chats.jsonl", "a") as file:
        file.write('{"messages": [')
    with open(recipe, "a") as file:
        file.write("training: {learning_rate: 1e-3, lora: {target_modules: all-linear}}\n")
    done = python("-m", "fusechat_distill", "validate", str(recipe))
    assert done.returncode == 2
    assert re.fullmatch(r"Error: .*: line \d+ is not JSON \(.*\)\n", done.stderr)


def test_a_tokenizer_of_another_model_is_found_without_weights(recipe, tmp_path, llama):
    config = json.dumps(read_json(llama / "config.json") | {"vocab_size": 3000})
    swapped = copied(llama, tmp_path / "swapped", {"config.json": config})
    change(recipe, (f"pivot: {llama}", f"pivot: {swapped}"))
    assert re.fullmatch(
        re.escape(f"Error: {recipe}: pivot ({swapped}): its tokenizer gives token ")
        + r"\d+, but it has 3000 embeddings; the tokenizer is another model's\n",
        refused("validate", recipe),
    )


def test_too_little_disk_is_found_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    said = refused("score", recipe)
    heading = f"Error: {recipe}: output: the scores will take about "
    assert said.startswith(heading)
    needed, rest = said.removeprefix(heading).split(" kB, ")
    assert 20 < float(needed) < 200
    assert rest == (
        "but only 1 B are free; free some, lower scoring.top_k, or set `output` to another disk\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_changed_recipe_or_model_is_refused_with_what_changed(recipe, tmp_path, llama):
    copy = copied(llama, tmp_path / "copy")
    printed("score", change(recipe, (f"pivot: {llama}", f"pivot: {copy}")))
    folder = scores_of(recipe)
    before = parquet_files(folder)

    change(recipe, ("scoring: {", "scoring: {top_k: 5, "))
    remedy = (
        "undo the change, or move it away or delete it to make it again, or set another `output`"
    )
    for command in ("validate", "score"):
        assert refused(command, recipe) == (
            f"Error: {recipe}: scores of pivot: {folder} was made with other settings or inputs "
            f"(top_k was 10, is 5); {remedy}\n"
        )
    change(recipe, ("top_k: 5, ", ""))

    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "(model.weights was '" in refused("score", recipe)
    assert parquet_files(folder) == before

    # Where a model lies is not what it is: a renamed folder goes on.
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    copy.rename(tmp_path / "renamed")
    printed("score", change(recipe, (f"pivot: {copy}", f"pivot: {tmp_path / 'renamed'}")))


def test_nan_leaves_its_sample_out_and_above_one_percent_it_ends(
    recipe, tmp_path, llama, mistral, caplog
):
    bad = copied(llama, tmp_path / "bad")  # it gives NaN where it reads this
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    token = mistral("世", add_special_tokens=False).input_ids[-1]
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(bad)
    made = rows(120)
    made[7]["messages"][0]["content"] = "世"
    write_rows(tmp_path / "chats.jsonl", made)
    change(recipe, (f"pivot: {llama}", f"pivot: {bad}"))
    assert "; 1 left out with NaN or Inf" in printed("score", recipe)
    assert "pivot: NaN or Inf at row 7; left out" in caplog.messages
    store = ScoreStore(scores_of(recipe))
    assert len(store) == 119
    assert open_conversations(str(tmp_path / "chats.jsonl")).keys[7] not in store

    made[3]["messages"][0]["content"] = made[4]["messages"][0]["content"] = "世"
    write_rows(tmp_path / "chats.jsonl", made)
    change(recipe, (str(tmp_path / "out"), str(tmp_path / "other")))
    assert refused("score", recipe, status=1).splitlines()[-1] == (
        f"Error: pivot ({bad}): NaN or Inf in its output for 3 of 120 samples, more than 1% (rows "
        "3, 4, 7); score it in another dtype (`dtype: float32`) after deleting "
        f"{tmp_path}/other/scores/pivot, or check its weights"
    )


def test_init_writes_a_recipe_that_is_valid_and_none_over_another(tmp_path):
    shown = printed("init", tmp_path / "new")
    path = tmp_path / "new" / "recipe.yaml"
    assert shown == f"{path}\n"
    load_recipe(path)
    before = path.read_bytes()
    assert refused("init", tmp_path / "new") == (
        f"Error: {path}: exists already; name another folder, or move it away\n"
    )
    assert path.read_bytes() == before


def test_only_the_model_asked_for_is_scored(recipe, tmp_path, llama):
    change(recipe, (SFT, f"sources: [{copied(llama, tmp_path / 'other')}]"))
    assert refused("score", recipe, "--model", "nobody") == (
        f"Error: {recipe}: --model nobody: not in the recipe; its models are pivot, other\n"
    )
    printed("score", recipe, "--model", "other")
    assert [path.name for path in scores_of(recipe).parent.iterdir()] == ["other"]


def test_align_needs_scores_and_then_shows_how_much_matches(recipe, tmp_path, llama):
    other = copied(llama, tmp_path / "other", {"chat_template.jinja": INSTRUCT})
    change(recipe, (SFT, f"sources: [{other}]"))
    assert refused("align", recipe, status=1) == (
        "Error: pivot: 30 of 30 samples have no scores; run `fusechat-distill score RECIPE --model "
        "pivot` first\n"
    )
    assert refused("align", recipe, "--source", "pivot") == (
        f"Error: {recipe}: --source pivot: not in the recipe; its sources are other\n"
    )
    printed("score", recipe)
    shown = printed("align", recipe)
    line = re.fullmatch(
        r"align other: 30 of 30 samples; ([\d.]+)% of the pivot's positions matched; "
        r"([\d.]+)% of the mass kept; [\d.]+ kB\n",
        shown,
    )
    assert line
    assert all(50 < float(share) <= 100 for share in line.groups())
    assert printed("status", recipe).splitlines()[2] == shown.strip()


def test_an_unforeseen_error_is_one_line_and_a_traceback_with_debug(recipe, monkeypatch):
    raised: list[BaseException] = []

    def broken(*arguments, **options):
        raise raised[-1]

    monkeypatch.setattr("fusechat_distill.inputs.open.open_inputs", broken)
    raised.append(OSError("the disk\nis on fire"))
    said = refused("validate", recipe, status=1)
    assert said == "Error: OSError: the disk is on fire (--debug shows where)\n"
    told = refused("validate", recipe, "--debug", status=1)
    assert told.startswith("Traceback ")
    assert told.endswith(said)
    raised.append(KeyboardInterrupt())
    assert refused("score", recipe, status=1) == (
        "Error: interrupted; completed work is kept, and the same command resumes\n"
    )


def test_a_tokenizer_that_its_library_breaks_on_is_refused(tmp_path):
    """The library panics, and a panic is no `Exception`."""
    chain.save_models(tmp_path)
    path = tmp_path / "pivot" / "tokenizer.json"
    content = read_json(path)
    content["model"]["continuing_subword_prefix"] = "\u202e"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(RequestError, match="its tokenizer can't be read: "):
        open_model(Model(model=str(tmp_path / "pivot")))


def test_an_interrupt_while_a_tokenizer_is_read_is_one(llama, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_model(Model(model=str(llama)))


CUSTOM = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}}


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("config.json", json.dumps(CUSTOM), "needs code from its own repository to run; read"),
        ("config.json", "{", "its configuration can't be read: "),
        (
            "config.json",
            json.dumps(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1).to_dict()),
            "is a t5 model, which is not a causal language model",
        ),
        ("model.safetensors.index.json", "{}", "model.safetensors.index.json can't be read: "),
        ("model.safetensors.index.json", '{"weight_map": []}', "json can't be read: 'list'"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "tokenizer.json", "b": "model.safetensors"}}',
            "tokenizer.json is truncated or not a safetensors file",
        ),
    ],
)
def test_a_model_that_can_not_be_scored_says_why(tmp_path, llama, file, content, problem):
    model = copied(llama, tmp_path / "model", {file: content})
    with pytest.raises(RequestError) as caught:
        open_model(Model(model=str(model)))
    (found,) = caught.value.problems
    assert problem in found


def test_a_model_of_the_hub_is_scored_from_its_cache(recipe, tmp_path, llama):
    """What was downloaded before is enough, and known by its commit; what was not is named."""
    commit = "0123456789" * 4
    for name in ("whole", "pickled"):
        folder = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(llama, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / "model.safetensors").unlink()
    code = (
        "import sys\nfrom fusechat_distill.cli import commands\n"
        "from fusechat_common.errors import RequestError\n"
        "from fusechat_distill.inputs.models import open_model\n"
        "from fusechat_distill.recipe.schema import Model\n"
        "for name in ('pickled', 'none'):\n"
        "    try:\n        open_model(Model(model=f'org/{name}'))\n"
        "    except RequestError as error:\n        print(error)\n"
        "commands(['score', sys.argv[1]])\n"
    )
    change(recipe, (f"pivot: {llama}", "pivot: org/whole"))
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = python("-c", code, str(recipe), **hub)
    assert done.returncode == 0, done.stderr
    pickled, none, scored = done.stdout.splitlines()
    assert pickled.startswith("org/pickled: has no weights in safetensors; convert them with")
    assert none.startswith("org/none: its configuration can't be read: ")
    assert scored.startswith("score pivot: 30 of 30 samples; ")
    manifest = read_json(tmp_path / "out" / "scores" / "pivot" / "manifest.json")
    assert manifest["fingerprint"]["model"] == {"name": "org/whole", "commit": commit}


def test_an_index_points_nowhere_else(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"../{llama.name}/model.safetensors"}}))
    with pytest.raises(RequestError, match="which are not file names in the same folder"):
        open_model(Model(model=str(index.parent)))
