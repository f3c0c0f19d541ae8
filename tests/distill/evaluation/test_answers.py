"""Answers of models: greedy, under their own template, and in the formats of two judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusechat_common.errors import RequestError
from fusechat_distill.evaluation.questions import read_questions
from tests.support import chain
from tests.support.chain import printed, read_json, refused
from tests.support.real_tokenizers import byte_alphabet

MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Say 1, please", "Again?"]},
    {
        "question_id": 82,
        "category": "math",
        "turns": ["Two plus two?", "And 東京?"],
        "reference": ["4", ""],
    },
]
ALPACA = [
    {
        "instruction": "Say it",
        "output": "It.",
        "generator": "text_davinci_003",
        "dataset": "helpful_base",
    },
    {"instruction": "Où?", "dataset": "koala"},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Nothing is trained: pivot and sources answer."""
    folder = tmp_path_factory.mktemp("answers")
    chain.save_models(folder / "models")
    return chain.recipe(folder, folder / "models", count=60, max_length=128)


def evaluated(recipe: Path, *options: object) -> Path:
    """The output folder, after `evaluate` with these options."""
    printed("evaluate", recipe, *options)
    return recipe.parent / "out"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def greedy(folder: Path, messages: list[dict], opening: str, limit: int) -> str:
    """One token after the other, the most probable one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False) + opening
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = len(ids)
    while len(ids) < min(size + limit, model.config.max_position_embeddings):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    spelt = {char: byte for byte, char in byte_alphabet().items()}
    pieces = tokenizer.convert_ids_to_tokens(ids[size:])
    texts = [piece for piece in pieces if piece not in tokenizer.all_special_tokens]
    return bytes(spelt[char] for char in "".join(texts)).decode(errors="replace").strip()


def test_held_out_questions_side_by_side(recipe):
    out = evaluated(recipe, "--generate", 2)
    found = read_json(out / "report" / "answers.json")
    assert (found["format"], found["questions"], len(found["entries"])) == (1, "held_out", 2)
    models = recipe.parent / "models"
    rows = read_lines(recipe.parent / "chats.jsonl")
    text = (out / "report" / "answers.md").read_text("utf-8")
    for entry in found["entries"]:
        chat = entry["messages"]
        assert chat[-1]["role"] == "user"
        messages = rows[entry["id"]]["messages"]
        assert chat == messages[: len(chat)]
        assert entry["reference"] == messages[len(chat)]["content"]
        for name, opening in (("pivot", "<|im_start|>assistant\n"), ("neox", "A:")):
            expected = greedy(models / name, chat, opening, found["tokens"])
            assert entry["answers"][name] == [expected]
        assert f"> {chat[-1]['content']}" in text
    assert text.count("### neox") == 2
    before = {path: path.read_bytes() for path in (out / "answers").rglob("*") if path.is_file()}
    evaluated(recipe, "--generate", 2)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(str(path.relative_to(out / "answers")) for path in before) == [
        "held_out/alpaca_eval/neox.json",
        "held_out/alpaca_eval/pivot.json",
        "held_out/model_answer/neox.jsonl",
        "held_out/model_answer/pivot.jsonl",
        "held_out/question.jsonl",
    ]


def test_mt_bench_answers_have_fastchats_fields(recipe, tmp_path):
    questions = chain.write_rows(tmp_path / "mt_bench.jsonl", MT_BENCH)
    out = evaluated(recipe, "--questions", questions) / "answers" / "mt_bench"
    assert not (out / "alpaca_eval").exists()
    fields = ("question_id", "category", "turns")
    assert read_lines(out / "question.jsonl") == [{k: q[k] for k in fields} for q in MT_BENCH]
    for model in ("pivot", "neox"):
        # As fastchat.llm_judge.common reads them: by the file's name, then by question_id.
        lines = read_lines(out / "model_answer" / f"{model}.jsonl")
        answers = {line["question_id"]: line for line in lines}
        assert list(answers) == [81, 82]
        for line in answers.values():
            types = {key: type(value) for key, value in line.items() if key != "question_id"}
            assert types == {"answer_id": str, "model_id": str, "choices": list, "tstamp": float}
            assert line["model_id"] == model
            (choice,) = line["choices"]
            assert set(choice) == {"index", "turns"}
            assert choice["index"] == 0
            assert [type(turn) for turn in choice["turns"]] == [str, str]
        assert len({line["answer_id"] for line in answers.values()}) == 2
    found = read_json(out.parents[1] / "report" / "answers.json")
    (said, again) = found["entries"][0]["answers"]["pivot"]
    messages = [
        {"role": "user", "content": "Say 1, please"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Again?"},
    ]
    pivot = recipe.parent / "models" / "pivot"
    assert again == greedy(pivot, messages, "<|im_start|>assistant\n", found["tokens"])


def test_questions_that_a_template_refuses(recipe, tmp_path):
    """The first one at once, another at its second turn; one of a single turn is answered."""
    strict = tmp_path / "strict"
    shutil.copytree(recipe.parent / "models" / "twin", strict)
    refuses = "{% for m in messages if m.content in ('Again?', 'Où?') %}{{ 0 // 0 }}{% endfor %}"
    (strict / "chat_template.jinja").write_text(refuses + chain.CHATML, encoding="utf-8")
    alone = {"question_id": 4, "turns": ["one"]}
    rows = [{"question_id": 3, "turns": ["Où?", "Là?"]}, MT_BENCH[0], alone, MT_BENCH[1]]
    questions = chain.write_rows(tmp_path / "mt.jsonl", rows)
    out = evaluated(recipe, "--questions", questions, "--model", f"strict={strict}")
    found = read_json(out / "report" / "answers.json")
    given = [entry["answers"]["strict"] for entry in found["entries"]]
    assert [turns and len(turns) for turns in given] == [None, None, 1, 2]
    assert [len(entry["answers"]["pivot"]) for entry in found["entries"]] == [2, 2, 1, 2]
    text = (out / "report" / "answers.md").read_text("utf-8")
    assert text.count("### strict\n\n(its template refuses the question)\n") == 2
    lines = read_lines(out / "answers" / "mt" / "model_answer" / "strict.jsonl")
    assert [line["question_id"] for line in lines] == [4, 82]


def test_alpaca_eval_outputs_have_its_fields(recipe, tmp_path):
    questions = tmp_path / "alpaca_eval.json"
    questions.write_text(json.dumps(ALPACA), encoding="utf-8")
    out = evaluated(recipe, "--questions", questions) / "answers" / "alpaca_eval" / "alpaca_eval"
    for model in ("pivot", "neox"):
        rows = read_json(out / f"{model}.json")
        assert [row["instruction"] for row in rows] == ["Say it", "Où?"]
        assert [row["dataset"] for row in rows] == ["helpful_base", "koala"]
        for row in rows:
            assert set(row) == {"dataset", "instruction", "output", "generator"}
            assert row["generator"] == model
            assert isinstance(row["output"], str)
            assert row["output"] != "It."


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"question_id": 1}', '[{"prompt": "x"}]', '{"question_id": "a", "turns": ["x"]}',
     '{"question_id": 1, "turns": []}', '{"question_id": 1, "turns": [3]}', "[1]", "not json"],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=r"neither MT-Bench's|holds no question"):
        read_questions(path)
    with pytest.raises(RequestError, match="can't be read"):
        read_questions(tmp_path / "gone.jsonl")


def test_the_name_of_held_out_answers_is_taken(tmp_path):
    path = tmp_path / "Held_Out.jsonl"
    path.write_text(json.dumps(MT_BENCH[0]), encoding="utf-8")
    with pytest.raises(RequestError, match="its answers would replace those in answers/held_out"):
        read_questions(path)


def test_no_held_out_question_is_said_before_any_weights_are_read(recipe, tmp_path, monkeypatch):
    """All conversations begin with an answer, so that bits can be counted and nothing asked."""
    content = yaml.safe_load(recipe.read_text("utf-8"))
    rows = [row | {"messages": row["messages"][1:]} for row in chain.rows(60)]
    chain.write_rows(tmp_path / "chats.jsonl", [row for row in rows if len(row["messages"]) > 2])
    content |= {"output": str(tmp_path / "out")}
    content["dataset"] |= {"path": str(tmp_path / "chats.jsonl"), "eval_fraction": 0.5}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr(
        "fusechat_distill.evaluation.measure.load_scorer",
        lambda *a: pytest.fail("weights were read"),
    )
    said = refused("evaluate", path, "--generate", 2)
    assert "--generate 2: none of the " in said
    assert "name questions with --questions FILE" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out" / "evaluation").exists()
