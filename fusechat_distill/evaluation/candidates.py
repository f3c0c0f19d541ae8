"""What is to be evaluated: models, held-out rows and questions, opened and checked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fusechat_common.errors import RequestError
from fusechat_distill.evaluation.questions import Questions, held_out_questions, read_questions
from fusechat_distill.evaluation.schema import ALL, Role
from fusechat_distill.fusion.stage import held_out
from fusechat_distill.inputs.models import open_checkpoint
from fusechat_distill.inputs.open import Inputs, OpenModel, limits, rendering_problems
from fusechat_distill.recipe.schema import FOLDER_NAME, PIVOT
from fusechat_distill.storage.shards import stale
from fusechat_distill.training.card import publishable
from fusechat_distill.training.stage import train_stages

if TYPE_CHECKING:
    from fusechat_distill.text.conversations import Conversation

log = logging.getLogger(__name__)

GROUP_COLUMNS = ("group", "source", "domain")

MOST_GROUPS = 24
"""A column with more values than that is no grouping (an address of each row, say)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model to be evaluated, and its checkpoints: one a training seed."""

    name: str
    role: Role
    checkpoints: tuple[OpenModel, ...]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The conversations that are kept from training, each once."""

    conversations: list[Conversation]
    groups: list[str]
    """One for each conversation."""
    column: str | None
    copies: int

    @cached_property
    def rows(self) -> dict[str, int]:
        return {conversation.key: i for i, conversation in enumerate(self.conversations)}


@dataclass(frozen=True, eq=False)
class EvaluationPlan:
    """What is to be evaluated, checked."""

    inputs: Inputs
    candidates: tuple[Candidate, ...]
    held_out: HeldOut
    unfinished: tuple[str, ...]
    questions: Questions | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        return self.inputs.recipe.output_folder / "evaluation"


@dataclass
class EvaluationPlanner:
    """Finds what is to be evaluated, and every problem with it."""

    named: Sequence[str] = ()
    """NAME=PATH, as `--model` takes them."""
    generate: int | None = None
    """How many questions are to be answered."""
    questions_file: str | None = None
    """The file of these; None for held-out ones."""
    trust_remote_code: bool = False
    _candidates: list[Candidate] = field(default_factory=list, init=False)
    _unfinished: list[str] = field(default_factory=list, init=False)
    _questions: Questions | None = field(default=None, init=False)
    _held_out: HeldOut = field(init=False)

    def problems(self, inputs: Inputs) -> list[str]:
        """Every problem with what is to be evaluated; called before `plan`."""
        for name, model in inputs.models.items():
            if model.files.weights:
                role: Role = "pivot" if name == PIVOT else "source"
                self._candidates.append(Candidate(name, role, (model,)))
            else:
                log.warning("%s (%s): is left out, it has no weights", name, model.spec.model)
        self._held_out = held_out_conversations(inputs)
        problems = []
        if not self._held_out.conversations:
            problems.append(
                f"dataset.eval_fraction: {inputs.recipe.dataset.eval_fraction:g} holds out none of "
                f"the {len(inputs.conversations)} conversations, so that there is nothing to "
                "evaluate on; raise it, and train again"
            )
        problems += [*self._targets(inputs), *self._named_models(inputs)]
        return [*problems, *self._questions_problems()]

    def plan(self, inputs: Inputs) -> EvaluationPlan:
        """What is to be evaluated, after `problems` has named none."""
        found = tuple(self._candidates), self._held_out, tuple(self._unfinished)
        return EvaluationPlan(inputs, *found, self._questions, self.trust_remote_code)

    def _questions_problems(self) -> Iterator[str]:
        conversations, groups = self._held_out.conversations, self._held_out.groups
        if self.questions_file is not None:
            try:
                self._questions = read_questions(Path(self.questions_file), self.generate)
            except RequestError as error:
                yield f"--questions {error}"
        elif self.generate is not None and conversations:
            self._questions = held_out_questions(conversations, groups, self.generate)
            if not self._questions.questions:
                yield (
                    f"--generate {self.generate}: none of the {len(conversations)} held-out "
                    "conversations has a user's message before its first answer; name questions "
                    "with --questions FILE, or leave --generate out"
                )

    def _targets(self, inputs: Inputs) -> Iterator[str]:
        for stage in train_stages(inputs):
            if not (stage.folder / "manifest.json").exists():
                self._unfinished.append(stage.name)
                continue
            name = f"target {stage.name}"
            if problem := stale(stage.folder, stage.manifest()):
                yield f"{name}: {stage.folder} {problem}"
                continue
            opened = self._open(inputs, name, str(stage.folder))
            if isinstance(opened, OpenModel):
                self._candidates.append(Candidate(name, "target", (opened,)))
            else:
                yield from opened

    def _named_models(self, inputs: Inputs) -> Iterator[str]:
        # Names become files' names, and some file systems don't tell upper from lower case.
        taken = {name.lower(): name for name in (PIVOT, *(s.title for s in inputs.recipe.sources))}
        taken |= {stage.name.lower(): stage.name for stage in train_stages(inputs)}
        spellings: dict[str, str] = {}
        checkpoints: dict[str, list[OpenModel]] = {}
        folders: dict[Path, str] = {}
        for option in self.named:
            name, _, path = option.partition("=")
            where = f"--model {option}"
            if not FOLDER_NAME.fullmatch(name) or not path:
                yield (
                    f"{where}: should be NAME=PATH, the name of letters, digits and . _ + -, the "
                    "path a folder with a checkpoint"
                )
                continue
            if name.lower() in taken:
                other = taken[name.lower()]
                yield f"{where}: the recipe has a model {other} already; give it another name"
                continue
            if (other := spellings.setdefault(name.lower(), name)) != name:
                yield f"{where}: differs from --model {other} in case only; give it another name"
                continue
            folder = Path(path).resolve()
            if folder in folders:
                yield f"{where}: is the same folder as --model {folders[folder]}; leave one out"
                continue
            folders[folder] = option
            opened = self._open(inputs, where, path)
            if isinstance(opened, OpenModel):
                checkpoints.setdefault(name, []).append(opened)
            else:
                yield from opened
        self._candidates += [
            Candidate(name, "model", tuple(seeds)) for name, seeds in checkpoints.items()
        ]

    def _open(self, inputs: Inputs, where: str, path: str) -> OpenModel | list[str]:
        """A checkpoint of the pivot's kind, or what is wrong with it."""
        from fusechat_distill.text.conversations import Renderer

        recipe, pivot = inputs.recipe, inputs.pivot
        spec = recipe.pivot.model_copy(update={"model": path, "revision": None})
        try:
            files = open_checkpoint(spec, trust_remote_code=self.trust_remote_code)
            # Merging tools leave the template behind at times.
            bare = not getattr(files.tokenizer, "chat_template", None)
            template = pivot.renderer.template if bare else None
            renderer = Renderer(files.tokenizer, template, name=path)
        except RequestError as error:
            return [f"{where}: {problem}" for problem in error.problems]
        problems = [f"{where}: {problem}" for problem in limits(recipe, files)]
        problems += _trained_on(where, Path(path), inputs)
        opened = OpenModel(where, files, renderer)
        seen = rendering_problems(replace(inputs, models={PIVOT: pivot, where: opened}))
        return problems + [problem for problem in seen if problem.startswith(where)] or opened


def _trained_on(where: str, folder: Path, inputs: Inputs) -> list[str]:
    """The problem with a target whose record says that it was trained on rows held out here."""
    try:
        trained_on = json.loads((folder / "fusechat_distill.json").read_text("utf-8"))["dataset"]
        path, fraction = trained_on["path"], float(trained_on["eval_fraction"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    here = inputs.recipe.dataset
    if path != publishable(here.path) or fraction >= here.eval_fraction:
        return []
    return [
        f"{where}: was trained with eval_fraction {fraction:g}, so on rows of the "
        f"{here.eval_fraction:g} that are held out here; train it again, or lower "
        "dataset.eval_fraction"
    ]


def held_out_conversations(inputs: Inputs) -> HeldOut:
    """The rows that no target was trained on, and their groups."""
    conversations, fraction = inputs.conversations, inputs.recipe.dataset.eval_fraction
    rows = [i for i, key in enumerate(conversations.keys) if held_out(key, fraction)]
    # Each conversation's first row, in the rows' order.
    first: dict[str, int] = {}
    for i in rows:
        first.setdefault(conversations.keys[i], i)
    column, groups = None, [ALL] * len(first)
    for name in GROUP_COLUMNS:
        if (labels := conversations.labels(name)) is None:
            continue
        values = [labels[i] for i in first.values()]
        if ALL not in values and len(set(values)) <= MOST_GROUPS:
            column, groups = name, values
            break
        log.warning("column %s: %d values, too many for groups", name, len(set(values)))
    held_out_once = [conversations[i] for i in first.values()]
    return HeldOut(held_out_once, groups, column, len(rows) - len(first))
