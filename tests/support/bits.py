"""Bits of answers by the definition, from a model's whole logits in float64."""

from __future__ import annotations

import math
from typing import Any

import torch

from fusechat_distill.text.conversations import Conversation
from fusechat_distill.text.tokens import token_bytes, vocabulary


def dense(model, tokenizer, text: str, begin: int, end: int) -> tuple[float, int]:
    """Bits of bytes `begin` to `end` of a text, and how many tokens hold them.

    By the definition: P(first token) over P(it begins with what stands before the answer), and for
    the last one P(it begins with what is left of the answer).
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = token_bytes(tokenizer, ids)
    spelt = [
        piece or tokenizer.convert_ids_to_tokens(i).encode()
        for i, piece in zip(ids, pieces, strict=True)
    ]
    raw = text.encode()
    dummy = b"".join(spelt) != raw
    starts, at = [], 0
    for i, piece in enumerate(spelt):
        if dummy and piece.startswith(b" ") and not raw[at:].startswith(piece):
            # A prefix space that the text doesn't have: counted as standing before it.
            starts.append(at - 1)
            at += len(piece) - 1
            assert i
            continue
        starts.append(at)
        at += len(piece)
    assert at == len(raw)
    ends = [*starts[1:], at]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = logits.log_softmax(-1)
    every = vocabulary(tokenizer)
    total, tokens = 0.0, 0
    for i, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        stop = start + len(spelt[i])
        if stop <= begin or start >= end or not pieces[i]:
            continue
        tokens += 1
        row = logprobs[i - 1]

        def mass(prefix: bytes, row=row) -> float:
            members = [j for j, b in enumerate(every.tokens) if b.startswith(prefix) and b]
            return float(row[members].logsumexp(-1))

        logprob = float(row[ids[i]])
        if stop > end:
            logprob = mass(spelt[i][: len(spelt[i]) - (stop - end)])
        if start < begin:
            logprob -= mass(spelt[i][: begin - start])
        total -= logprob / math.log(2)
    return total, tokens


def answer_bits(model: Any, tokenizer: Any, chat: Conversation) -> list[tuple[float, int, int]]:
    """Of every answer: its bits, how many tokens hold them, its bytes."""
    messages = [message._asdict() for message in chat.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found, after = [], 0
    for message in chat.messages:
        if message.role != "assistant":
            continue
        at = text.index(message.content, after)
        after = at + len(message.content)
        begin, end = (len(text[:c].encode()) for c in (at, after))
        found.append((*dense(model, tokenizer, text, begin, end), end - begin))
    return found
