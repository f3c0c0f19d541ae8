"""One checkpoint's bits for the held-out answers, and its own answers to questions.

Each is kept in a file, which later runs read instead of loading the checkpoint again.
"""

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
from fusechat_distill.evaluation.candidates import EvaluationPlan
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

BITS_VERSION, ANSWERS_VERSION = 2, 1
"""Counted up when the same inputs give other bits, other answers, or another file of them."""

BATCH = 64
"""Conversations that are rendered and scored at a time."""


@dataclass(frozen=True, eq=False)
class CheckpointBits:
    """Bits that one checkpoint needs for the held-out answers."""

    answers: dict[tuple[str, int], AnswerBits]
    """By conversation (key) and turn."""
    left_out: int = 0
    """Answers that the model could not score."""


def checkpoint_bits(
    plan: EvaluationPlan,
    model: OpenModel,
    title: str,
    scorer: Callable[[], TransformersScorer],
    progress: Progress,
) -> CheckpointBits:
    """One checkpoint's bits, read from `evaluation/` if an earlier run computed them.

    Args:
        title: of the progress bar.
        scorer: loads the model; called only if it is needed.

    Raises:
        FusechatError: its output holds NaN or Inf.
    """
    texts = "\n".join(plan.held_out.rows)
    manifest = _manifest(plan, model, "bits", BITS_VERSION, texts)
    content = _cached(plan, manifest, lambda: _bits(plan, model, title, scorer(), progress))
    rows = ((key, AnswerBits(*fields)) for key, *fields in content["answers"])
    return CheckpointBits({(key, bits.turn): bits for key, bits in rows}, content["left_out"])


def checkpoint_answers(
    plan: EvaluationPlan,
    model: OpenModel,
    title: str,
    scorer: Callable[[], TransformersScorer],
    progress: Progress,
) -> list[list[str] | None]:
    """One checkpoint's answers to the questions, read if an earlier run computed them.

    The arguments are those of `checkpoint_bits`, the result that of `answer`.
    """
    questions = plan.questions
    assert questions is not None
    text = f"{questions.fingerprint} {questions.tokens}"
    manifest = _manifest(plan, model, "answers", ANSWERS_VERSION, text)
    answers: list[list[str] | None] = _cached(
        plan, manifest, lambda: answer(questions, model, title, scorer(), progress)
    )
    return answers


def _cached(plan: EvaluationPlan, manifest: Manifest, make: Callable[[], Any]) -> Any:
    """The content with this manifest, read from its file, or computed and written now."""
    path = plan.folder / f"{manifest.digest[:32]}.json"
    try:
        file = json.loads(path.read_text("utf-8"))
        if Manifest.from_json(file["manifest"]).digest == manifest.digest:
            return file["content"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    content = make()
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"manifest": manifest.as_json(), "content": content})
    plan.inputs.digests.save()
    return content


def _manifest(
    plan: EvaluationPlan, model: OpenModel, kind: str, version: int, texts: str
) -> Manifest:
    """What determines a checkpoint's bits or answers; `texts` is its input."""
    inputs = plan.inputs
    return Manifest(
        kind,
        len(plan.held_out.conversations),
        {
            "version": version,
            "model": model.files.identity(inputs.digests),
            "load": _load(plan, model),
            "dtype": model.spec.dtype or inputs.recipe.scoring.dtype,
            "renderer": model.renderer.fingerprint,
            "pivot_renderer": inputs.pivot.renderer.fingerprint,
            "max_length": inputs.recipe.max_length,
            "texts": hashlib.sha256(texts.encode()).hexdigest(),
        },
    )


def _load(plan: EvaluationPlan, model: OpenModel, *, placed: bool = False) -> dict[str, Any]:
    """The model's `load`, where it is meant for transformers."""
    if plan.inputs.recipe.scoring.engine != "transformers":
        return {}  # pragma: no cover (vLLM)
    return {k: v for k, v in model.spec.load.items() if placed or k not in PLACEMENT}


def load_scorer(plan: EvaluationPlan, model: OpenModel, processes: Processes) -> TransformersScorer:
    from fusechat_distill.scoring.transformers_engine import TransformersScorer

    scoring = plan.inputs.recipe.scoring
    return TransformersScorer.load(
        model.spec.model,
        model.files.token_ids,
        revision=model.files.commit,
        dtype=model.spec.dtype or scoring.dtype,
        device=placement(scoring.device, processes),
        trust_remote_code=plan.trust_remote_code,
        load=_load(plan, model, placed=True),
        top_k=1,
        batch_tokens=scoring.batch_tokens,
    )


def _bits(
    plan: EvaluationPlan,
    model: OpenModel,
    title: str,
    scorer: TransformersScorer,
    progress: Progress,
) -> dict[str, Any]:
    conversations = plan.held_out.conversations
    tokens = vocabulary(model.renderer.tokenizer)
    answers: dict[tuple[str, int], AnswerBits] = {}
    non_finite: list[int] = []
    progress.start(title, len(conversations))
    try:
        for start in range(0, len(conversations), BATCH):
            part = conversations[start : start + BATCH]
            rendered = plan.inputs.rendered(model, part)
            requests = [
                (conversation, answer_request(conversation, rendering, tokens))
                for conversation, (rendering, _) in zip(part, rendered, strict=True)
                if rendering.responses
            ]
            scores = scorer.score([request.request for _, request in requests])
            for (conversation, request), scored in zip(requests, scores, strict=True):
                if scored.finite:
                    answers |= {(conversation.key, a.turn): a for a in request.count(scored)}
                else:
                    non_finite.append(conversation.row)
            progress.advance(len(part), sum(len(r.request.input_ids) for _, r in requests))
    finally:
        progress.stop()
    if len(non_finite) > NON_FINITE_SHARE * len(conversations):
        shown = ", ".join(map(str, non_finite[:20])) + (", ..." if len(non_finite) > 20 else "")
        raise FusechatError(
            f"{title} ({model.spec.model}): NaN or Inf in its output for {len(non_finite)} of "
            f"{len(conversations)} conversations (rows {shown}); evaluate it in another dtype "
            "(`scoring.dtype: float32`), or check its weights"
        )
    left_out = sum((c.key, turn) not in answers for c in conversations for turn in answer_turns(c))
    return {"answers": [[key, *bits] for (key, _), bits in answers.items()], "left_out": left_out}


def answer_turns(conversation: Conversation) -> list[int]:
    """The messages that are answers."""
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
