"""Bits per byte of held-out answers: which models, which rows, and what is compared with what.

Every model sees a conversation under its own template and tokenizer, as in scoring, and cut where
`max_length` cuts the pivot's; `bits` says what is counted. Only answers that all models could be
given are counted, so that all numbers are of the same text. Transformers computes them whatever
`scoring.engine` is, in the recipe's `scoring.dtype` (or the model's own `dtype`).

Keys of `evaluation.json`:

- `format`: 1; another number, other keys. `unit`: bits per UTF-8 byte.
- `dataset`: `path`; `eval_fraction`; `conversations`, held out and different from each other;
  `copies` of these, which count once; their `answers`, those `counted` and the `bytes` of these
  (as the pivot sees them); `column`, what the groups are read from, or None.
- `groups`, by name, `all` first: `conversations` and `bytes`. A group's bits per byte are all its
  bits over all its bytes: a long answer weighs more than a short one.
- `models`, by name, in the order in which they are shown: `role` (pivot, source, target, model),
  `paths` (hub names or folders, one a training seed), `groups` by name with the estimate `value`,
  its interval `low` and `high` (None under two conversations) and `seeds` (each checkpoint's
  value), `end_bits` (bits an answer for ending it, None where no answer has a stop), `left_out`
  (answers that this model could not be given).
- `pairs`: `a`, `b`; `scope`: "seeds and samples", "this checkpoint only" where neither has several
  seeds, or whose seeds (pivot and sources have none); `seeds` (of a and b); `paired`: seed i with
  seed i; `groups` by name: `difference` (a minus b: below zero a is better) and `relative` (of
  b), each with `value`, `low`, `high`; `p`, `p_holm`, and `verdict`: better, worse or no difference
  shown (at 5 % of `p_holm`).
- `unfinished`: targets of the recipe that are not there yet.
- `method`: `level`, `resamples`, `seed`, `intervals`, `families`: what Holm's method corrects for.

Pairs: each target and each `--model` against the pivot and against the baseline `sft` where a model
has that name, and each `--model` against each target. Sources are shown, not tested. The p-values
of all pairs on `all` are one family; those of all pairs on all single groups are another.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusechat_distill.answers import Questions, answer, held_out_questions, read_questions
from fusechat_distill.bits import AnswerBits, answer_request
from fusechat_distill.bootstrap import RESAMPLES, Difference, Interval, Losses, bootstrap, holm
from fusechat_distill.errors import DistillError, RequestError
from fusechat_distill.files import write_json
from fusechat_distill.fusing import held_out
from fusechat_distill.inputs import Inputs, OpenModel, limits, rendering_problems
from fusechat_distill.models import PLACEMENT, open_checkpoint
from fusechat_distill.pipeline import NON_FINITE_SHARE, Progress, placement
from fusechat_distill.recipe import FOLDER_NAME, PIVOT
from fusechat_distill.store import Manifest, stale
from fusechat_distill.tokens import vocabulary
from fusechat_distill.training import train_stages

if TYPE_CHECKING:
    from fusechat_distill.conversations import Conversation
    from fusechat_distill.processes import Processes
    from fusechat_distill.scoring.transformers_engine import TransformersScorer

log = logging.getLogger(__name__)

FORMAT = 1

MEASURED = ANSWERED = 1
"""Counted up when the same inputs give other bits, other answers."""

GROUP_COLUMNS = ("group", "source", "domain")

MOST_GROUPS = 24
"""A column with more values than that is no grouping (an address of each row, say)."""

ALL = "all"

BASELINE = "sft"

LEVEL = 0.95

SEED = 0

BATCH = 64
"""Conversations that are rendered and scored at a time."""

INTERVALS = (
    "paired bootstrap over conversations; where a model has several training seeds, a t interval "
    "over these is put together with it (fusechat_distill.bootstrap)"
)
FAMILIES = "all pairs on `all`; all pairs on all single groups"

Role = Literal["pivot", "source", "target", "model"]


@dataclass(frozen=True, eq=False)
class Evaluated:
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
class Evaluation:
    """What is to be evaluated, checked."""

    inputs: Inputs
    models: tuple[Evaluated, ...]
    held_out: HeldOut
    unfinished: tuple[str, ...]
    questions: Questions | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path:
        return self.inputs.recipe.output_folder / "evaluation"


class Opening:
    """Finds what is to be evaluated, and every problem with it; `further` of `open_inputs`."""

    def __init__(
        self,
        asked: Sequence[str],
        *,
        generate: int | None = None,
        questions: str | None = None,
        trust_remote_code: bool = False,
    ):
        """
        Args:
            asked: NAME=PATH, as `--model` takes them.
            generate: how many questions are to be answered.
            questions: a file of these; None for held-out ones.
        """
        self._asked = asked
        self._generate = generate
        self._file = questions
        self._trust_remote_code = trust_remote_code
        self._questions: Questions | None = None
        self._models: list[Evaluated] = []
        self._unfinished: list[str] = []

    def __call__(self, inputs: Inputs) -> list[str]:
        for name, model in inputs.models.items():
            if model.files.weights:
                role: Role = "pivot" if name == PIVOT else "source"
                self._models.append(Evaluated(name, role, (model,)))
            else:
                log.warning("%s (%s): is left out, it has no weights", name, model.spec.model)
        return [
            *self._held_out_problems(inputs),
            *self._targets(inputs),
            *self._further(inputs),
            *self._questions_problems(),
        ]

    def evaluation(self, inputs: Inputs) -> Evaluation:
        """After it was called without a problem."""
        held = held_out_conversations(inputs)
        questions = self._questions
        if questions is None and self._generate is not None:
            questions = held_out_questions(held.conversations, held.groups, self._generate)
        return Evaluation(
            inputs,
            tuple(self._models),
            held,
            tuple(self._unfinished),
            questions,
            self._trust_remote_code,
        )

    def _questions_problems(self) -> Iterator[str]:
        if self._file is not None:
            try:
                self._questions = read_questions(Path(self._file), self._generate)
            except RequestError as error:
                yield f"--questions {error}"

    def _held_out_problems(self, inputs: Inputs) -> Iterator[str]:
        fraction, keys = inputs.recipe.dataset.eval_fraction, inputs.conversations.keys
        if not any(held_out(key, fraction) for key in keys):
            yield (
                f"dataset.eval_fraction: {fraction:g} holds out none of the {len(keys)} "
                "conversations, so that there is nothing to evaluate on; raise it, and train anew"
            )

    def _targets(self, inputs: Inputs) -> Iterator[str]:
        for stage in train_stages(inputs):
            if not (stage.folder / "manifest.json").exists():
                self._unfinished.append(stage.name)
                continue
            if problem := stale(stage.folder, stage.manifest()):
                yield f"target {stage.name}: {stage.folder} {problem}"
                continue
            name = f"target {stage.name}"
            opened = self._open(inputs, name, str(stage.folder))
            if isinstance(opened, OpenModel):
                self._models.append(Evaluated(name, "target", (opened,)))
            else:
                yield from opened

    def _further(self, inputs: Inputs) -> Iterator[str]:
        taken = {PIVOT, *(source.title for source in inputs.recipe.sources)}
        taken |= {stage.name for stage in train_stages(inputs)}
        found: dict[str, list[OpenModel]] = {}
        folders: dict[Path, str] = {}
        for asked in self._asked:
            name, given, path = asked.partition("=")
            where = f"--model {asked}"
            if not given or not FOLDER_NAME.fullmatch(name) or not path:
                yield (
                    f"{where}: should be NAME=PATH, the name of letters, digits and . _ + -, the "
                    "path a folder with a checkpoint"
                )
                continue
            if name in taken:
                yield f"{where}: the recipe has a model {name} already; give it another name"
                continue
            folder = Path(path).resolve()
            if folder in folders:
                yield f"{where}: is the same folder as --model {folders[folder]}; leave one out"
                continue
            folders[folder] = asked
            opened = self._open(inputs, where, path)
            if isinstance(opened, OpenModel):
                found.setdefault(name, []).append(opened)
            else:
                yield from opened
        self._models += [
            Evaluated(name, "model", tuple(checkpoints)) for name, checkpoints in found.items()
        ]

    def _open(self, inputs: Inputs, where: str, path: str) -> OpenModel | list[str]:
        """A checkpoint of the pivot's kind, or what is wrong with it."""
        from fusechat_distill.conversations import Renderer

        recipe, pivot = inputs.recipe, inputs.pivot
        spec = recipe.pivot.model_copy(update={"model": path, "revision": None})
        try:
            files = open_checkpoint(spec, trust_remote_code=self._trust_remote_code)
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
    """Whether a target, which says what it was made of, has seen rows that are held out here."""
    try:
        made_of = json.loads((folder / "fusechat_distill.json").read_text("utf-8"))["dataset"]
        path, fraction = made_of["path"], float(made_of["eval_fraction"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
    here = inputs.recipe.dataset
    if path != here.path or fraction >= here.eval_fraction:
        return []
    return [
        f"{where}: was trained with eval_fraction {fraction:g}, so on rows of the "
        f"{here.eval_fraction:g} that are held out here; train it anew, or lower "
        "dataset.eval_fraction"
    ]


def held_out_conversations(inputs: Inputs) -> HeldOut:
    """The rows that no target was trained on, and their groups."""
    conversations, fraction = inputs.conversations, inputs.recipe.dataset.eval_fraction
    rows = [i for i, key in enumerate(conversations.keys) if held_out(key, fraction)]
    first: dict[str, int] = {}
    for i in rows:
        first.setdefault(conversations.keys[i], i)
    column, groups = None, [ALL] * len(first)
    for name in GROUP_COLUMNS:
        labels = conversations.labels(name)
        if labels is None:
            continue
        of_rows = [labels[i] for i in first.values()]
        if ALL not in of_rows and len(set(of_rows)) <= MOST_GROUPS:
            column, groups = name, of_rows
            break
        log.warning("column %s: %d values, too many for groups", name, len(set(of_rows)))
    kept = [conversations[i] for i in first.values()]
    return HeldOut(kept, groups, column, len(rows) - len(first))


@dataclass(frozen=True, eq=False)
class Measured:
    """What one checkpoint needs for the held-out answers."""

    answers: dict[tuple[str, int], AnswerBits]
    """By conversation (key) and turn."""
    left_out: int = 0
    """Answers that the model could not be given."""


def measure(
    evaluation: Evaluation,
    model: OpenModel,
    title: str,
    scorer: Callable[[], TransformersScorer],
    progress: Progress,
) -> Measured:
    """One checkpoint's bits, from `evaluation/` where an earlier run has left them there.

    `scorer` gives the loaded model, where it is needed.
    """
    held = "\n".join(evaluation.held_out.rows)
    manifest = _manifest(evaluation, model, "bits", MEASURED, held)
    found = _kept(
        evaluation,
        manifest,
        lambda: _measured(evaluation, model, title, scorer(), progress),
    )
    columns = found["answers"]
    rows = zip(*(columns[name] for name in AnswerBits._fields), strict=True)
    answers = (AnswerBits(*row) for row in rows)
    return Measured(
        {(key, a.turn): a for key, a in zip(columns["key"], answers, strict=True)},
        found["left_out"],
    )


def answered(
    evaluation: Evaluation,
    model: OpenModel,
    title: str,
    scorer: Callable[[], TransformersScorer],
    progress: Progress,
) -> list[list[str] | None]:
    """One checkpoint's answers to the questions, or those that an earlier run has left."""
    questions = evaluation.questions
    assert questions is not None
    text = f"{questions.fingerprint} {questions.tokens}"
    manifest = _manifest(evaluation, model, "answers", ANSWERED, text)
    found: list[list[str] | None] = _kept(
        evaluation, manifest, lambda: answer(questions, model, title, scorer(), progress)
    )
    return found


def _kept(evaluation: Evaluation, manifest: Manifest, make: Callable[[], Any]) -> Any:
    """What was made under this manifest, from a file of its own, or made now."""
    path = evaluation.folder / f"{manifest.digest[:32]}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if Manifest.from_json(found["manifest"]).digest == manifest.digest:
            return found["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    content = make()
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"manifest": manifest.as_json(), "content": content})
    evaluation.inputs.digests.save()
    return content


def _manifest(
    evaluation: Evaluation, model: OpenModel, kind: str, version: int, texts: str
) -> Manifest:
    """What determines a checkpoint's bits or answers; `texts` is what it is given."""
    inputs = evaluation.inputs
    return Manifest(
        kind,
        len(evaluation.held_out.conversations),
        {
            "version": version,
            "model": model.files.identity(inputs.digests),
            "load": _load(evaluation, model),
            "dtype": model.spec.dtype or inputs.recipe.scoring.dtype,
            "renderer": model.renderer.fingerprint,
            "pivot_renderer": inputs.pivot.renderer.fingerprint,
            "max_length": inputs.recipe.max_length,
            "texts": hashlib.sha256(texts.encode()).hexdigest(),
        },
    )


def _load(evaluation: Evaluation, model: OpenModel, *, placed: bool = False) -> dict[str, Any]:
    """The model's `load`, where it is meant for transformers."""
    if evaluation.inputs.recipe.scoring.engine != "transformers":
        return {}
    return {k: v for k, v in model.spec.load.items() if placed or k not in PLACEMENT}


def load_scorer(
    evaluation: Evaluation, model: OpenModel, processes: Processes
) -> TransformersScorer:
    from fusechat_distill.scoring.transformers_engine import TransformersScorer

    scoring = evaluation.inputs.recipe.scoring
    return TransformersScorer.load(
        model.spec.model,
        model.files.token_ids,
        revision=model.spec.revision,
        dtype=model.spec.dtype or scoring.dtype,
        device=placement(scoring.device, processes),
        trust_remote_code=evaluation.trust_remote_code,
        load=_load(evaluation, model, placed=True),
        top_k=1,
        batch_tokens=scoring.batch_tokens,
    )


def _measured(
    evaluation: Evaluation,
    model: OpenModel,
    title: str,
    scorer: TransformersScorer,
    progress: Progress,
) -> dict[str, Any]:
    conversations = evaluation.held_out.conversations
    tokens = vocabulary(model.renderer.tokenizer)
    answers: dict[tuple[str, int], AnswerBits] = {}
    non_finite: list[int] = []
    progress.start(title, len(conversations))
    try:
        for start in range(0, len(conversations), BATCH):
            part = conversations[start : start + BATCH]
            rendered = [r for r, _ in evaluation.inputs.rendered(model, part)]
            asked = [
                (conversation, answer_request(conversation, rendering, tokens))
                for conversation, rendering in zip(part, rendered, strict=True)
                if rendering.responses
            ]
            scores = scorer.score([wanted.request for _, wanted in asked])
            for (conversation, wanted), found in zip(asked, scores, strict=True):
                if found.finite:
                    counted = wanted.count(found)
                    answers |= {(conversation.key, answer.turn): answer for answer in counted}
                else:
                    non_finite.append(conversation.row)
            progress.advance(len(part), sum(len(w.request.input_ids) for _, w in asked))
    finally:
        progress.stop()
    if len(non_finite) > NON_FINITE_SHARE * len(conversations):
        shown = ", ".join(map(str, non_finite[:20])) + (", ..." if len(non_finite) > 20 else "")
        raise DistillError(
            f"{title} ({model.spec.model}): NaN or Inf in its output for {len(non_finite)} of "
            f"{len(conversations)} conversations (rows {shown}); evaluate it in another dtype "
            "(`scoring.dtype: float32`), or check its weights"
        )
    columns: dict[str, list[Any]] = {"key": [], **{name: [] for name in AnswerBits._fields}}
    for (key, _), of_answer in answers.items():
        for name, value in zip(columns, (key, *of_answer), strict=True):
            columns[name].append(value)
    left_out = sum((c.key, turn) not in answers for c in conversations for turn in turns(c))
    return {"answers": columns, "left_out": left_out}


def turns(conversation: Conversation) -> list[int]:
    """The messages that are answers."""
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]


def evaluate(
    evaluation: Evaluation, processes: Processes, progress: Progress
) -> tuple[dict[str, Any], dict[str, list[list[str] | None]]]:
    """The content of `evaluation.json`, and each model's answers to the questions.

    Models that were not measured before are, one by one.
    """
    measured: dict[str, list[Measured]] = {}
    answers: dict[str, list[list[str] | None]] = {}
    for model in evaluation.models:
        measured[model.name] = []
        for i, checkpoint in enumerate(model.checkpoints):
            loaded = functools.cache(
                functools.partial(load_scorer, evaluation, checkpoint, processes)
            )
            several = f" ({i + 1} of {len(model.checkpoints)} seeds)"
            title = f"evaluate {model.name}" + (several if len(model.checkpoints) > 1 else "")
            measured[model.name].append(measure(evaluation, checkpoint, title, loaded, progress))
            if i == 0 and evaluation.questions is not None:
                title = f"answers of {model.name}"
                answers[model.name] = answered(evaluation, checkpoint, title, loaded, progress)
    return summary(evaluation, measured), answers


def summary(evaluation: Evaluation, measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Estimates, intervals and tests over the answers that all models were given."""
    held, recipe = evaluation.held_out, evaluation.inputs.recipe
    checkpoints = [one for several in measured.values() for one in several]
    common = set.intersection(*(set(one.answers) for one in checkpoints))
    if not common:
        raise DistillError(
            "there is no held-out answer that all models could be given; leave models out, or "
            "raise dataset.eval_fraction"
        )
    # In the rows' order, so that the same answers give the same sums.
    answers = sorted(common, key=lambda answer: (held.rows[answer[0]], answer[1]))
    rows, row_of = np.unique([held.rows[key] for key, _ in answers], return_inverse=True)
    losses = {
        name: Losses(
            np.stack([_sums(one, answers, row_of, "bits") for one in several]),
            _sums(several[0], answers, row_of, "num_bytes"),
        )
        for name, several in measured.items()
    }
    labels = np.array([held.groups[row] for row in rows])
    groups = {ALL: np.ones(len(rows), dtype=bool)}
    if held.column is not None:
        groups |= {label: labels == label for label in sorted(set(labels.tolist()))}
    pairs = compared(evaluation.models)
    found = {
        group: bootstrap(
            {name: of.part(chosen) for name, of in losses.items()}, pairs, level=LEVEL, seed=SEED
        )
        for group, chosen in groups.items()
    }
    pivot_bytes = losses[PIVOT].num_bytes
    return {
        "format": FORMAT,
        "unit": "bits per UTF-8 byte",
        "dataset": {
            "path": recipe.dataset.path,
            "eval_fraction": recipe.dataset.eval_fraction,
            "conversations": len(held.conversations),
            "copies": held.copies,
            "answers": sum(len(turns(c)) for c in held.conversations),
            "counted": len(answers),
            "bytes": int(pivot_bytes.sum()),
            "column": held.column,
        },
        "groups": {
            group: {
                "conversations": int(chosen.sum()),
                "bytes": int(pivot_bytes[chosen].sum()),
            }
            for group, chosen in groups.items()
        },
        "models": {
            model.name: {
                "role": model.role,
                "paths": [checkpoint.spec.model for checkpoint in model.checkpoints],
                "groups": {
                    group: _interval(found[group][0][model.name])
                    | {"seeds": losses[model.name].part(chosen).by_seed().tolist()}
                    for group, chosen in groups.items()
                },
                "end_bits": _end_bits(measured[model.name], answers),
                "left_out": max(one.left_out for one in measured[model.name]),
            }
            for model in evaluation.models
        },
        "pairs": _pairs(pairs, {group: differences for group, (_, differences) in found.items()}),
        "unfinished": list(evaluation.unfinished),
        "method": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
            "intervals": INTERVALS,
            "families": FAMILIES,
        },
    }


def compared(models: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """The pairs that are tested: what was made against what it is to be better than."""
    targets = [model.name for model in models if model.role == "target"]
    further = [model.name for model in models if model.role == "model"]
    baselines = [name for name in (BASELINE, f"target {BASELINE}") if name in targets + further]
    pairs = []
    for name in [*targets, *further]:
        others = [PIVOT, *baselines]
        if name in further and name not in baselines:
            others += [target for target in targets if target not in baselines]
        pairs += [(name, other) for other in others if other != name]
    return pairs


def _sums(
    measured: Measured, answers: Sequence[tuple[str, int]], rows: Any, what: str
) -> np.ndarray:
    """What the answers of each conversation add up to."""
    values = np.array([getattr(measured.answers[answer], what) for answer in answers], float)
    return np.bincount(rows, weights=values)


def _end_bits(several: Sequence[Measured], answers: Sequence[tuple[str, int]]) -> float | None:
    ends = [one.answers[answer].end_bits for one in several for answer in answers]
    known = [bits for bits in ends if bits is not None]
    return float(np.mean(known)) if known else None


def _pairs(
    pairs: Sequence[tuple[str, str]],
    found: Mapping[str, Mapping[tuple[str, str], Difference]],
) -> list[dict[str, Any]]:
    adjusted: dict[tuple[str, tuple[str, str]], float] = {}
    for family in ([ALL], [group for group in found if group != ALL]):
        tests = [(group, pair) for group in family for pair in pairs]
        known = {test: p for test in tests if (p := found[test[0]][test[1]].p) is not None}
        adjusted |= dict(zip(known, holm(list(known.values())), strict=True))
    entries = []
    for pair in pairs:
        difference = found[ALL][pair]
        entries.append(
            {
                "a": pair[0],
                "b": pair[1],
                "scope": _scope(pair, difference.seeds),
                "seeds": list(difference.seeds),
                "paired": difference.paired,
                "groups": {
                    group: {
                        "difference": _interval(of[pair].absolute),
                        "relative": _interval(of[pair].relative),
                        "p": of[pair].p,
                        "p_holm": adjusted.get((group, pair)),
                        "verdict": _verdict(of[pair], adjusted.get((group, pair))),
                    }
                    for group, of in found.items()
                },
            }
        )
    return entries


def _scope(pair: tuple[str, str], seeds: tuple[int, int]) -> str:
    """What an interval holds for: pivot and sources are what they are, all else was trained."""
    trained = dict(zip(pair, seeds, strict=True))
    trained.pop(PIVOT, None)
    several = [name for name, count in trained.items() if count > 1]
    if len(several) == len(trained):
        return "seeds and samples"
    (one, *_) = (name for name in trained if name not in several)
    return f"seeds of {several[0]}, this checkpoint of {one}" if several else "this checkpoint only"


def _verdict(difference: Difference, p: float | None) -> str:
    if p is None or p >= 1 - LEVEL:
        return "no difference shown"
    return "better" if difference.absolute.value < 0 else "worse"


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
