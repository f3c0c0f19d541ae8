"""The content of `evaluation.json` and of `report/answers.json`."""

from __future__ import annotations

from typing import Literal

from fusechat_common.record import Record

ALL = "all"
"""The group of all held-out conversations."""

Role = Literal["pivot", "source", "target", "model"]

Verdict = Literal["better", "worse", "no difference shown"]


class EvaluatedDataset(Record):
    """The held-out answers, which no target was trained on."""

    path: str
    """Hub name or path of the dataset."""
    eval_fraction: float
    """Share of conversations that is held out."""
    conversations: int
    """Held-out conversations that differ from each other."""
    copies: int
    """Further rows that are copies of these, which count once."""
    answers: int
    """Answers of these conversations."""
    counted: int
    """Answers that all models could score; all numbers are over these."""
    bytes: int
    """UTF-8 bytes of the counted answers, as the pivot sees them."""
    column: str | None
    """The dataset's column that groups are read from, null where there is none."""


class GroupSize(Record):
    """A group of conversations."""

    conversations: int
    """Its held-out conversations of which an answer is counted."""
    bytes: int
    """UTF-8 bytes of its counted answers, as the pivot sees them."""


class ConfidenceInterval(Record):
    """An estimate with its confidence interval."""

    value: float
    """The estimate."""
    low: float | None
    """Lower bound; null under two conversations."""
    high: float | None
    """Upper bound; null under two conversations."""


class BitsPerByte(ConfidenceInterval):
    """A model's bits per byte in a group: all bits over all bytes, so that a long answer weighs
    more than a short one. Less is better."""

    seeds: list[float]
    """The value of each checkpoint, one a training seed."""


class EvaluatedModel(Record):
    """A model and its checkpoints."""

    role: Role
    """What it is in the recipe; `model`: named by `--model`."""
    paths: list[str]
    """Hub names or folders, one a training seed."""
    groups: dict[str, BitsPerByte]
    """By the groups' names."""
    end_bits: float | None
    """Bits an answer for ending it; null where no answer has a stop."""
    left_out: int
    """Answers that this model could not score."""


class GroupDifference(Record):
    """Two models in one group."""

    difference: ConfidenceInterval
    """Bits per byte of `a` minus those of `b`: below zero `a` is better."""
    relative: ConfidenceInterval
    """The difference as a share of `b`'s bits per byte."""
    p: float | None
    """Two-sided p-value; null under two conversations."""
    p_holm: float | None
    """The p-value after Holm's correction for all pairs of its family."""
    verdict: Verdict
    """What is shown of `a` at 5 % of `p_holm`."""


class Pair(Record):
    """Two models that are compared."""

    a: str
    """Name of the model that is tested."""
    b: str
    """Name of the model that it is compared with."""
    scope: str
    """What the intervals are about: `seeds and samples`; `this checkpoint only`, where neither
    model has several training seeds; or which model's seeds (pivot and sources have none)."""
    seeds: tuple[int, int]
    """Number of training seeds of `a` and of `b`."""
    paired: bool
    """Whether seed i of `a` is compared with seed i of `b`."""
    groups: dict[str, GroupDifference]
    """By the groups' names."""


class EvaluationMethod(Record):
    """How intervals and p-values are computed."""

    level: float
    """Confidence level of the intervals."""
    resamples: int
    """Of the bootstrap."""
    seed: int
    """Of the bootstrap's random numbers."""
    intervals: str
    """The method, in words."""
    families: str
    """What Holm's method corrects for, in words."""


class Evaluation(Record):
    """Bits per byte of held-out answers.

    Pairs are each target and each `--model` against the pivot and against the baseline `sft` where
    a model has that name, and each `--model` against each target. Sources are shown, not tested.
    The p-values of all pairs on the group `all` are one family; those of all pairs on all other
    groups are another."""

    format: Literal[1]
    """Version of these keys; another number, other keys."""
    unit: str
    """Of all values and differences that are not relative: bits per UTF-8 byte."""
    dataset: EvaluatedDataset
    groups: dict[str, GroupSize]
    """By name: `all` first, then the values of the dataset's column, where it has one."""
    models: dict[str, EvaluatedModel]
    """By name, in the order in which they are shown."""
    pairs: list[Pair]
    """The comparisons that are tested."""
    unfinished: list[str]
    """Targets of the recipe that are not trained yet."""
    method: EvaluationMethod


class ChatMessage(Record):
    """A message of a conversation."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    content: str
    """Its text."""


class AnsweredQuestion(Record):
    """A question and what each model answers."""

    id: int
    """Of the questions' file; of held-out questions the dataset's row."""
    category: str
    """Of the questions' file; of held-out questions their group."""
    messages: list[ChatMessage]
    """What stands before the first answer."""
    later_turns: list[str]
    """The user's later turns."""
    reference: str | None
    """The dataset's own answer."""
    answers: dict[str, list[str] | None]
    """By model, one a turn; null where the model's template refuses the question."""


class Answers(Record):
    """Answers of all models to the same questions, side by side."""

    format: Literal[1]
    """Version of these keys; another number, other keys."""
    questions: str
    """Name of the questions: `held_out`, or their file's name without its ending."""
    tokens: int
    """The most new tokens of an answer."""
    entries: list[AnsweredQuestion]
    """The questions, in their order."""
