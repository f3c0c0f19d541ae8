"""The questions that models are to answer: held-out ones, MT-Bench's or AlpacaEval's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat_common.errors import RequestError
from fusechat_distill.text.conversations import Conversation, Message

HELD_OUT = "held_out"

TOKENS = 1024
"""New tokens of an answer, as in FastChat."""

HELD_OUT_TOKENS = 256
"""New tokens of an answer that is only to be looked at."""


@dataclass(frozen=True)
class Question:
    """What a model is asked: messages up to the first user turn, then later user turns."""

    id: int
    messages: tuple[Message, ...]
    later_turns: tuple[str, ...] = ()
    category: str = HELD_OUT
    reference: str | None = None
    """The dataset's own answer to the messages."""

    @property
    def turns(self) -> list[str]:
        """As formats without system prompts have them."""
        return ["\n\n".join(m.content for m in self.messages), *self.later_turns]


@dataclass(frozen=True)
class Questions:
    name: str
    """Of the folder of their answers."""
    questions: tuple[Question, ...]
    tokens: int

    @property
    def fingerprint(self) -> str:
        text = json.dumps([[q.messages, q.later_turns] for q in self.questions])
        return hashlib.sha256(text.encode()).hexdigest()


def held_out_questions(
    conversations: Sequence[Conversation], groups: Sequence[str], count: int
) -> Questions:
    """The first turns of the first `count` conversations that begin with a question."""
    questions: list[Question] = []
    for conversation, group in zip(conversations, groups, strict=True):
        roles = [message.role for message in conversation.messages]
        at = roles.index("assistant")
        if len(questions) < count and "user" in roles[:at]:
            messages, reference = conversation.messages[:at], conversation.messages[at].content
            questions.append(Question(conversation.row, messages, (), group, reference))
    return Questions(HELD_OUT, tuple(questions), HELD_OUT_TOKENS)


def read_questions(path: Path, count: int | None = None) -> Questions:
    """MT-Bench's `question.jsonl` or AlpacaEval's instruction set; the first `count` of it.

    Raises:
        RequestError: it can't be read, or has another format.
    """
    try:
        text = path.read_text("utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        questions = [_question(row, i) for i, row in enumerate(rows)]
    except OSError as error:
        raise RequestError(f"can't be read ({error.strerror})", path) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            "is neither MT-Bench's question.jsonl (a line each with question_id and turns) nor "
            f"AlpacaEval's JSON list with instruction ({type(error).__name__}: {error})",
            path,
        ) from error
    if not questions:
        raise RequestError("holds no question", path)
    if path.stem.lower() == HELD_OUT:
        problem = f"its answers would replace those in answers/{HELD_OUT}; give it another name"
        raise RequestError(problem, path)
    return Questions(path.stem, tuple(questions[:count]), TOKENS)


def _question(row: Mapping[str, Any], index: int) -> Question:
    if "instruction" in row:
        category = _text(row.get("dataset", "alpaca_eval"))
        return Question(index + 1, (Message("user", _text(row["instruction"])),), (), category)
    first, *later_turns = map(_text, row["turns"])
    number, category = int(row["question_id"]), _text(row.get("category", "general"))
    return Question(number, (Message("user", first),), tuple(later_turns), category)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
