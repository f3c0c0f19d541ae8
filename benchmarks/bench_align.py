"""Speed, memory and correctness of alignment, over two real tokenizers and real text.

    python benchmarks/bench_align.py [--tokens N] [--skip-mined]

Pivot: Mistral's SentencePiece vocabulary (32k); source: Qwen's byte-level BPE (152k). Text: the
documentation and code of installed packages. Distributions are random, their gold tokens real.
Everything that is compared is measured in the same run; times are of one core (the MinED map: all).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import PreTrainedTokenizerFast

from fusechat_distill import (
    PairCounts,
    VocabularyMap,
    first_tokens,
    match_positions,
    token_bytes,
    vocabulary,
)
from fusechat_distill.alignment.positions import (
    Positions,
    Responses,
    align,
    dtw,
    match_states,
    pair_counts,
)
from fusechat_distill.alignment.vocabularies import match_roles
from fusechat_distill.text.conversations import Conversation, Message, Renderer
from fusechat_distill.text.scored import ScoredResponse
from tests.support import real_tokenizers

K = 10
ANSWER = 4000


def corpus(characters: int) -> list[str]:
    """Answers of about 4,000 characters from the docstrings and code of installed packages."""
    root = Path(np.__file__).parents[1]
    answers: list[str] = []
    total = 0
    for path in sorted(root.glob("[ndp]*/**/*.py")):
        try:
            text = path.read_text("utf-8").strip()
        except UnicodeDecodeError:
            continue
        for start in range(0, len(text), ANSWER):
            answers.append(text[start : start + ANSWER].strip() or "pass")
            total += ANSWER
        if total > characters:
            break
    return answers


def scored(renderer: Renderer, answers: list[str], seed: int) -> list[ScoredResponse | None]:
    """The scores of each answer: the gold token among random entries."""
    rng = np.random.default_rng(seed)
    size = len(vocabulary(renderer.tokenizer))
    found: list[ScoredResponse | None] = []
    for start in range(0, len(answers), 64):
        block = answers[start : start + 64]
        chats = [
            Conversation("", 0, (Message("user", "Go on."), Message("assistant", answer)))
            for answer in block
        ]
        for rendering in renderer(chats):
            if not rendering.responses:
                found.append(None)
                continue
            (response,) = rendering.responses
            gold = rendering.input_ids[response.token_slice()].astype(np.uint32)
            # Random entries are tokens of the text itself, as a model's would be.
            ids = rng.choice(rendering.input_ids, (len(gold), K)).astype(np.uint32)
            ids[:, K // 2 :] = rng.integers(0, size, (len(gold), K - K // 2))
            ids[:, 0] = gold
            logprobs = np.sort(np.log(rng.dirichlet(np.full(K + 2, 0.4), len(gold)) + 1e-7))
            logprobs = logprobs[:, ::-1][:, :K].astype(np.float16)
            found.append(
                ScoredResponse(
                    turn=1,
                    begin=response.begin,
                    end=response.end,
                    first=response.first,
                    pending=response.pending,
                    stop=response.stop,
                    tokens=gold,
                    ends=response.ends,
                    ids=ids,
                    logprobs=logprobs,
                    gold_logprobs=logprobs[:, 0].astype(np.float32),
                )
            )
    return found


def plain_dtw(pivot: list[str], source: list[str]) -> float:
    """The cost of dynamic time warping over edit distance, written in plain Python."""
    from rapidfuzz.distance.Levenshtein import distance

    n, m = len(source), len(pivot)
    total = [[float("inf")] * (m + 1) for _ in range(n + 1)]
    total[0][0] = 0.0
    for i in range(n):
        for j in range(m):
            cost = distance(source[i], pivot[j])
            total[i + 1][j + 1] = cost + min(total[i][j], total[i][j + 1], total[i + 1][j])
    return total[n][m]


def strings(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> list[str]:
    raw = token_bytes(tokenizer, tokens.tolist())
    return [token.decode(errors="surrogateescape").strip() for token in raw]


def consumed(
    response: ScoredResponse, tokenizer: PreTrainedTokenizerFast
) -> tuple[bytes, np.ndarray]:
    """The response's text as its tokens spell it, and how much of it each state has consumed."""
    raw = token_bytes(tokenizer, response.tokens.tolist())
    raw[0] = raw[0].removeprefix(response.pending)
    return b"".join(raw), np.cumsum([0, *map(len, raw)])[:-1]


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(name: str, value: str, goal: str = "") -> None:
    print(f"| {name} | {value} | {goal} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="pivot tokens")
    parser.add_argument("--skip-mined", action="store_true")
    options = parser.parse_args()
    print("| what | measured | goal |\n|---|---|---|")

    pivot, source = Renderer(real_tokenizers.mistral()), Renderer(real_tokenizers.qwen())
    sides = vocabulary(pivot.tokenizer), vocabulary(source.tokenizer)
    roles = match_roles(pivot.roles(), source.roles())
    answers = corpus(4 * options.tokens)

    started = time.perf_counter()
    rendered = scored(pivot, answers, 1)
    seconds = time.perf_counter() - started
    others = scored(source, answers, 2)
    pairs = [(p, s) for p, s in zip(rendered, others, strict=True) if p and s]
    tokens = sum(len(p.tokens) for p, _ in pairs)
    row(
        "pivot tokens; rendered, tokenised, located (and scores drawn)",
        f"{tokens:,}; {tokens / seconds:,.0f}/s",
    )

    shards = [
        tuple(Responses.of(side) for side in zip(*pairs[i : i + 256], strict=True))
        for i in range(0, len(pairs), 256)
    ]
    started = time.perf_counter()
    counts = PairCounts.empty()
    for p, s in shards:
        counts += pair_counts(p, s, match_states(p, s))
    ms = VocabularyMap.from_counts(*sides, counts, roles)
    row("MS map", f"{time.perf_counter() - started:.1f} s", "10 s a million tokens")

    started = time.perf_counter()
    first = first_tokens(pivot.tokenizer, sides[1].tokens)
    by_bytes = VocabularyMap.from_bytes(*sides, first, roles)
    row("bytes map, 152k → 32k", f"{time.perf_counter() - started:.1f} s")

    before = peak()
    for vocabulary_map in (ms, by_bytes):
        rounds = []
        for _ in range(3):
            started = time.perf_counter()
            matched = sum(len(align(p, s, vocabulary_map).ids) for p, s in shards)
            rounds.append(time.perf_counter() - started)
        row(
            f"positions and projection, {vocabulary_map.mode}, k = {K}, best of 3",
            f"{tokens / min(rounds):,.0f} pivot tokens/s, {matched / tokens:.1%} matched",
            "300,000/s a core",
        )
    row("peak memory it added", f"{peak() - before:.0f} MiB over {len(shards)} shards")

    # One pair of 2,048 tokens, with every method.
    p, s = shards[0]
    pair = Responses.of([r for r, _ in pairs[:4]]), Responses.of([r for _, r in pairs[:4]])
    words = [
        strings(r.tokenizer, side.tokens[:2048])
        for r, side in zip((pivot, source), pair, strict=True)
    ]
    n, m = len(words[0]), len(words[1])
    started = time.perf_counter()
    plain_dtw(*words)
    plain = time.perf_counter() - started
    started = time.perf_counter()
    dtw(*words)
    fast = time.perf_counter() - started
    started = time.perf_counter()
    repeats = 20
    for _ in range(repeats):
        align(*pair, ms)
    scale = min(n, m) / len(pair[0].tokens)
    ours = (time.perf_counter() - started) / repeats * scale
    row(f"plain DTW in Python, {n} x {m} tokens", f"{plain:.2f} s")
    row("`positions: dtw`, the same", f"{fast:.3f} s, {plain / fast:.0f} x")
    row("positions and projection, the same", f"{ours:.4f} s, {plain / ours:,.0f} x", "500 x")

    # How much each method matches, and how many of its matches have consumed different text, by
    # the bytes of the tokens and not by the offsets that `bytes` uses.
    matched_by, wrong = {"bytes": 0, "dtw": 0}, {"bytes": 0, "dtw": 0}
    total = unmatched = inside = 0
    for left, right in pairs[:100]:
        p, s = Responses.of([left]), Responses.of([right])
        own_text, own_at = consumed(left, pivot.tokenizer)
        other_text, other_at = consumed(right, source.tokenizer)
        total += len(p.tokens)
        for way in get_args(Positions):
            matches = match_states(p, s, way, sides)
            rows = np.flatnonzero(matches >= 0)
            matched_by[way] += len(rows)
            for t in rows.tolist():
                wrong[way] += own_text[: own_at[t]] != other_text[: other_at[matches[t]]]
            if way == "bytes":
                left_out = np.setdiff1d(np.arange(len(p.tokens)), rows)
                unmatched += len(left_out)
                inside += int((~np.isin(own_at[left_out], other_at)).sum())
    for way in get_args(Positions):
        row(
            f"`positions: {way}` over 100 answers",
            f"{matched_by[way] / total:.1%} matched, {wrong[way]:,} of {matched_by[way]:,} "
            f"({wrong[way] / max(matched_by[way], 1):.1%}) with unequal text",
        )
    row("of what `bytes` leaves, inside of a source token", f"{inside / max(unmatched, 1):.1%}")

    if not options.skip_mined:
        started = time.perf_counter()
        mined = VocabularyMap.from_mined(*sides, roles)
        seconds = time.perf_counter() - started
        row(
            f"MinED map, 152k → 32k, {os.cpu_count()} cores",
            f"{seconds:.0f} s, {(mined.kinds == 2).mean():.0%} not exact",
            "600 s",
        )
    positions = np.arange(0, 8_000_000, 4)
    started = time.perf_counter()
    match_positions(positions, positions + 2)
    row("match_positions alone", f"{len(positions) / (time.perf_counter() - started):,.0f}/s")
    row("peak memory of the run", f"{peak():.0f} MiB")


if __name__ == "__main__":
    main()
