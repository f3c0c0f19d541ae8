"""Scoring compared with the forward pass alone and with dense scoring: speed, memory, disk.

One random batch of chats goes through a Qwen3 shape of 100-300M parameters with a vocabulary of
150k, on the CPU, with three methods in turn, each in its own process; the best time of each counts:

- bare: the backbone, and the head over the response positions, [positions, vocabulary];
- plain: `model(...).logits`, `log_softmax`, `topk`: [tokens, vocabulary];
- ours: `TransformersScorer.score`, which in contrast to bare also returns top-k and logsumexp.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TOP_K = 10
VOCABULARY = 151_936
TOKENS = 151_646
"""Ids that the tokenizer has; the head's other rows are padding."""


def build() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def chats(tokens: int) -> list[Any]:
    """Chats of 200 to 512 tokens, half of them in the response."""
    from fusechat_distill.scoring.engine import Request

    rng = np.random.default_rng(0)
    requests = []
    left = tokens
    while left >= 512:
        length = int(rng.integers(200, 513))
        ids = rng.integers(0, TOKENS, length)
        requests.append(Request(ids, np.arange(length // 2, length - 1)))
        left -= 512
    return requests


def padded(requests: list[Any]) -> tuple[Any, Any, Any, Any]:
    """ids and mask [B, L], response positions and gold of the flattened batch."""
    import torch

    longest = max(len(request.input_ids) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, : len(request.input_ids)] = torch.from_numpy(request.input_ids)
        mask[row, : len(request.input_ids)] = 1
    flat = np.concatenate([row * longest + r.positions for row, r in enumerate(requests)])
    gold = np.concatenate([r.gold for r in requests])
    return ids, mask, torch.from_numpy(flat), torch.from_numpy(gold)


def bare(model: Any, requests: list[Any]) -> Callable[[], Any]:
    ids, mask, flat, _ = padded(requests)

    def run() -> Any:
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return model.lm_head(hidden.reshape(-1, hidden.shape[-1])[flat])

    return run


def plain(model: Any, requests: list[Any]) -> Callable[[], Any]:
    ids, mask, flat, gold = padded(requests)

    def run() -> Any:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(TOP_K, dim=-1)
        rows = logprobs.reshape(-1, logprobs.shape[-1])
        return best, rows[flat, gold]

    return run


def ours(model: Any, requests: list[Any]) -> Callable[[], Any]:
    from fusechat_distill.scoring.transformers_engine import TransformersScorer

    scorer = TransformersScorer(model, range(TOKENS), top_k=TOP_K, batch_tokens=10**9)
    return lambda: list(scorer.score(requests))


WAYS = {"bare": bare, "plain": plain, "ours": ours}


def peak_bytes() -> int:
    """Peak resident memory of this process since its model was created."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark runs on Linux")


class Worker:
    """One method, in the process that runs it."""

    way: str
    requests: list[Any]
    run: Callable[[], Any]
    model: Any

    @classmethod
    def prepare(cls, way: str, tokens: int, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        cls.way, cls.requests, cls.model = way, chats(tokens), build()
        Path("/proc/self/clear_refs").write_text("5")  # creating random weights took memory
        cls.run = staticmethod(WAYS[way](cls.model, cls.requests))

    @classmethod
    def seconds(cls) -> float:
        import torch

        with torch.inference_mode():
            started = time.perf_counter()
            cls.run()
            return time.perf_counter() - started

    @classmethod
    def facts(cls) -> dict[str, int]:
        found = {"peak": peak_bytes()}
        if cls.way == "ours":
            found["parameters"] = sum(p.numel() for p in cls.model.parameters())
            found["tokens"] = sum(len(request.input_ids) for request in cls.requests)
            found["positions"] = sum(len(request.positions) for request in cls.requests)
            found["stored"] = stored_bytes(cls.requests, cls.run())
        return found


def stored_bytes(requests: list[Any], scores: list[Any]) -> int:
    """Size of the scores in a store, with four bytes of text per token."""
    from fusechat_distill.storage.shards import (
        Manifest,
        SampleRange,
        Shards,
        scores_table,
    )
    from fusechat_distill.text.scored import ScoredResponse, ScoredSample

    samples = []
    for row, (request, score) in enumerate(zip(requests, scores, strict=True)):
        count = len(request.positions)
        response = ScoredResponse(
            turn=1,
            begin=0,
            end=4 * count,
            first=int(request.positions[0]) + 1,
            pending=b"",
            stop="special",
            tokens=request.gold.astype(np.uint32),
            ends=(4 * np.arange(1, count + 1)).astype(np.int32),
            ids=score.ids,
            logprobs=score.logprobs.astype(np.float16),
            gold_logprobs=score.gold_logprobs,
        )
        samples.append(ScoredSample(f"{row:032x}", row, (response,)))
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards.create(folder, Manifest("scores", len(samples), {}))
        path = shards.write(SampleRange(0, len(samples)), scores_table(samples), {})
        return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="padded tokens in the batch")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    # Every round runs all methods, so that a busy moment of the machine affects all of them.
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = {way: stack.enter_context(context.Pool(1)) for way in WAYS}
        for way, pool in pools.items():
            pool.apply(Worker.prepare, (way, options.tokens, options.threads))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way, pool in pools.items():
                seconds[way].append(pool.apply(Worker.seconds))
                print(f"round {number + 1}: {way:6}{seconds[way][-1]:7.2f} s", file=sys.stderr)
        found = {way: pool.apply(Worker.facts) for way, pool in pools.items()}
    for way in WAYS:
        print(f"{way:6} {found[way]['peak'] / 1e9:6.2f} GB peak", file=sys.stderr)
    mine = found["ours"]
    report = {
        "parameters": mine["parameters"],
        "tokens": mine["tokens"],
        "response_positions": mine["positions"],
        "tokens_per_second": round(mine["tokens"] / min(seconds["ours"])),
        "speed_to_bare": round(min(seconds["bare"]) / min(seconds["ours"]), 3),
        "speed_to_plain": round(min(seconds["plain"]) / min(seconds["ours"]), 3),
        "peak_memory_to_plain": round(mine["peak"] / found["plain"]["peak"], 3),
        "bytes_per_response_token": round(mine["stored"] / mine["positions"], 1),
    }
    goals = {
        "speed_to_bare": (">=", 0.8),
        "speed_to_plain": (">=", 1.5),
        "peak_memory_to_plain": ("<=", 0.333),
        "bytes_per_response_token": ("<=", 55),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        sign, goal = goals.get(name, ("", ""))
        print(f"{name:26} {value:>12,} {f'(goal {sign} {goal})' if sign else ''}")


if __name__ == "__main__":
    main()
