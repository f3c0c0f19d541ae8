"""A model's greedy answers to questions.

At most `tokens` new tokens each, every model under its own template: a prompt is what the template
puts before an answer, as in training, so that a template without a generation prompt will do. Of a
model with several training seeds the first one answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat_distill.evaluation.questions import Questions
from fusechat_distill.text.conversations import Conversation, Message, Renderer
from fusechat_distill.text.tokens import vocabulary

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import OpenModel
    from fusechat_distill.scoring.transformers_engine import TransformersScorer
    from fusechat_distill.storage.stage import Progress

PLACEHOLDER = Message("assistant", "Hello.")
"""Stands for the answer while its prompt is rendered."""


def answer(
    questions: Questions,
    model: OpenModel,
    title: str,
    scorer: TransformersScorer,
    progress: Progress,
) -> list[list[str] | None]:
    """A model's answers to each question's turns; None where its template refuses the question."""
    turns = [question.turns for question in questions.questions]
    chats = [list(question.messages) for question in questions.questions]
    answers: dict[int, list[str]] = {i: [] for i in range(len(chats))}
    progress.start(title, sum(map(len, turns)))
    try:
        for turn in range(max(map(len, turns))):
            # Questions that have this turn and were not refused before it.
            waiting = [i for i in answers if turn < len(turns[i])]
            if turn:
                for i in waiting:
                    chats[i].append(Message("user", turns[i][turn]))
            prompts = _prompts(model.renderer, {i: chats[i] for i in waiting})
            texts = _generate(scorer, model, prompts, questions.tokens, progress)
            for i in waiting:
                if i in texts:
                    answers[i].append(texts[i])
                    chats[i].append(Message("assistant", texts[i]))
                else:
                    del answers[i]
    finally:
        progress.stop()
    return [answers.get(i) for i in range(len(chats))]


@dataclass(frozen=True, eq=False)
class _Prompt:
    ids: np.ndarray
    pending: bytes
    """What the template has between these and the answer, for the model to begin with."""


def _prompts(renderer: Renderer, chats: Mapping[int, Sequence[Message]]) -> dict[int, _Prompt]:
    """The tokens before the answer that each chat waits for, unless its template refuses it."""
    conversations = [Conversation("", i, (*chat, PLACEHOLDER)) for i, chat in chats.items()]
    known = vocabulary(renderer.tokenizer)
    prompts = {}
    for conversation, rendering in zip(conversations, renderer(conversations), strict=True):
        for response in rendering.responses:
            if response.turn < len(conversation.messages) - 1:
                continue
            ids, pending = rendering.input_ids[: response.first], response.pending
            # A space before an answer is most often part of its first token.
            while len(ids) > 1 and known.tokens[ids[-1]] and not known.tokens[ids[-1]].strip(b" "):
                ids, pending = ids[:-1], known.tokens[ids[-1]] + pending
            prompts[conversation.row] = _Prompt(ids, pending)
    return prompts


def _generate(
    scorer: TransformersScorer,
    model: OpenModel,
    prompts: Mapping[int, _Prompt],
    tokens: int,
    progress: Progress,
) -> dict[int, str]:
    """The model's answer to each prompt; prompts of like length share a batch."""
    import torch
    from transformers import GenerationConfig

    loaded = scorer.model
    config = model.files.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or 2**31
    # Rows of the head beyond the tokenizer's tokens are padding, and never generated.
    rows = np.arange(scorer.head_module.weight.shape[0])
    absent = np.setdiff1d(rows, model.files.token_ids).tolist()
    stops = _stops(model, loaded)
    padding = model.renderer.tokenizer.pad_token_id
    padding = next(iter(stops), 0) if padding is None else padding
    stop_text = model.renderer.after_answer()
    texts = {}
    # Longest first, so that a batch that fits is followed by batches that fit.
    order = sorted(prompts, key=lambda i: -len(prompts[i].ids))
    while order:
        width = len(prompts[order[0]].ids)
        room = min(tokens, longest - width)
        if room < 1:
            texts[order.pop(0)] = ""
            progress.advance(1, 0)
            continue
        batch = order[: max(1, scorer.batch_tokens // (width + room))]
        # [batch, width], padded on the left, so that all prompts end where generation begins.
        ids = np.full((len(batch), width), padding, dtype=np.int64)
        mask = np.zeros((len(batch), width), dtype=np.int64)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i].ids) :] = prompts[i].ids
            mask[row, width - len(prompts[i].ids) :] = 1
        with torch.inference_mode():
            generated = loaded.generate(
                input_ids=torch.from_numpy(ids).to(loaded.device),
                attention_mask=torch.from_numpy(mask).to(loaded.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    max_new_tokens=room,
                    eos_token_id=stops or None,
                    pad_token_id=padding,
                    suppress_tokens=absent or None,
                ),
            )
        new_tokens = 0
        for row, i in enumerate(batch):
            tokens_after = generated[row, width:].tolist()
            answer_ids = list(itertools.takewhile(lambda token: token not in stops, tokens_after))
            new_tokens += len(answer_ids)
            texts[i] = _answer_text(answer_ids, prompts[i], model, stop_text)
        progress.advance(len(batch), new_tokens)
        order = order[len(batch) :]
    return texts


def _answer_text(ids: Sequence[int], prompt: _Prompt, model: OpenModel, stop_text: str) -> str:
    """The text that the tokens spell, without what the template puts around it."""
    known = vocabulary(model.renderer.tokenizer)
    spelt = b"".join(known.tokens[token] for token in ids).removeprefix(prompt.pending)
    text = spelt.decode(errors="replace")
    return (text.partition(stop_text)[0] if stop_text else text).strip()


def _stops(model: OpenModel, loaded: Any) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those the model names."""
    roles = model.renderer.roles()
    named = loaded.generation_config.eos_token_id
    several = named if isinstance(named, list) else [named]
    stops = [roles.get("end_of_turn"), roles.get("eos"), *several]
    return [token for token in dict.fromkeys(stops) if token is not None]
