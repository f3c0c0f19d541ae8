"""`evaluate` from the command line: what is compared, on which rows, kept, resumed, refused."""

from __future__ import annotations

import copy
import io
import json
import shutil
import signal
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusechat_distill.evaluation import measure
from fusechat_distill.evaluation.bootstrap import Losses, bootstrap, holm
from fusechat_distill.evaluation.candidates import Candidate
from fusechat_distill.evaluation.compare import pairs_to_test
from fusechat_distill.evaluation.page import tables, write_picture
from fusechat_distill.evaluation.schema import Evaluation
from fusechat_distill.fusion.stage import held_out
from fusechat_distill.inputs.open import open_inputs
from fusechat_distill.storage.processes import Processes
from fusechat_distill.text.conversations import Conversations
from tests.support import chain
from tests.support.bits import answer_bits
from tests.support.chain import (
    copied,
    printed,
    printed_json,
    read_json,
    refused,
    run,
)
from tests.support.killing import in_child, kill_at

CHAT_TEMPLATE = "chat_template.jinja"
DOMAINS = ("code", "prose")


def write_rows(path: Path) -> None:
    """Rows with a domain; the first one twice."""
    rows = [row | {"domain": DOMAINS[i % 3 == 0]} for i, row in enumerate(chain.rows(200))]
    chain.write_rows(path, [rows[0], *rows])


@pytest.fixture(scope="module")
def made(tmp_path_factory, models) -> Path:
    """A recipe whose one target is trained, and models beside it."""
    folder = tmp_path_factory.mktemp("evaluation")
    path = chain.recipe(folder, models, max_length=128, dataset={"eval_fraction": 0.2})
    write_rows(folder / "chats.jsonl")
    printed("run", path)
    return path


@pytest.fixture
def recipe(made, tmp_path) -> Path:
    """The same recipe with an output of its own."""
    content = yaml.safe_load(made.read_text("utf-8"))
    fresh = shutil.ignore_patterns("evaluation", "evaluation.json", "report")
    shutil.copytree(content["output"], tmp_path / "out", ignore=fresh)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | {"output": str(tmp_path / "out")}), encoding="utf-8")
    return path


def named(**models: Path) -> list[str]:
    """Options that name these models."""
    return [part for name, path in models.items() for part in ("--model", f"{name}={path}")]


@pytest.fixture(scope="module")
def found(made, models) -> dict:
    seeds = [*named(two=models / "twin"), *named(two=models / "pivot")]
    return printed_json("evaluate", made, *seeds)


def bits(folder: str, made: Path) -> dict[str, tuple[float, int]]:
    """Each held-out conversation's bits and bytes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = open_inputs(made).conversations
    sums = {}
    for conversation in conversations[: len(conversations)]:
        if held_out(conversation.key, 0.2):
            of_each, _, sizes = zip(*answer_bits(model, tokenizer, conversation), strict=True)
            sums[conversation.key] = sum(of_each), sum(sizes)
    return sums


def test_bits_per_byte_are_those_of_a_dense_forward(made, found):
    recipe = yaml.safe_load(made.read_text("utf-8"))
    target = Path(recipe["output"]) / "targets" / "neox"
    assert list(found["models"]) == ["pivot", "neox", "target neox", "two"]
    for name, folder in (("pivot", recipe["pivot"]), ("target neox", str(target))):
        sums = bits(folder, made)
        rate = sum(b for b, _ in sums.values()) / sum(size for _, size in sums.values())
        of_all = found["models"][name]["groups"]["all"]
        assert of_all["value"] == pytest.approx(rate, rel=1e-5)
        assert of_all["low"] < rate < of_all["high"]
        data = found["dataset"]
        assert data["conversations"] == len(sums)
        assert data["answers"] == data["counted"]
        assert data["bytes"] == sum(size for _, size in sums.values())
    two = found["models"]["two"]
    assert two["role"] == "model"
    assert len(two["paths"]) == 2
    pivot = found["models"]["pivot"]["groups"]["all"]["value"]
    assert two["groups"]["all"]["seeds"][1] == pytest.approx(pivot, rel=1e-12)


def test_rows_and_groups_are_the_held_out_ones(made, found):
    inputs = open_inputs(made)
    rows = [i for i, key in enumerate(inputs.conversations.keys) if held_out(key, 0.2)]
    kept = {inputs.conversations.keys[i]: i for i in reversed(rows)}
    assert found["dataset"]["copies"] == len(rows) - len(kept)
    written = [
        json.loads(line) for line in (made.parent / "chats.jsonl").read_text("utf-8").splitlines()
    ]
    assert found["dataset"]["column"] == "domain"
    assert list(found["groups"]) == ["all", *DOMAINS]
    for domain in DOMAINS:
        count = sum(written[i]["domain"] == domain for i in kept.values())
        assert found["groups"][domain]["conversations"] == count > 0
    assert found["groups"]["all"]["conversations"] == len(kept)


def test_what_is_a_group():
    features = Features(
        {
            "messages": [{"role": Value("string"), "content": Value("string")}],
            "group": ClassLabel(names=["red", "blue"]),
            "source": Value("string"),
            "domain": [Value("string")],
        }
    )
    rows = [
        row | {"group": i % 2, "source": None, "domain": []} for i, row in enumerate(chain.rows(4))
    ]
    rows[1]["messages"] = []
    conversations = Conversations(Dataset.from_list(rows, features=features))
    assert conversations.labels("group") == ["red", "red", "blue"]
    assert conversations.labels("source") == ["(none)"] * 3
    assert conversations.labels("domain") is conversations.labels("topic") is None


def test_addresses_are_no_groups(tmp_path, models, caplog):
    dataset = {"eval_fraction": 0.3}
    path = chain.recipe(tmp_path, models, count=200, max_length=128, dataset=dataset)
    rows = [row | {"source": f"https://{i}"} for i, row in enumerate(chain.rows(200))]
    chain.write_rows(tmp_path / "chats.jsonl", rows)
    assert list(printed_json("evaluate", path)["groups"]) == ["all"]
    assert "too many for groups" in caplog.text


def test_differences_and_p_values(made, found):
    recipe = yaml.safe_load(made.read_text("utf-8"))
    first, second = (
        bits(folder, made)
        for folder in (str(Path(recipe["output"]) / "targets/neox"), recipe["pivot"])
    )
    sizes = np.array([size for _, size in first.values()], float)
    models = {
        name: Losses(np.array([[b for b, _ in sums.values()]]), sizes)
        for name, sums in (("a", first), ("b", second))
    }
    expected = bootstrap(models, [("a", "b")])[1]["a", "b"]
    pair = found["pairs"][0]
    assert (pair["a"], pair["b"], pair["scope"]) == ("target neox", "pivot", "this checkpoint only")
    of_all = pair["groups"]["all"]
    for part, interval in (("difference", expected.absolute), ("relative", expected.relative)):
        shown = of_all[part]
        assert shown["value"] == pytest.approx(interval.value, rel=1e-3)
        assert (shown["low"], shown["high"]) == pytest.approx(
            (interval.low, interval.high), rel=1e-2
        )
    for groups in (["all"], list(DOMAINS)):
        tests = [pair["groups"][group] for group in groups for pair in found["pairs"]]
        assert [test["p_holm"] for test in tests] == holm([test["p"] for test in tests])
    for pair in found["pairs"]:
        for of_group in pair["groups"].values():
            shown = of_group["p_holm"] < 0.05
            better = of_group["difference"]["value"] < 0
            assert of_group["verdict"] == (
                ("better" if better else "worse") if shown else "no difference shown"
            )
    scopes = {(pair["a"], pair["b"]): pair["scope"] for pair in found["pairs"]}
    assert scopes == {
        ("target neox", "pivot"): "this checkpoint only",
        ("two", "pivot"): "seeds and samples",
        ("two", "target neox"): "seeds of two, this checkpoint of target neox",
    }


def test_the_pairs_that_matter():
    roles = {
        "pivot": "pivot", "one": "source", "target one": "target", "sft": "model", "merge": "model",
    }  # fmt: skip
    models = [Candidate(name, role, ()) for name, role in roles.items()]
    assert set(pairs_to_test(models)) == {
        ("target one", "pivot"),
        ("target one", "sft"),
        ("sft", "pivot"),
        ("merge", "pivot"),
        ("merge", "sft"),
        ("merge", "target one"),
    }
    models[2] = Candidate("target sft", "target", ())
    assert ("merge", "target sft") in pairs_to_test([m for m in models if m.name != "sft"])


def test_what_was_measured_is_kept_and_what_changed_is_measured_again(recipe, models, monkeypatch):
    loaded: list[str] = []
    load = measure.load_scorer
    monkeypatch.setattr(
        measure,
        "load_scorer",
        lambda what, model, processes: loaded.append(model.name) or load(what, model, processes),
    )
    twin = copied(models / "twin", recipe.parent / "twin")
    command = ("evaluate", recipe, *named(twin=twin))
    first = printed_json(*command)
    assert loaded == ["pivot", "neox", "target neox", f"--model twin={twin}"]
    out = recipe.parent / "out"
    picture = (out / "report" / "evaluation.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert read_json(out / "evaluation.json") == first
    loaded.clear()
    assert (printed_json(*command), loaded) == (first, [])
    assert (out / "report" / "evaluation.png").read_bytes() == picture
    weights = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    with torch.no_grad():
        weights.get_output_embeddings().weight.mul_(1.5)
    weights.save_pretrained(twin)
    assert printed_json(*command) != first
    assert loaded == [f"--model twin={twin}"]
    damaged = next((out / "evaluation").glob("*.json"))
    damaged.write_text("{", encoding="utf-8")
    printed("evaluate", recipe)
    assert len(loaded) == 2
    # A file under another's name is not taken for it.
    one, other, *_ = (out / "evaluation").glob("*.json")
    one.write_bytes(other.read_bytes())
    table = printed(*command)
    assert len(loaded) == 3
    assert "target neox vs pivot*" in " ".join(table.split())
    assert "source neox" in table


def test_killed_and_started_again(recipe, found):
    """The kill comes when the second model's numbers are about to get their name."""
    assert in_child(lambda: run("evaluate", recipe), kill_at("/evaluation/", 4)) == -signal.SIGKILL
    out = recipe.parent / "out"
    (kept,) = (out / "evaluation").glob("*.json")
    assert not (out / "evaluation.json").exists()
    before = kept.stat().st_mtime_ns
    models = printed_json("evaluate", recipe)["models"]
    assert kept.stat().st_mtime_ns == before
    for name in ("pivot", "neox", "target neox"):
        assert models[name]["groups"] == found["models"][name]["groups"]


def test_an_unfinished_target_is_listed(recipe):
    shutil.rmtree(recipe.parent / "out" / "targets" / "neox")
    shown = printed_json("evaluate", recipe)
    assert (shown["unfinished"], shown["pairs"]) == (["neox"], [])
    assert "target neox: not trained yet" in printed("evaluate", recipe)


def test_a_target_that_is_not_what_the_recipe_says_is_not_evaluated(recipe):
    target = recipe.parent / "out" / "targets" / "neox"
    (target / "tokenizer.json").unlink()
    (target / "tokenizer_config.json").unlink()
    said = refused("evaluate", recipe)
    assert "target neox: has no tokenizer; copy the tokenizer files" in said
    content = yaml.safe_load(recipe.read_text("utf-8"))
    content["training"]["lambda"] = 0.25
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    said = refused("evaluate", recipe)
    assert (
        f"target neox: {target} was made with other settings or inputs (training.lambda was 0.5"
        in said
    )


def test_models_whose_names_are_alike_have_files_of_their_own(recipe, models):
    printed("evaluate", recipe, *named(**{"target-neox": models / "twin"}), "--generate", 1)
    answers = recipe.parent / "out" / "answers" / "held_out"
    names = ["neox", "pivot", "target-neox", "target=neox"]
    for folder, key in (("model_answer", "model_id"), ("alpaca_eval", "generator")):
        files = sorted((answers / folder).iterdir())
        assert [file.stem for file in files] == names
        for file in files:
            (line,) = json.loads(f"[{file.read_text('utf-8').strip().strip('[]')}]")
            assert line[key] == file.stem


def test_it_runs_in_one_process(made, monkeypatch):
    class Two(Processes):
        def __init__(self, device):
            super().__init__(device)
            self.count = 2

    monkeypatch.setattr("fusechat_distill.storage.processes.Processes", Two)
    said = refused("evaluate", made)
    assert "evaluate: runs in one process, on all devices of the machine; start it" in said


def test_only_answers_that_all_models_can_be_given_count(recipe, models):
    one, other = (
        named(**{name: copied(models / "twin", recipe.parent / name, {CHAT_TEMPLATE: template})})
        for name, template in (
            ("short", "{{ raise_exception('no') if messages | length > 2 }}" + chain.CHATML),
            ("long", "{{ raise_exception('no') if messages | length == 2 }}" + chain.CHATML),
        )
    )
    shown = " ".join(printed("evaluate", recipe, *one).split())
    found = read_json(recipe.parent / "out" / "evaluation.json")
    left = found["models"]["short"]["left_out"]
    assert found["dataset"]["counted"] == found["dataset"]["answers"] - left
    assert 0 < left < found["dataset"]["answers"]
    assert f"short: could not score {left} answers; they count for no model" in shown
    said = refused("evaluate", recipe, *one, *other, status=1)
    assert "no held-out answer can be scored by all models" in said


def test_a_model_that_gives_nan_is_not_evaluated(recipe, models):
    bad = copied(models / "twin", recipe.parent / "bad")
    model = AutoModelForCausalLM.from_pretrained(bad, dtype=torch.float32)
    read = AutoTokenizer.from_pretrained(bad)(chain.ANSWERS[3], add_special_tokens=False)
    model.model.embed_tokens.weight.data[read.input_ids[:4]] = float("nan")
    model.save_pretrained(bad)
    said = refused("evaluate", recipe, *named(bad=bad), status=1)
    assert f"evaluate bad ({bad}): NaN or Inf in its output for " in said
    assert "evaluate it in another dtype" in said


def test_without_intervals_and_without_single_checkpoints(found, tmp_path):
    """As of one held-out conversation, and of models that all have several seeds."""

    def shown(content: dict) -> str:
        stream = io.StringIO()
        content["groups"] = {"all": found["groups"]["all"]}
        for table in tables(Evaluation(**content)):
            Console(file=stream, width=200).print(table)
        return stream.getvalue()

    bare, several = copy.deepcopy(found), copy.deepcopy(found)
    for entry in (*bare["models"].values(), *bare["pairs"]):
        for group in entry["groups"].values():
            for interval in (group, group.get("difference"), group.get("relative")):
                if interval and "low" in interval:
                    interval |= {"low": None, "high": None}
    relative = found["pairs"][0]["groups"]["all"]["relative"]
    text = shown(bare)
    assert f"{relative['value']:+.2%}" in text
    assert "[" not in text
    assert "±0" not in text
    write_picture(Evaluation(**bare), tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    several["pairs"] = [pair for pair in found["pairs"] if pair["scope"] == "seeds and samples"]
    text = shown(several)
    assert "two vs pivot" in text
    assert "*" not in text


def test_every_problem_is_named_before_any_weights_are_read(recipe, models, monkeypatch):
    made_of = json.dumps({"dataset": {"path": "chats.jsonl", "eval_fraction": 0.01}})
    twin, folder = models / "twin", recipe.parent
    bare = copied(twin, folder / "bare", without="token*")
    pickled = copied(twin, folder / "pickled", without="*.safetensors")
    seen = copied(twin, folder / "seen", {"fusechat_distill.json": made_of})
    torn, orphan = folder / "torn", folder / "orphan"
    for adapter, content in ((torn, "{"), (orphan, '{"base_model_name_or_path": "./nowhere"}')):
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(content, encoding="utf-8")
    shutil.copy(twin / "tokenizer.json", orphan)
    (orphan / "adapter_model.safetensors").write_bytes(b"")
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: asked.append(a))
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(
        "fusechat_distill.evaluation.measure.load_scorer",
        lambda *a: pytest.fail("weights were read"),
    )
    options = [
        *named(gone=folder / "gone", pivot=twin, neox=twin, bare=bare, pickled=pickled, seen=seen),
        *named(x=twin, y=twin, torn=torn, orphan=orphan, Neox=twin, Bare=bare),
        *("--model", "some/where"),
    ]
    questions = folder / "questions.jsonl"
    questions.write_text('{"question": "What?"}\n', encoding="utf-8")
    lines = refused("evaluate", recipe, *options, "--questions", questions).splitlines()
    assert lines[0].endswith("has 15 problems:")
    for model, said in (
        ("gone=", "there is no such folder"),
        ("some/where", "should be NAME=PATH"),
        ("pivot=", "the recipe has a model pivot already"),
        ("neox=", "the recipe has a model neox already"),
        ("bare=", "has no tokenizer"),
        ("pickled=", "has no weights in safetensors"),
        ("seen=", "was trained with eval_fraction 0.01"),
        ("y=", "is the same folder as --model x="),
        ("torn=", "has no tokenizer"),
        ("torn=", "has adapter_config.json, but no adapter_model.safetensors"),
        ("torn=", "its adapter_config.json can't be read: "),
        ("Neox=", "the recipe has a model neox already"),
        ("Bare=", "differs from --model bare in case only; give it another name"),
        ("orphan=", "its base model ./nowhere: there is no such folder"),
    ):
        assert any(line.startswith(f"  --model {model}") and said in line for line in lines), model
    assert any("--questions" in line and "neither MT-Bench's" in line for line in lines)
    assert asked == []
    assert not (folder / "out" / "evaluation").exists()


def test_nothing_held_out_is_an_error(tmp_path, models):
    path = chain.recipe(tmp_path, models, count=20, dataset={"eval_fraction": 0.0})
    said = refused("evaluate", path)
    assert "dataset.eval_fraction: 0 holds out none of the 20 conversations" in said


def test_a_merge_without_template_and_an_adapter(recipe, models):
    """The pivot's template stands in; an adapter is its base and what it adds."""
    from peft import LoraConfig, get_peft_model

    pivot, adapter = models / "pivot", recipe.parent / "adapter"
    bare = copied(pivot, recipe.parent / "bare", without=CHAT_TEMPLATE)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(pivot), lora)
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(pivot).save_pretrained(adapter)
    whole = copied(pivot, recipe.parent / "whole")
    adapted.merge_and_unload().save_pretrained(whole)
    found = printed_json("evaluate", recipe, *named(bare=bare, adapter=adapter, whole=whole))
    values = {name: model["groups"]["all"]["value"] for name, model in found["models"].items()}
    assert values["bare"] == values["pivot"]
    assert values["adapter"] == pytest.approx(values["whole"], rel=1e-5)
    assert values["adapter"] != pytest.approx(values["pivot"], rel=1e-4)
