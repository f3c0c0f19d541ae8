"""The score stage: one model's distributions over every answer, shard by shard."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from fusechat_common.errors import FusechatError
from fusechat_distill.inputs.open import Inputs, OpenModel
from fusechat_distill.scoring.engine import Request, Scorer, Scores, checked_scores
from fusechat_distill.storage.shards import Manifest, SampleRange, scores_table
from fusechat_distill.storage.stage import ShardedStage, Stage, StageStatus, Summary
from fusechat_distill.text.scored import ScoredResponse, ScoredSample

if TYPE_CHECKING:
    import pyarrow as pa

    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.text.conversations import Conversation, Rendering

    Rendered = tuple[list[Conversation], list[tuple[Rendering, bool]]]

log = logging.getLogger(__name__)

NON_FINITE_SHARE = 0.01
"""With a larger share of samples with NaN or Inf a model's scores are refused."""


class ScoreSummary(Summary):
    """The samples of a model that were scored, cut or left out."""

    samples: int = 0
    """Those that were scored."""
    response_tokens: int = 0
    response_bytes: int = 0
    input_tokens: int = 0
    cut: int = 0
    """Samples cut at `max_length`."""
    system_folded: int = 0
    """Samples whose system prompt stands in the first user message."""
    turns_skipped: dict[str, int] = Field(default_factory=dict)
    """Answers that are context only, by reason."""
    left_out: list[tuple[int, str]] = Field(default_factory=list)
    """Rows without an answer to score, and why."""
    non_finite: list[int] = Field(default_factory=list)
    """Rows left out because of NaN or Inf in the model's output."""

    @property
    def tokens_processed(self) -> int:
        return self.input_tokens


@dataclass(frozen=True, eq=False)
class ScoreContext:
    """A loaded model, and the conversations that are rendered while it scores others."""

    scorer: Scorer
    pool: ThreadPoolExecutor
    """One thread, because tokenizers can't be shared by several."""
    rendered: dict[SampleRange, Future[Rendered]] = field(default_factory=dict)


class ScoreStage(ShardedStage[ScoreSummary, ScoreContext]):
    """A model's scores of every conversation, in `scores/<name>/`."""

    stage = "score"
    summary = ScoreSummary
    timed = True

    def __init__(self, inputs: Inputs, model: OpenModel, *, trust_remote_code: bool = False):
        self.inputs = inputs
        self.model = model
        self.name = model.name
        self.folder = inputs.scores_folder(model)
        self._trust_remote_code = trust_remote_code

    def manifest(self) -> Manifest:
        return self.inputs.scores_manifest(self.model)

    def problems(self) -> list[str]:
        return []  # `open_inputs` has compared the manifests already

    def prepare(self, missing: Sequence[SampleRange]) -> None:
        self.inputs.digests.save()
        if missing and not self.model.files.weights:
            raise FusechatError(
                f"{self.name} ({self.model.spec.model}): has no weights to compute the missing "
                f"scores with ({_listed(missing)}); copy the weights or these files"
            )

    @contextlib.contextmanager
    def open(self, processes: Processes) -> Iterator[ScoreContext]:
        try:
            scorer = self._scorer(processes)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise FusechatError(
                f"{self.name} ({self.model.spec.model}): can't be loaded, check its `load` and its "
                f"weights: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        with ThreadPoolExecutor(1) as pool:
            yield ScoreContext(scorer, pool)

    def read_ahead(self, context: ScoreContext, ranges: Sequence[SampleRange]) -> None:
        for samples in ranges:
            if samples not in context.rendered:
                context.rendered[samples] = context.pool.submit(self._rendered, samples)

    def make(self, context: ScoreContext, samples: SampleRange) -> tuple[pa.Table, ScoreSummary]:
        self.read_ahead(context, [samples])
        conversations, renderings = context.rendered.pop(samples).result()
        left_out: list[tuple[int, str]] = []
        skipped: Counter[str] = Counter()
        scorable = []
        for conversation, (rendering, _) in zip(conversations, renderings, strict=True):
            skipped.update(turn.reason for turn in rendering.skipped)
            if rendering.responses:
                scorable.append((conversation, rendering))
            else:
                why = rendering.why_nothing or "no answer within max_length"
                left_out.append((conversation.row, why))
        requests = [Request(r.input_ids, r.positions()) for _, r in scorable]
        scored: list[ScoredSample] = []
        non_finite: list[int] = []
        results = checked_scores(context.scorer, requests, self.inputs.recipe.scoring.top_k)
        for (conversation, rendering), scores in zip(scorable, results, strict=True):
            if scores.finite:
                scored.append(_scored_sample(conversation, rendering, scores))
            else:
                non_finite.append(conversation.row)
                log.warning("%s: NaN or Inf at row %d; left out", self.name, conversation.row)
        responses = [response for sample in scored for response in sample.responses]
        return scores_table(scored), ScoreSummary(
            samples=len(scored),
            response_tokens=sum(len(response.tokens) for response in responses),
            response_bytes=sum(response.end - response.begin for response in responses),
            input_tokens=sum(len(request.input_ids) for request in requests),
            cut=sum(cut for _, cut in renderings),
            system_folded=sum(rendering.system_folded for rendering, _ in renderings),
            turns_skipped=dict(sorted(skipped.items())),
            left_out=left_out,
            non_finite=non_finite,
        )

    def hopeless(self, made: ScoreSummary) -> bool:
        return len(made.non_finite) > NON_FINITE_SHARE * len(self.inputs.conversations)

    def finish(self, status: StageStatus[ScoreSummary]) -> StageStatus[ScoreSummary]:
        # The sum over all processes; each stops early by its own shards.
        if self.hopeless(status.details):
            rows = status.details.non_finite
            raise FusechatError(
                f"{self.name} ({self.model.spec.model}): NaN or Inf in its output for "
                f"{len(rows)} of {status.total} samples, more than {NON_FINITE_SHARE:.0%} "
                f"({listed_rows(rows)}); score it in another dtype (`dtype: float32`) after "
                f"deleting {self.folder}, or check its weights"
            )
        return status

    def _scorer(self, processes: Processes) -> Scorer:
        scoring, spec = self.inputs.recipe.scoring, self.model.spec
        options: dict[str, Any] = {
            "revision": self.model.files.commit,
            "dtype": spec.dtype or scoring.dtype,
            "trust_remote_code": self._trust_remote_code,
            "load": spec.load,
            "top_k": scoring.top_k,
        }
        if scoring.engine == "vllm":
            from fusechat_distill.scoring.vllm_engine import VLLMScorer

            if processes.count > 1:
                raise FusechatError(
                    "scoring.engine: vllm spreads a model over devices itself; start it without "
                    "`accelerate launch`, with `load: {tensor_parallel_size: N}`"
                )
            return VLLMScorer.load(  # pragma: no cover (vLLM)
                spec.model, self.model.files.token_ids, max_length=self._longest(), **options
            )
        from fusechat_distill.scoring.transformers_engine import TransformersScorer

        return TransformersScorer.load(
            spec.model,
            self.model.files.token_ids,
            device=placement(scoring.device, processes),
            batch_tokens=scoring.batch_tokens,
            **options,
        )

    def _longest(self) -> int | None:  # pragma: no cover (vLLM)
        config = self.model.files.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def _rendered(self, samples: SampleRange) -> Rendered:
        conversations = self.inputs.conversations[samples.start : samples.stop]
        return conversations, self.inputs.rendered(self.model, conversations)


def score_stages(
    inputs: Inputs, names: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> list[Stage]:
    """The score stages of the recipe's models, or of those named."""
    return [
        ScoreStage(inputs, model, trust_remote_code=trust_remote_code)
        for name, model in inputs.models.items()
        if names is None or name in names
    ]


def placement(device: str, processes: Processes) -> str:
    """A torch device, or "spread" for one process with several devices."""
    if device not in ("auto", "cuda"):
        return device
    import torch

    if processes.count == 1 and torch.cuda.device_count() > 1:
        return "spread"  # pragma: no cover (several accelerators)
    return processes.device


def listed_rows(rows: Sequence[int]) -> str:
    """`rows ...`, the first twenty of them."""
    return f"rows {', '.join(map(str, rows[:20]))}" + ", ..." * (len(rows) > 20)


def _listed(ranges: Sequence[SampleRange]) -> str:
    names = ", ".join(samples.file_name for samples in ranges[:3])
    return names + (f" and {len(ranges) - 3} more" if len(ranges) > 3 else "")


def _scored_sample(
    conversation: Conversation, rendering: Rendering, scores: Scores
) -> ScoredSample:
    responses = []
    at = 0
    for response in rendering.responses:
        part = slice(at, at + len(response.ends))
        at = part.stop
        arrays: dict[str, Any] = {
            "tokens": rendering.input_ids[response.token_slice()].astype(np.uint32),
            "ids": scores.ids[part],
            "logprobs": scores.logprobs[part].astype(np.float16),
            "gold_logprobs": scores.gold_logprobs[part],
        }
        responses.append(ScoredResponse(**vars(response), **arrays))
    return ScoredSample(conversation.key, conversation.row, tuple(responses))
