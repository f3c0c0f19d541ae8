"""Fusion by its definition: loops over samples, segments and entries, in Python's floats.

A model is anything with the fields of `fusechat_distill.fusion.fuse.Scores`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any


def loops(
    models: Sequence[Any],
    offsets: list[int],
    num_bytes: Any,
    function: str,
    level: str,
    cross_entropy: str,
    tail: str,
    temperature: float,
    unmatched: str,
) -> tuple[list[dict[int, float]], list[list[float]]]:
    """Each row as {token: probability}, and each row's weights, one model at a time."""
    rows: list[dict[int, float]] = []
    weights: list[list[float]] = []
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        present = [j for j, model in enumerate(models) if model.present[s]]
        starts = [start]
        if level == "token":
            for t in range(start + 1, stop):
                if all(models[j].matched[t] for j in present):
                    starts.append(t)
        for begin, end in zip(starts, [*starts[1:], stop], strict=True):
            ce = {}
            for j in present:
                nll = math.fsum(models[j].nll[begin:end])
                size = sum(
                    num_bytes[begin:end] if cross_entropy == "byte" else models[j].tokens[begin:end]
                )
                ce[j] = nll / max(size, 1)
            share = dict.fromkeys(range(len(models)), 0.0)
            if ce and function == "min_ce":
                share[min(ce, key=lambda j: (ce[j], j))] = 1.0
            elif ce:
                total = math.fsum(math.exp(-x) for x in ce.values())
                share.update({j: math.exp(-x) / total for j, x in ce.items()})
            for t in range(begin, end):
                row: dict[int, float] = {}
                for j in present:
                    own = entries(models[j], t, tail, temperature)
                    if not own and unmatched == "pivot" and 0 in present:
                        own = entries(models[0], t, tail, temperature)
                    for token, probability in own.items():
                        row[token] = row.get(token, 0.0) + share[j] * probability
                rows.append({token: p for token, p in row.items() if p > 0})
                weights.append(list(share.values()))
    return rows, weights


def entries(model: Any, t: int, tail: str, temperature: float) -> dict[int, float]:
    if not model.matched[t]:
        return {}
    known = {
        int(token): float(logprob)
        for token, logprob in zip(model.ids[t], model.logprobs[t], strict=True)
        if logprob > -math.inf
    }
    heated = {token: math.exp(logprob / temperature) for token, logprob in known.items()}
    total = math.fsum(heated.values())
    mass = 1.0 if tail == "renormalize" else min(1.0, math.fsum(map(math.exp, known.values())))
    return {token: mass * value / total for token, value in heated.items()}
