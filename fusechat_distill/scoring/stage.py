"""The score stage: what one model thinks of every answer, shard by shard."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat_common.errors import FusechatError
from fusechat_common.files import no_link
from fusechat_distill.inputs.open import Inputs, OpenModel
from fusechat_distill.scoring.engine import Request, Scorer, Scores, checked_scores
from fusechat_distill.storage.shards import (
    SampleRange,
    ScoredResponse,
    ScoredSample,
    Shards,
    scores_table,
)
from fusechat_distill.storage.stage import Progress, Stage, StageStatus

if TYPE_CHECKING:
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.text.conversations import Conversation, Rendering

log = logging.getLogger(__name__)

NON_FINITE_SHARE = 0.01
"""Share of samples with NaN or Inf from which on a model's scores are no use."""


class ScoreStage:
    """A model's scores of every conversation, in `scores/<name>/`."""

    stage = "score"

    def __init__(self, inputs: Inputs, model: OpenModel, *, trust_remote_code: bool = False):
        self.inputs = inputs
        self.model = model
        self.name = model.name
        self.folder = inputs.scores_folder(model)
        self._trust_remote_code = trust_remote_code

    def problems(self) -> list[str]:
        return []  # `open_inputs` has compared the stores already

    def status(self) -> StageStatus:
        return score_status(self.name, Shards(self.folder, self.inputs.scores_manifest(self.model)))

    def run(self, processes: Processes, progress: Progress) -> StageStatus:
        with contextlib.ExitStack() as stack:

            def prepare() -> tuple[Shards, list[SampleRange]]:
                shards = Shards.create(self.folder, self.inputs.scores_manifest(self.model))
                self.inputs.digests.save()
                stack.enter_context(shards.exclusive())
                for line in shards.clean():
                    log.warning("%s", line)
                missing = shards.missing()
                if missing and not self.model.files.weights:
                    raise FusechatError(
                        f"{self.name} ({self.model.spec.model}): has no weights to make the scores "
                        f"that are missing with ({_listed(missing)}); copy the one or the other"
                    )
                return shards, missing

            shards, missing = processes.first(prepare)
            mine = missing[processes.index :: processes.count]
            if mine:
                self._score(shards, mine, processes, progress)
            processes.wait()
            return processes.first(lambda: self._finish(shards))

    def _score(
        self,
        shards: Shards,
        ranges: Sequence[SampleRange],
        processes: Processes,
        progress: Progress,
    ) -> None:
        try:
            scorer = self._scorer(processes)
        except (ImportError, OSError, TypeError, ValueError) as error:
            raise FusechatError(
                f"{self.name} ({self.model.spec.model}): can't be loaded, check its `load` and its "
                f"weights: {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        total = shards.manifest.samples
        non_finite = 0
        mine = sum(samples.stop - samples.start for samples in ranges)
        progress.start(f"{self.stage} {self.name}", mine)
        try:
            for samples, conversations, renderings in self._rendered(ranges):
                started = time.perf_counter()
                table, summary = self._shard(scorer, samples, conversations, renderings)
                shards.write(samples, table, summary)
                seconds = time.perf_counter() - started
                self._note(samples, summary["input_tokens"], seconds, processes)
                progress.advance(samples.stop - samples.start, summary["input_tokens"])
                non_finite += len(summary["non_finite"])
                if non_finite > NON_FINITE_SHARE * total:
                    break  # `_finish` counts over all processes and says so
        finally:
            progress.stop()

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

    def _rendered(
        self, ranges: Sequence[SampleRange]
    ) -> Iterator[tuple[SampleRange, list[Conversation], list[tuple[Rendering, bool]]]]:
        """The ranges' conversations; the next ones are rendered while these are scored."""

        def work(samples: SampleRange) -> Any:
            conversations = self.inputs.conversations[samples.start : samples.stop]
            return samples, conversations, self.inputs.rendered(self.model, conversations)

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(work, ranges[0])
            for following in [*ranges[1:], None]:
                ready = ahead.result()
                if following is not None:
                    ahead = pool.submit(work, following)
                yield ready

    def _shard(
        self,
        scorer: Scorer,
        samples: SampleRange,
        conversations: Sequence[Conversation],
        renderings: Sequence[tuple[Rendering, bool]],
    ) -> tuple[Any, dict[str, Any]]:
        left_out: list[tuple[int, str]] = []
        skipped: Counter[str] = Counter()
        scorable = []
        for conversation, (rendering, _) in zip(conversations, renderings, strict=True):
            skipped.update(turn.reason for turn in rendering.skipped)
            if rendering.responses:
                scorable.append((conversation, rendering))
            else:
                left_out.append((conversation.row, _why_nothing(rendering)))
        requests = [Request(r.input_ids, _positions(r)) for _, r in scorable]
        scored: list[ScoredSample] = []
        non_finite: list[int] = []
        found = checked_scores(scorer, requests, self.inputs.recipe.scoring.top_k)
        for (conversation, rendering), scores in zip(scorable, found, strict=True):
            if scores.finite:
                scored.append(_scored_sample(conversation, rendering, scores))
            else:
                non_finite.append(conversation.row)
                log.warning("%s: NaN or Inf at row %d; left out", self.name, conversation.row)
        responses = [response for sample in scored for response in sample.responses]
        summary = {
            "samples": len(scored),
            "response_tokens": sum(len(response.tokens) for response in responses),
            "response_bytes": sum(response.end - response.begin for response in responses),
            "input_tokens": sum(len(request.input_ids) for request in requests),
            "cut": sum(cut for _, cut in renderings),
            "system_folded": sum(rendering.system_folded for rendering, _ in renderings),
            "turns_skipped": dict(sorted(skipped.items())),
            "left_out": left_out,
            "non_finite": non_finite,
        }
        return scores_table(scored), summary

    def _note(
        self, samples: SampleRange, tokens: int, seconds: float, processes: Processes
    ) -> None:
        """Append to the log of rates, which is no part of the content."""
        entry = {
            "samples": list(samples),
            "input_tokens": tokens,
            "seconds": round(seconds, 3),
            "process": processes.index,
        }
        with open(self.folder / "log.jsonl", "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(entry) + "\n")

    def _finish(self, shards: Shards) -> StageStatus:
        status = score_status(self.name, shards)
        rows = status.details["non_finite"]
        total = shards.manifest.samples
        if len(rows) > NON_FINITE_SHARE * total:
            shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
            raise FusechatError(
                f"{self.name} ({self.model.spec.model}): NaN or Inf in its output for "
                f"{len(rows)} of {total} samples, more than {NON_FINITE_SHARE:.0%} (rows {shown}); "
                f"score it in another dtype (`dtype: float32`) after deleting {self.folder}, or "
                "check its weights"
            )
        return status


def score_status(name: str, shards: Shards) -> StageStatus:
    """What the shards that are there add up to, from their footers."""
    details: dict[str, Any] = {
        "samples": 0,
        "response_tokens": 0,
        "response_bytes": 0,
        "input_tokens": 0,
        "cut": 0,
        "system_folded": 0,
        "turns_skipped": {},
        "left_out": [],
        "non_finite": [],
    }
    present = shards.present()
    for samples in present:
        summary = shards.summary(samples)
        for key, value in summary.items():
            if isinstance(value, dict):
                details[key] = dict(Counter(details[key]) + Counter(value))
            else:
                details[key] += value
    return StageStatus(
        stage="score",
        name=name,
        done=sum(samples.stop - samples.start for samples in present),
        total=shards.manifest.samples,
        bytes=sum(shards.path(samples).stat().st_size for samples in present),
        tokens_per_second=_rate(shards),
        details=details,
    )


def _rate(shards: Shards) -> float | None:
    try:
        lines = (shards.folder / "log.jsonl").read_text("utf-8").splitlines()
    except OSError:
        return None
    tokens = seconds = 0.0
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):  # a line that a stopped run tore
            entry = json.loads(line)
            tokens += entry["input_tokens"]
            seconds += entry["seconds"]
    return tokens / seconds if seconds else None


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


def _listed(ranges: Sequence[SampleRange]) -> str:
    names = ", ".join(samples.file_name for samples in ranges[:3])
    return names + (f" and {len(ranges) - 3} more" if len(ranges) > 3 else "")


def _positions(rendering: Rendering) -> Any:
    """The states before each response token, over all responses."""
    return np.concatenate(
        [np.arange(r.states().start, r.states().stop) for r in rendering.responses]
    )


def _why_nothing(rendering: Rendering) -> str:
    if rendering.problem:
        return rendering.problem
    if rendering.skipped:
        return rendering.skipped[0].reason
    return "no answer within max_length"


def _scored_sample(
    conversation: Conversation, rendering: Rendering, scores: Scores
) -> ScoredSample:
    responses = []
    at = 0
    for response in rendering.responses:
        part = slice(at, at + len(response.ends))
        at = part.stop
        responses.append(
            ScoredResponse(
                turn=response.turn,
                begin=response.begin,
                end=response.end,
                first=response.first,
                pending=response.pending,
                stop=response.stop,
                tokens=rendering.input_ids[response.tokens()].astype(np.uint32),
                ends=response.ends,
                ids=scores.ids[part],
                logprobs=scores.logprobs[part].astype(np.float16),
                gold_logprobs=scores.gold_logprobs[part],
            )
        )
    return ScoredSample(conversation.key, conversation.row, tuple(responses))
