"""One checkpoint's bits for the held-out answers, and its own answers to questions.

Each is kept in a file, which later runs read instead of loading the checkpoint again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import FusechatError
from fusechat_common.files import write_json
from fusechat_distill.evaluation.answers import answer
from fusechat_distill.evaluation.bits import AnswerBits, answer_request
from fusechat_distill.evaluation.candidates import EvaluationPlan
from fusechat_distill.inputs.models import PLACEMENT
from fusechat_distill.inputs.open import OpenModel
from fusechat_distill.scoring.stage import NON_FINITE_SHARE, listed_rows, placement
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


@dataclass(eq=False)
class CheckpointEvaluation:
    """One checkpoint's results, read from `evaluation/` if an earlier run computed them.

    The weights are loaded for the first result that is missing. `title` is the progress bar's.
    """

    plan: EvaluationPlan
    model: OpenModel
    processes: Processes
    progress: Progress

    def bits(self, title: str) -> CheckpointBits:
        """The bits for the held-out answers.

        Raises:
            FusechatError: the model's output holds NaN or Inf.
        """
        manifest = self._manifest("bits", BITS_VERSION, "\n".join(self.plan.held_out.rows))
        content = self._cached(manifest, lambda: self._bits(title))
        rows = ((key, AnswerBits(*fields)) for key, *fields in content["answers"])
        return CheckpointBits({(key, bits.turn): bits for key, bits in rows}, content["left_out"])

    def answers(self, title: str) -> list[list[str] | None]:
        """The answers to the plan's questions, as `answer` returns them."""
        questions = self.plan.questions
        assert questions is not None
        text = f"{questions.fingerprint} {questions.tokens}"
        manifest = self._manifest("answers", ANSWERS_VERSION, text)
        answers: list[list[str] | None] = self._cached(
            manifest, lambda: answer(questions, self.model, title, self._scorer, self.progress)
        )
        return answers

    def _cached(self, manifest: Manifest, compute: Callable[[], Any]) -> Any:
        """The content with this manifest, read from its file, or computed and written now."""
        path = self.plan.folder / f"{manifest.digest[:32]}.json"
        try:
            file = json.loads(path.read_text("utf-8"))
            if Manifest.from_json(file["manifest"]).digest == manifest.digest:
                return file["content"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        content = compute()
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"manifest": manifest.as_json(), "content": content})
        self.plan.inputs.digests.save()
        return content

    def _manifest(self, kind: str, version: int, texts: str) -> Manifest:
        """What determines the bits or answers; `texts` is the checkpoint's input."""
        inputs, model = self.plan.inputs, self.model
        load = {k: v for k, v in load_options(self.plan, model).items() if k not in PLACEMENT}
        fingerprint = {
            "version": version,
            "model": model.files.identity(inputs.digests),
            "load": load,
            "dtype": model.spec.dtype or inputs.recipe.scoring.dtype,
            "renderer": model.renderer.fingerprint,
            "pivot_renderer": inputs.pivot.renderer.fingerprint,
            "max_length": inputs.recipe.max_length,
            "texts": hashlib.sha256(texts.encode()).hexdigest(),
        }
        return Manifest(kind, len(self.plan.held_out.conversations), fingerprint)

    @cached_property
    def _scorer(self) -> TransformersScorer:
        return load_scorer(self.plan, self.model, self.processes)

    def _bits(self, title: str) -> dict[str, Any]:
        model, scorer, progress = self.model, self._scorer, self.progress
        conversations = self.plan.held_out.conversations
        tokens = vocabulary(model.renderer.tokenizer)
        answers: dict[tuple[str, int], AnswerBits] = {}
        non_finite: list[int] = []
        progress.start(title, len(conversations))
        try:
            for start in range(0, len(conversations), BATCH):
                part = conversations[start : start + BATCH]
                rendered = self.plan.inputs.rendered(model, part)
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
            raise FusechatError(
                f"{title} ({model.spec.model}): NaN or Inf in its output for {len(non_finite)} of "
                f"{len(conversations)} conversations ({listed_rows(non_finite)}); evaluate it in "
                "another dtype (`scoring.dtype: float32`), or check its weights"
            )
        turns = [(c.key, turn) for c in conversations for turn in answer_turns(c)]
        return {
            "answers": [[key, *bits] for (key, _), bits in answers.items()],
            "left_out": sum(turn not in answers for turn in turns),
        }


def load_options(plan: EvaluationPlan, model: OpenModel) -> dict[str, Any]:
    """The model's `load`, where it is meant for transformers."""
    return model.spec.load if plan.inputs.recipe.scoring.engine == "transformers" else {}


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
        load=load_options(plan, model),
        top_k=1,
        batch_tokens=scoring.batch_tokens,
    )


def answer_turns(conversation: Conversation) -> list[int]:
    """The messages that are answers."""
    return [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
