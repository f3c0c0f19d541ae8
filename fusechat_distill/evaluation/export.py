"""Models' answers side by side, and in the formats that two judges read.

docs/distilling.md ("Is it better?") says what the files hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat_common.files import write_json, write_text
from fusechat_distill.evaluation.questions import Question, Questions
from fusechat_distill.evaluation.schema import AnsweredQuestion, Answers, ChatMessage


def side_by_side(
    questions: Questions, answers: Mapping[str, Sequence[list[str] | None]]
) -> Answers:
    """The content of `answers.json`; `answers` of each model, in the questions' order."""
    return Answers(
        format=1,
        questions=questions.name,
        tokens=questions.tokens,
        entries=[
            AnsweredQuestion(
                id=question.id,
                category=question.category,
                messages=[ChatMessage(**message._asdict()) for message in question.messages],
                later_turns=list(question.later_turns),
                reference=question.reference,
                answers={name: texts[i] for name, texts in answers.items()},
            )
            for i, question in enumerate(questions.questions)
        ],
    )


def markdown(answers: Answers) -> str:
    """The content of `answers.md`."""
    lines = [f"# Answers to {len(answers.entries)} questions ({answers.questions})", ""]
    lines += [f"Greedy, at most {answers.tokens} tokens an answer.", ""]
    for entry in answers.entries:
        lines += [f"## {entry.id} ({entry.category})", ""]
        for message in entry.messages:
            lines += [f"**{message.role}**", "", *_quoted(message.content), ""]
        if entry.reference is not None:
            lines += ["### as in the dataset", "", *_quoted(entry.reference), ""]
        for name, texts in entry.answers.items():
            lines += [f"### {name}", ""]
            if texts is None:
                lines += ["(its template refuses the question)", ""]
                continue
            for turn, text in enumerate(texts):
                if turn:
                    lines += ["**user**", "", *_quoted(entry.later_turns[turn - 1]), ""]
                lines += [*_quoted(text or "(nothing)"), ""]
    return "\n".join(lines)


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()] or [">"]


def export(
    questions: Questions, answers: Mapping[str, Sequence[list[str] | None]], folder: Path
) -> None:
    """Write the files that MT-Bench and AlpacaEval read, without what a model did not answer."""
    asked = [
        {"question_id": q.id, "category": q.category, "turns": q.turns} for q in questions.questions
    ]
    (folder / "model_answer").mkdir(parents=True, exist_ok=True)
    write_text(folder / "question.jsonl", _jsonl(asked))
    single = not any(question.later_turns for question in questions.questions)
    if single:
        (folder / "alpaca_eval").mkdir(exist_ok=True)
    for name, texts in answers.items():
        # The `=` in place of the space of `target x` is in no name of a source or of `--model`.
        model = name.replace(" ", "=")
        answered = [
            (question, turns)
            for question, turns in zip(questions.questions, texts, strict=True)
            if turns is not None
        ]
        lines = _jsonl(_mt_bench(question, turns, model) for question, turns in answered)
        write_text(folder / "model_answer" / f"{model}.jsonl", lines)
        if single:
            outputs = [
                {
                    "dataset": question.category,
                    "instruction": question.turns[0],
                    "output": turns[0],
                    "generator": model,
                }
                for question, turns in answered
            ]
            write_json(folder / "alpaca_eval" / f"{model}.json", outputs)


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
