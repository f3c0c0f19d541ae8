"""What one checkpoint needs for the held-out answers, and its own answers; kept for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import FusechatError
from fusechat_common.files import write_json
from fusechat_distill.evaluation.answers import answer
from fusechat_distill.evaluation.bits import AnswerBits, answer_request
from fusechat_distill.evaluation.candidates import Evaluation
from fusechat_distill.inputs.models import PLACEMENT
from fusechat_distill.inputs.open import OpenModel
from fusechat_distill.scoring.stage import NON_FINITE_SHARE, placement
from fusechat_distill.storage.shards import Manifest
from fusechat_distill.storage.stage import Progress
from fusechat_distill.text.tokens import vocabulary

if TYPE_CHECKING:
    from fusechat_distill.scoring.transformers_engine import TransformersScorer
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.text.conversations import Conversation

MEASURED = ANSWERED = 1
"""Counted up when the same inputs give other bits, other answers."""

BATCH = 64
"""Conversations that are rendered and scored at a time."""


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
        return {}  # pragma: no cover (vLLM)
    return {k: v for k, v in model.spec.load.items() if placed or k not in PLACEMENT}


def load_scorer(
    evaluation: Evaluation, model: OpenModel, processes: Processes
) -> TransformersScorer:
    from fusechat_distill.scoring.transformers_engine import TransformersScorer

    scoring = evaluation.inputs.recipe.scoring
    return TransformersScorer.load(
        model.spec.model,
        model.files.token_ids,
        revision=model.files.commit,
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
        raise FusechatError(
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
