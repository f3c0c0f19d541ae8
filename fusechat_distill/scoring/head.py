"""The output head in vocabulary tiles: top-k and log-probabilities without [tokens, vocabulary]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Logits per block; the top k are searched in the blocks with the highest maxima."""


@dataclass(frozen=True)
class Head:
    """logits = soft_cap · tanh((h Wᵀ + bias) · scale / soft_cap), over the existing tokens."""

    weight: Tensor
    """[V', H], V' at least the vocabulary size (rows beyond it are padding)."""
    vocabulary_size: int
    bias: Tensor | None = None
    """[V']"""
    scale: float = 1.0
    soft_cap: float | None = None
    absent: Tensor | None = None
    """Ids below the vocabulary size that no token has, ascending int64."""


def topk_logprobs(
    hidden: Tensor, head: Head, gold: Tensor, k: int, *, tile_elements: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The `k` most probable tokens after each hidden state, and the gold token's log-probability.

    The vocabulary is processed in tiles with a running top-k and logsumexp. Beside the inputs and
    outputs only two tiles of `tile_elements` logits are in memory (default: 16M on a CPU, 32M
    elsewhere).

    Args:
        hidden: [N, H], in the weight's dtype.
        gold: [N] int64, ids of tokens that exist.
        k: at most the number of tokens that exist.

    Returns:
        ids [N, k] int64, log-probabilities [N, k] and gold log-probabilities [N], float32
        (float64 for a float64 head). Logits are accumulated in that dtype whatever the weights'.
        Sorted by log-probability, of equals the lower id first. A state whose logits hold NaN or
        +Inf gives NaN everywhere.
    """
    n = hidden.shape[0]
    size = head.vocabulary_size
    device = head.weight.device
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    hidden, gold = hidden.to(device), gold.to(device)
    if tile_elements is None:
        tile_elements = _tile_elements(device)
    # Chunks of rows of equal height. The weights are read once for each chunk, the hidden states
    # once for each tile, so tiles are at least about as wide as they are high.
    chunks = -(-n // max(1, math.isqrt(tile_elements) // 4))
    rows = max(1, -(-n // max(1, chunks)))
    width = max(BLOCK, min(tile_elements // rows, size + BLOCK - 1) // BLOCK * BLOCK)
    buffers = torch.empty(2, rows * width, dtype=dtype, device=device)

    ids = torch.empty(n, k, dtype=torch.int64, device=device)
    values = torch.empty(n, k, dtype=dtype, device=device)
    gold_values = torch.empty(n, dtype=dtype, device=device)
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        ids[chunk], values[chunk], gold_values[chunk] = _chunk(
            hidden[chunk], head, gold[chunk], k, width, buffers
        )
    return ids, values, gold_values


def set_logprobs(
    hidden: Tensor, head: Head, sets: Sequence[Tensor], *, tile_elements: int | None = None
) -> Tensor:
    """The total log-probability of a set of tokens, one set for each hidden state.

    For few states: all logits of a chunk of states are in memory, at most `tile_elements` (as in
    `topk_logprobs`), or those of one state.

    Args:
        hidden: [N, H], in the weight's dtype.
        sets: N int64 tensors of ids of tokens that exist.

    Returns:
        [N], dtype as in `topk_logprobs`; -inf for an empty set, NaN for logits with NaN or +Inf.
    """
    device, size = head.weight.device, head.vocabulary_size
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    hidden = hidden.to(device)
    rows = max(1, (tile_elements or _tile_elements(device)) // size)
    logprobs = torch.empty(len(sets), dtype=dtype, device=device)
    for start in range(0, len(sets), rows):
        part = hidden[start : start + rows]
        logits = torch.empty(len(part), size, dtype=dtype, device=device)
        _logits(part, head, 0, size, out=logits)
        totals = logits.logsumexp(-1)
        for i, total in enumerate(totals):
            of_set = logits[i, sets[start + i].to(device)].logsumexp(-1)
            logprobs[start + i] = torch.minimum(of_set - total, torch.zeros_like(total))
    return logprobs


def _tile_elements(device: torch.device) -> int:
    return 2**24 if device.type == "cpu" else 2**25


def _chunk(
    hidden: Tensor, head: Head, gold: Tensor, k: int, width: int, buffers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`topk_logprobs` of one chunk of rows, tile by tile; `buffers` are two tiles of it."""
    n, size = hidden.shape[0], head.vocabulary_size
    infinity = float("inf")
    best_ids = torch.zeros(n, 0, dtype=torch.int64, device=hidden.device)
    best = torch.zeros(n, 0, dtype=buffers.dtype, device=hidden.device)
    gold_logits = torch.empty(n, dtype=buffers.dtype, device=hidden.device)
    highest = torch.full((n,), -infinity, dtype=buffers.dtype, device=hidden.device)
    total = torch.zeros(n, dtype=buffers.dtype, device=hidden.device)

    for low in range(0, size, width):
        high = min(low + width, size)
        blocks = -(-(high - low) // BLOCK)
        logits, probabilities = buffers[:, : n * blocks * BLOCK].view(2, n, blocks * BLOCK)
        real = logits[:, : high - low]
        logits[:, high - low :] = -infinity
        _logits(hidden, head, low, high, out=real)

        inside = (gold >= low) & (gold < high)
        gold_logits[inside] = real[inside, gold[inside] - low]

        # The top k lie in the k blocks with the highest maxima.
        maxima = logits.view(n, blocks, BLOCK).amax(-1)
        chosen = maxima.topk(min(k, blocks), dim=-1).indices
        candidates = (
            chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=chosen.device)
        ).view(n, -1)
        tile_best, index = logits.gather(1, candidates).topk(min(k, candidates.shape[1]), dim=-1)
        tile_ids = candidates.gather(1, index)
        best = torch.cat([best, tile_best], 1)
        best_ids = torch.cat([best_ids, tile_ids + low], 1)
        if best.shape[1] > k:
            best, index = best.topk(k, dim=-1)
            best_ids = best_ids.gather(1, index)

        # 1 / Σ exp(x - max) of the tile: softmax is the kernel that reads a row once.
        torch.softmax(logits, -1, out=probabilities)
        tile_highest = tile_best[:, 0]
        share = probabilities.gather(1, tile_ids[:, :1]).squeeze(1)
        share.masked_fill_(tile_highest == -infinity, 1.0)  # a tile of absent ids only

        # The sum of exponentials so far, relative to the new maximum.
        previous, highest = highest, torch.maximum(highest, tile_highest)
        shift = torch.where(highest == -infinity, 0.0, highest)
        total = total * (previous - shift).exp() + (tile_highest - shift).exp() / share

    # NaN in one logit is NaN in `total`, which makes the whole row NaN.
    rest = total.log_()
    # By falling logit; a stable sort of entries in order of ids puts the lower of equals first.
    order = best_ids.argsort(dim=-1)
    best_ids, best = best_ids.gather(1, order), best.gather(1, order)
    order = best.argsort(dim=-1, descending=True, stable=True)
    best_ids, best = best_ids.gather(1, order), best.gather(1, order)
    best = best - highest.unsqueeze(-1) - rest.unsqueeze(-1)
    return best_ids, best, gold_logits - highest - rest


def _logits(hidden: Tensor, head: Head, low: int, high: int, *, out: Tensor) -> None:
    """Write the logits of tokens `low` to `high`, [N, high - low], into `out`."""
    weight = head.weight[low:high].T
    if weight.dtype == out.dtype:
        torch.mm(hidden, weight, out=out)
    elif weight.device.type == "cuda":  # pragma: no cover (CUDA)
        out.copy_(torch.mm(hidden, weight, out_dtype=out.dtype))
    else:
        torch.mm(hidden.to(out.dtype), weight.to(out.dtype), out=out)
    if head.bias is not None:
        out += head.bias[low:high]
    if head.scale != 1.0:
        out *= head.scale
    if head.soft_cap is not None:
        out.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    if head.absent is not None:
        absent = head.absent[(head.absent >= low) & (head.absent < high)]
        out[:, absent - low] = float("-inf")
