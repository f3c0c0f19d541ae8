"""The vLLM engine: `prompt_logprobs` of a forward without generation.

Written for vLLM's documented API (`LLM`, `SamplingParams.prompt_logprobs`, `RequestOutput`) and
not yet run: no machine with vLLM was available. `scores_from_prompt_logprobs`, which converts its
output, is tested without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fusechat_common.errors import FusechatError
from fusechat_distill.scoring.engine import Request, Scores

PADDING_MARGIN = 8
"""Entries asked for beyond k, for padding ids that vLLM does not leave out."""


class Logprob(Protocol):
    """The part of vLLM's `Logprob` that is read."""

    logprob: float


class VLLMScorer:  # pragma: no cover (vLLM)
    """Scores with a `vllm.LLM`. Not yet run.

    vLLM normalises over all rows of the padded head. If a model gives probability to padding, the
    log-probabilities are lower than the transformers engine's by that much.
    """

    def __init__(self, llm: Any, token_ids: Iterable[int], *, top_k: int = 10):
        self.llm = llm
        self.token_ids = frozenset(token_ids)
        self.top_k = top_k

    @classmethod
    def load(
        cls,
        model: str,
        token_ids: Iterable[int],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
        load: Mapping[str, Any] | None = None,
        top_k: int = 10,
    ) -> VLLMScorer:
        """Load `model`; `load` is passed to `vllm.LLM` unchanged (`tensor_parallel_size`, ...)."""
        from vllm import LLM

        options: dict[str, Any] = {
            "max_logprobs": top_k + PADDING_MARGIN,
            "max_model_len": max_length,
            "enable_prefix_caching": False,
            "load_format": "safetensors",
        }
        llm = LLM(
            model=model,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **(options | dict(load or {})),
        )
        return cls(llm, token_ids, top_k=top_k)

    def score(self, requests: Sequence[Request]) -> Iterator[Scores]:
        """Scores in the requests' order; vLLM makes the batches."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=self.top_k + PADDING_MARGIN,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": request.input_ids.tolist()} for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        for request, output in zip(requests, outputs, strict=True):
            yield scores_from_prompt_logprobs(
                output.prompt_logprobs, request, self.token_ids, self.top_k
            )


def scores_from_prompt_logprobs(
    rows: Sequence[Mapping[int, Logprob] | None],
    request: Request,
    token_ids: frozenset[int],
    top_k: int,
) -> Scores:
    """vLLM's rows for one prompt as `Scores`.

    `rows[i]` holds the best entries of the distribution that token i was drawn from and token i's
    own; `rows[0]` is None.

    Raises:
        FusechatError: a row holds fewer than `top_k` ids that the tokenizer has.
    """
    count = len(request.positions)
    ids = np.zeros((count, top_k), dtype=np.uint32)
    logprobs = np.zeros((count, top_k), dtype=np.float32)
    gold_logprobs = np.zeros(count, dtype=np.float32)
    for at, (position, gold) in enumerate(zip(request.positions, request.gold, strict=True)):
        row = rows[position + 1]
        if row is None:
            raise FusechatError(f"vLLM gave no log-probabilities for token {position + 1}")
        gold_logprobs[at] = row[int(gold)].logprob
        entries = sorted(
            (-entry.logprob, token_id) for token_id, entry in row.items() if token_id in token_ids
        )[:top_k]
        if len(entries) < top_k:
            raise FusechatError(
                f"vLLM's best {len(row)} entries hold {len(entries)} tokens of the tokenizer's, "
                f"fewer than top_k: {top_k}; set scoring.engine: transformers"
            )
        logprobs[at] = [-negative for negative, _ in entries]
        ids[at] = [token_id for _, token_id in entries]
    return Scores(ids, logprobs, gold_logprobs)
