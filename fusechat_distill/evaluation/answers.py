"""Answers of the evaluated models to the same questions, side by side and for other judges.

Greedy, at most `tokens` new tokens, each model under its own template: a prompt is what the
template puts before an answer, as in training, so that a template without a generation prompt will
do. Of a model with several training seeds the first one answers.

Besides `report/answers.md` and `answers.json`, `answers/<questions>/` gets what these judges read
(their judges themselves were not run):

- FastChat's MT-Bench: a folder for `fastchat/llm_judge/data/`, with `question.jsonl` (a line each:
  `question_id`, `category`, `turns`) and `model_answer/<model>.jsonl` (`question_id`, `answer_id`,
  `model_id`, `choices`: `index` and `turns`, `tstamp`); the folder's name is the `--bench-name`.
  FastChat itself samples in some categories, greedy answers are another choice.
- AlpacaEval 2.0, where a question has one turn: `alpaca_eval/<model>.json`, a list of
  `dataset`, `instruction`, `output`, `generator`, for `alpaca_eval --model_outputs`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat_common.errors import RequestError
from fusechat_common.files import write_json, write_text
from fusechat_distill.text.conversations import Conversation, Message, Renderer
from fusechat_distill.text.tokens import vocabulary

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import OpenModel
    from fusechat_distill.scoring.transformers_engine import TransformersScorer
    from fusechat_distill.storage.stage import Progress

FORMAT = 1

HELD_OUT = "held_out"

TOKENS = 1024
"""New tokens of an answer, as in FastChat."""

HELD_OUT_TOKENS = 256
"""New tokens of an answer that is only to be looked at."""

PLACEHOLDER = Message("assistant", "Hello.")
"""Stands for the answer while its prompt is rendered."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: messages up to the first user turn, then further user turns."""

    id: int
    opening: tuple[Message, ...]
    further: tuple[str, ...] = ()
    category: str = HELD_OUT
    reference: str | None = None
    """The dataset's own answer to the opening."""

    @property
    def turns(self) -> list[str]:
        """As formats without system prompts have them."""
        return ["\n\n".join(m.content for m in self.opening), *self.further]


@dataclass(frozen=True)
class Questions:
    name: str
    """Of the folder of their answers."""
    questions: tuple[Question, ...]
    tokens: int

    @property
    def fingerprint(self) -> str:
        text = json.dumps([[q.opening, q.further] for q in self.questions])
        return hashlib.sha256(text.encode()).hexdigest()


def held_out_questions(
    conversations: Sequence[Conversation], groups: Sequence[str], count: int
) -> Questions:
    """The first turns of the first `count` conversations that begin with a question."""
    found: list[Question] = []
    for conversation, group in zip(conversations, groups, strict=True):
        roles = [message.role for message in conversation.messages]
        at = roles.index("assistant")
        if len(found) < count and "user" in roles[:at]:
            messages = conversation.messages
            found.append(Question(conversation.row, messages[:at], (), group, messages[at].content))
    return Questions(HELD_OUT, tuple(found), HELD_OUT_TOKENS)


def read_questions(path: Path, count: int | None = None) -> Questions:
    """MT-Bench's `question.jsonl` or AlpacaEval's instruction set; the first `count` of it.

    Raises:
        RequestError: it can't be read, or has another format.
    """
    try:
        text = path.read_text("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
        questions = [_question(row, i) for i, row in enumerate(rows)]
    except OSError as error:
        raise RequestError([f"can't be read ({error.strerror})"], path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            [
                "is neither MT-Bench's question.jsonl (a line each with question_id and turns) nor "
                f"AlpacaEval's JSON list with instruction ({type(error).__name__}: {error})"
            ],
            path,
        ) from error
    if not questions:
        raise RequestError(["holds no question"], path)
    return Questions(path.stem, tuple(questions[:count]), TOKENS)


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _question(row: Mapping[str, Any], index: int) -> Question:
    if "instruction" in row:
        return Question(
            index + 1,
            (Message("user", _text(row["instruction"])),),
            category=_text(row.get("dataset", "alpaca_eval")),
        )
    first, *further = map(_text, row["turns"])
    return Question(
        int(row["question_id"]),
        (Message("user", first),),
        tuple(further),
        _text(row.get("category", "general")),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def answer(
    questions: Questions,
    model: OpenModel,
    title: str,
    scorer: TransformersScorer,
    progress: Progress,
) -> list[list[str] | None]:
    """A model's answers to each question's turns; None where its template refuses the question."""
    chats = [list(question.opening) for question in questions.questions]
    answers: list[list[str] | None] = [[] for _ in chats]
    progress.start(title, sum(1 + len(question.further) for question in questions.questions))
    try:
        for turn in range(max(len(question.further) for question in questions.questions) + 1):
            asked = []
            for i, question in enumerate(questions.questions):
                if answers[i] is None or turn > len(question.further):
                    continue
                if turn:
                    chats[i].append(Message("user", question.further[turn - 1]))
                asked.append(i)
            prompts = dict(
                zip(asked, _prompts(model.renderer, [chats[i] for i in asked]), strict=True)
            )
            for i in [i for i, prompt in prompts.items() if prompt is None]:
                answers[i] = None
            possible = {i: prompt for i, prompt in prompts.items() if prompt is not None}
            texts = _generate(scorer, model, possible, questions.tokens, progress)
            for i, text in texts.items():
                said = answers[i]
                assert said is not None
                said.append(text)
                chats[i].append(Message("assistant", text))
    finally:
        progress.stop()
    return answers


@dataclass(frozen=True, eq=False)
class _Prompt:
    ids: np.ndarray
    pending: bytes
    """What the template has between these and the answer, for the model to begin with."""


def _prompts(renderer: Renderer, chats: Sequence[Sequence[Message]]) -> list[_Prompt | None]:
    """The tokens before the answer that each chat waits for."""
    asked = [Conversation("", i, (*chat, PLACEHOLDER)) for i, chat in enumerate(chats)]
    known = vocabulary(renderer.tokenizer)
    prompts: list[_Prompt | None] = []
    for conversation, rendering in zip(asked, renderer(asked), strict=True):
        last = [r for r in rendering.responses if r.turn == len(conversation.messages) - 1]
        if not last:
            prompts.append(None)
            continue
        ids, pending = rendering.input_ids[: last[0].first], last[0].pending
        # A space before an answer is most often part of its first token.
        while len(ids) > 1 and known.tokens[ids[-1]] and not known.tokens[ids[-1]].strip(b" "):
            ids, pending = ids[:-1], known.tokens[ids[-1]] + pending
        prompts.append(_Prompt(ids, pending))
    return prompts


def _generate(
    scorer: TransformersScorer,
    model: OpenModel,
    prompts: Mapping[int, _Prompt],
    tokens: int,
    progress: Progress,
) -> dict[int, str]:
    """What the model says to each prompt; prompts of like length share a batch."""
    import torch
    from transformers import GenerationConfig

    loaded = scorer.model
    config = model.files.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    rows = np.arange(scorer.head_module.weight.shape[0])
    absent = np.setdiff1d(rows, model.files.token_ids).tolist()
    stops = _stops(model, loaded)
    padding = model.renderer.tokenizer.pad_token_id
    padding = next(iter(stops), 0) if padding is None else padding
    stop_text = model.renderer.after_answer()
    texts = {}
    order = sorted(prompts, key=lambda i: -len(prompts[i].ids))
    while order:
        width = len(prompts[order[0]].ids)
        room = min(tokens, longest - width)
        if room < 1:
            texts[order.pop(0)] = ""
            progress.advance(1, 0)
            continue
        batch = order[: max(1, scorer.batch_tokens // (width + room))]
        ids = np.full((len(batch), width), padding, dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i].ids) :] = prompts[i].ids
            mask[row, width - len(prompts[i].ids) :] = 1
        with torch.inference_mode():
            made = loaded.generate(
                input_ids=torch.from_numpy(ids).to(loaded.device),
                attention_mask=torch.from_numpy(mask).to(loaded.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    max_new_tokens=room,
                    eos_token_id=stops or None,
                    pad_token_id=padding,
                    suppress_tokens=absent or None,
                ),
            )
        new = 0
        for row, i in enumerate(batch):
            said = list(itertools.takewhile(lambda t: t not in stops, made[row, width:].tolist()))
            new += len(said)
            texts[i] = _spoken(said, prompts[i], model, stop_text)
        progress.advance(len(batch), new)
        order = order[len(batch) :]
    return texts


def _spoken(ids: Sequence[int], prompt: _Prompt, model: OpenModel, stop_text: str) -> str:
    known = vocabulary(model.renderer.tokenizer)
    said = b"".join(known.tokens[token] for token in ids).removeprefix(prompt.pending)
    text = said.decode(errors="replace")
    return (text.partition(stop_text)[0] if stop_text else text).strip()


def _stops(model: OpenModel, loaded: Any) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those the model names."""
    roles = model.renderer.roles()
    named = loaded.generation_config.eos_token_id
    several = named if isinstance(named, list) else [named]
    found = [roles.get("end_of_turn"), roles.get("eos"), *several]
    return [token for token in dict.fromkeys(found) if token is not None]


def side_by_side(
    questions: Questions, answers: Mapping[str, Sequence[list[str] | None]]
) -> dict[str, Any]:
    """The content of `answers.json`: `format`, `questions` (name), `tokens` (at most, of an
    answer), and `entries`: `id` (of held-out rows: the row), `category`, `messages`, `further`
    user turns, `reference`, and `answers` by model, one a turn (None: its template refuses it)."""
    return {
        "format": FORMAT,
        "questions": questions.name,
        "tokens": questions.tokens,
        "entries": [
            {
                "id": question.id,
                "category": question.category,
                "messages": [message._asdict() for message in question.opening],
                "further": list(question.further),
                "reference": question.reference,
                "answers": {name: given[i] for name, given in answers.items()},
            }
            for i, question in enumerate(questions.questions)
        ],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The content of `answers.json` for people."""
    lines = [f"# Answers to {len(found['entries'])} questions ({found['questions']})", ""]
    lines += [f"Greedy, at most {found['tokens']} tokens an answer.", ""]
    for entry in found["entries"]:
        lines += [f"## {entry['id']} ({entry['category']})", ""]
        for message in entry["messages"]:
            lines += [f"**{message['role']}**", "", *_quoted(message["content"]), ""]
        if entry["reference"] is not None:
            lines += ["### as in the dataset", "", *_quoted(entry["reference"]), ""]
        for name, given in entry["answers"].items():
            lines += [f"### {name}", ""]
            if given is None:
                lines += ["(its template refuses the question)", ""]
                continue
            for turn, text in enumerate(given):
                if turn:
                    lines += ["**user**", "", *_quoted(entry["further"][turn - 1]), ""]
                lines += [*_quoted(text or "(nothing)"), ""]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()] or [">"]


def export(
    questions: Questions, answers: Mapping[str, Sequence[list[str] | None]], folder: Path
) -> list[Path]:
    """Write the files that MT-Bench and AlpacaEval read, without what a model did not answer."""
    asked = [
        {"question_id": q.id, "category": q.category, "turns": q.turns} for q in questions.questions
    ]
    (folder / "model_answer").mkdir(parents=True, exist_ok=True)
    paths = [folder / "question.jsonl"]
    write_text(paths[0], _jsonl(asked))
    single = not any(question.further for question in questions.questions)
    if single:
        (folder / "alpaca_eval").mkdir(exist_ok=True)
    for name, given in answers.items():
        model = name.replace(" ", "-")
        answered = [
            (question, turns)
            for question, turns in zip(questions.questions, given, strict=True)
            if turns is not None
        ]
        paths.append(folder / "model_answer" / f"{model}.jsonl")
        write_text(
            paths[-1], _jsonl(_mt_bench(question, turns, model) for question, turns in answered)
        )
        if single:
            paths.append(folder / "alpaca_eval" / f"{model}.json")
            write_json(
                paths[-1],
                [
                    {
                        "dataset": question.category,
                        "instruction": question.turns[0],
                        "output": turns[0],
                        "generator": model,
                    }
                    for question, turns in answered
                ],
            )
    return paths


def _mt_bench(question: Question, turns: Sequence[str], model: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps([model, question.id, list(turns)]).encode()).hexdigest()
    return {
        "question_id": question.id,
        "answer_id": digest[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": 0.0,  # when doesn't matter, and would make every run's file another
    }


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
