"""Scores without a model: random ones of a recipe's conversations, over real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save_file
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from fusechat_distill.inputs.open import Inputs, open_inputs
from fusechat_distill.storage.shards import Shards, scores_table
from fusechat_distill.text.conversations import Response
from fusechat_distill.text.scored import ScoredResponse, ScoredSample
from fusechat_distill.text.tokens import vocabulary
from tests.support import real_tokenizers


class Alone:
    """The processes of a plain start."""

    index, count = 0, 1

    def first(self, work: Any) -> Any:
        return work()

    def wait(self) -> None: ...


def scored_response(
    response: Response,
    gold: ArrayLike,
    ids: ArrayLike,
    logprobs: ArrayLike,
    gold_logprobs: ArrayLike,
) -> ScoredResponse:
    """A rendered response with these scores, in the types that a store keeps."""
    return ScoredResponse(
        turn=response.turn,
        begin=response.begin,
        end=response.end,
        first=response.first,
        pending=response.pending,
        stop=response.stop,
        tokens=np.asarray(gold).astype(np.uint32),
        ends=np.asarray(response.ends, np.int32),
        ids=np.asarray(ids).astype(np.uint32),
        logprobs=np.asarray(logprobs).astype(np.float16),
        gold_logprobs=np.asarray(gold_logprobs).astype(np.float32),
    )


def random_scores(inputs: Inputs, name: str, seed: int) -> Shards:
    """A complete store of random scores of the recipe's conversations."""
    model, k = inputs.models[name], inputs.recipe.scoring.top_k
    size = len(vocabulary(model.renderer.tokenizer))
    rng = np.random.default_rng(seed)

    def scored(response: Response, input_ids: NDArray[Any]) -> ScoredResponse:
        gold = input_ids[response.token_slice()].astype(np.uint32)
        ids = rng.choice(input_ids, (len(gold), k)).astype(np.uint32)
        ids[:, 1:] = rng.integers(0, size, (len(gold), k - 1))
        ids[:, 0] = gold
        logprobs = np.log(-np.sort(-rng.dirichlet(np.full(k + 1, 0.5), len(gold)), 1))
        return scored_response(response, gold, ids, logprobs[:, :k], logprobs[:, 0])

    shards = Shards.create(inputs.scores_folder(model), inputs.scores_manifest(model))
    for samples in shards.manifest.ranges():
        conversations = inputs.conversations[samples.start : samples.stop]
        found = []
        for conversation, (rendering, _) in zip(
            conversations, inputs.rendered(model, conversations), strict=True
        ):
            responses = tuple(scored(r, rendering.input_ids) for r in rendering.responses)
            if responses:
                found.append(ScoredSample(conversation.key, conversation.row, responses))
        shards.write(samples, scores_table(found), {})
    return shards


def scored_recipe(
    folder: Path,
    answers: list[list[str]],
    count: int,
    other: PreTrainedTokenizerFast,
    sources: str,
    max_length: int,
) -> Inputs:
    """A recipe on `count` conversations with these answers, in turn; nothing is scored yet.

    The models have a configuration and a tokenizer and no weights: `pivot` and `twin` are Mistral's
    under two templates, `other` has the tokenizer that is given. `sources` is the recipe's list, in
    which `{folder}` is filled in.
    """
    for name, config, tokenizer in (
        ("pivot", LlamaConfig, real_tokenizers.mistral()),
        ("twin", LlamaConfig, real_tokenizers.mistral("normalizer", real_tokenizers.INSTRUCT)),
        ("other", Qwen3Config, other),
    ):
        tokenizer.save_pretrained(folder / name)
        config(vocab_size=len(tokenizer)).save_pretrained(folder / name)
        save_file({}, folder / name / "model.safetensors", metadata={"model": name})
    with open(folder / "chats.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            messages = []
            for answer in answers[i % len(answers)]:
                messages.append({"role": "user", "content": f"Say {i}"})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "recipe.yaml").write_text(
        f"output: {folder}/out\npivot: {folder}/pivot\n"
        f"sources: {sources.replace('{folder}', str(folder))}\n"
        f"dataset: {folder}/chats.jsonl\nmax_length: {max_length}\n"
        "scoring: {top_k: 5, device: cpu}\n"
    )
    return open_inputs(folder / "recipe.yaml")
