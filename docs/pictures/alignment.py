"""Draws alignment.png and projection.png for docs/alignment.md: real tokens, matched by the code.

`python docs/pictures/alignment.py`. It needs the two vocabularies that `make test` installs:
Mistral's (32,000 pieces) as the pivot's and Qwen's (151,643 tokens) as the source's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from fusechat_distill import (
    PairCounts,
    VocabularyMap,
    first_tokens,
    match_positions,
    tokenize,
    vocabulary,
)
from fusechat_distill.text.conversations import Conversation, Message, Renderer
from fusechat_distill.text.tokens import Vocabulary

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from tests.support import real_tokenizers  # noqa: E402

LINES = ("    self.cache.setdefault(key, [])", "Größe ≈ ½ ℝ.")  # noqa: RUF001
PIVOT, SOURCE = "#4477aa", "#cc7711"
MATCHED, UNMATCHED = "#228833", "#bb2233"

# What a source may predict after `    self`, most probable first; the rest of 1 is its tail.
ENTRIES = ((".cache", 0.50), (".data", 0.20), (".__", 0.12), (" =", 0.08), (".setdefault", 0.04))


def shown(token: bytes) -> str:
    """A token as it is drawn: spaces visible, bytes that are no characters in hexadecimal."""
    try:
        return token.decode().replace(" ", "␣").replace("\n", "↵")
    except UnicodeDecodeError:
        pass
    text = "".join("␣" if byte == 32 else f"{byte:02x} " for byte in token)
    return text.strip()


def answered(renderer: Renderer, line: str) -> tuple[list[bytes], np.ndarray, bytes]:
    """The tokens of an answer under the model's own template, their end offsets, and what is
    pending: a space that the tokenizer puts before the answer's first byte."""
    chat = Conversation("", 0, (Message("user", "Go on."), Message("assistant", line)))
    rendering = renderer([chat])[0]
    (response,) = rendering.responses
    table = vocabulary(renderer.tokenizer)
    tokens = [table.tokens[i] for i in rendering.input_ids[response.token_slice()]]
    return tokens, response.ends, response.pending


def draw_line(axes: Any, line: str, pivot: Renderer, source: Renderer) -> None:
    length = len(line.encode())
    sides = [answered(pivot, line), answered(source, line)]
    states = [np.array([0, *ends[:-1].tolist()]) for _, ends, _ in sides]  # before each token
    matches = match_positions(*states)
    for (tokens, ends, pending), height, color in zip(
        sides, (2.0, 0.0), (PIVOT, SOURCE), strict=True
    ):
        start = -len(pending)
        for token, end in zip(tokens, ends.tolist(), strict=True):
            stop = not token
            width = 2.2 if stop else end - start
            left = length + 0.35 if stop else start
            face = "#dddddd" if stop else color
            axes.add_patch(
                Rectangle((left, height), width, 0.8, fc=face, ec="white", lw=2, alpha=0.9)
            )
            text = "stop" if stop else shown(token)
            axes.text(
                left + width / 2,
                height + 0.4,
                text,
                ha="center",
                va="center",
                color="black" if stop else "white",
                fontsize=min(11.0, 11.5 * width * 34 / length / (0.78 * len(text) + 0.5)),
                family="DejaVu Sans Mono",
            )
            start = end
        if pending:
            axes.add_patch(
                Rectangle(
                    (-1, height), 1, 0.8, fc="none", ec="white", hatch="////", lw=0, alpha=0.6
                )
            )
    matched = {int(states[0][i]) for i in np.flatnonzero(matches >= 0)}
    for offset in matched:
        axes.plot([offset, offset], [0.8, 2.0], color=MATCHED, lw=2.2, zorder=0)
    for side, (near, far) in enumerate(((2.0, 1.62), (0.8, 1.18))):
        for offset in set(states[side].tolist()) - matched:
            axes.plot([offset, offset], [near, far], color=UNMATCHED, lw=1.8, ls=":")
            axes.plot([offset], [far], marker="x", color=UNMATCHED, ms=6, mew=1.8)
    for offset in sorted({*states[0].tolist(), *states[1].tolist()}):
        axes.text(offset, 2.93, str(offset), ha="center", fontsize=8.5, color="#444444")
    total = len(states[0])
    axes.set_title(
        f"{line.replace(' ', '␣')}      {len(matched)} of the pivot's {total} positions match",
        loc="left",
        fontsize=11,
        family="DejaVu Sans Mono",
        pad=14,
    )
    axes.text(-1.3, 2.4, "pivot", ha="right", va="center", color=PIVOT, fontsize=12, weight="bold")
    axes.text(
        -1.3, 0.4, "source", ha="right", va="center", color=SOURCE, fontsize=12, weight="bold"
    )
    axes.set_xlim(-1.3 - 0.09 * length, length + 2.8)
    axes.set_ylim(-0.1, 3.2)
    axes.axis("off")


def draw_positions(path: Path, pivot: Renderer, source: Renderer) -> None:
    figure, rows = plt.subplots(2, 1, figsize=(11, 5.2))
    for axes, line in zip(rows, LINES, strict=True):
        draw_line(axes, line, pivot, source)
    figure.text(
        0.5,
        0.02,
        "numbers: bytes of the answer consumed     green: both have consumed the same bytes     "
        "red cross: only one side stands there\n"
        "hatched: a space that the tokenizer put there     two hexadecimal digits: a byte that is "
        "no character by itself",
        ha="center",
        fontsize=9.5,
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1), h_pad=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def counted(pivot: Any, source: Any) -> PairCounts:
    """Which tokens begin at the same bytes, over the code of this project."""
    texts = [p.read_text("utf-8") for p in sorted((ROOT / "fusechat_distill").rglob("*.py"))]
    counts = PairCounts.empty()
    for left, right in zip(tokenize(pivot, texts), tokenize(source, texts), strict=True):
        matches = match_positions(left.ends[:-1], right.ends[:-1])
        rows = np.flatnonzero(matches >= 0)
        counts += PairCounts.of(right.ids[matches[rows] + 1], left.ids[rows + 1])
    return counts


def maps(pivot: Any, source: Any) -> dict[str, VocabularyMap]:
    """Each mode's map; the edit distances of `mined` are computed for the few tokens drawn."""
    to, of = vocabulary(pivot), vocabulary(source)
    wanted = {of.by_bytes[token.encode()] for token, _ in ENTRIES}
    few = np.zeros(len(of), dtype=np.bool_)
    few[sorted(wanted)] = True
    drawn = Vocabulary(of.tokens, few, of.fallback)
    first = np.full(len(of), -1, dtype=np.int64)
    first[few] = first_tokens(pivot, [of.tokens[i] for i in np.flatnonzero(few)])
    return {
        "em": VocabularyMap.from_em(to, drawn),
        "mined": VocabularyMap.from_mined(to, drawn),
        "ms": VocabularyMap.from_counts(to, drawn, counted(pivot, source)),
        "bytes": VocabularyMap.from_bytes(to, drawn, first),
    }


def draw_projection(path: Path, pivot: Any, source: Any) -> None:
    to, of = vocabulary(pivot), vocabulary(source)
    ids = np.array([of.by_bytes[token.encode()] for token, _ in ENTRIES])
    probs = np.array([prob for _, prob in ENTRIES])
    columns = {"the source's": [(token, prob) for token, prob in ENTRIES]}
    for mode, made in maps(pivot, source).items():
        found = made.project(ids, probs)
        columns[mode] = [
            (to.tokens[i].decode(), float(p))
            for i, p in zip(found.ids.tolist(), found.probs.tolist(), strict=True)
            if i >= 0
        ]
    figure, row = plt.subplots(1, len(columns), figsize=(11, 3.1), sharex=True, sharey=True)
    for axes, (title, entries) in zip(row, columns.items(), strict=True):
        color = SOURCE if title == "the source's" else PIVOT
        left = 1.0 - sum(prob for _, prob in entries)
        bars = [*((shown(token.encode()), prob) for token, prob in entries), ("tail", left)]
        for i, (token, prob) in enumerate(bars):
            axes.barh(i, prob, height=0.8, color="#bbbbbb" if token == "tail" else color)
            axes.text(
                prob + 0.02,
                i,
                f"{token}  {prob:.2f}",
                va="center",
                fontsize=10,
                family="DejaVu Sans Mono",
            )
        axes.set_title(title, fontsize=12, weight="bold", color=color)
        axes.set_xlim(0, 1.75)
        axes.set_ylim(len(ENTRIES) + 0.6, -0.6)
        axes.axis("off")
    figure.tight_layout(w_pad=0.5)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    folder = Path(__file__).parent
    pivot, source = real_tokenizers.mistral(), real_tokenizers.qwen()
    draw_positions(folder / "alignment.png", Renderer(pivot), Renderer(source))
    draw_projection(folder / "projection.png", pivot, source)


if __name__ == "__main__":
    main()
