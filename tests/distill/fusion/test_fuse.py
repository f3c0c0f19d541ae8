"""Fusion against loops over samples, segments and entries."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fusechat_distill.fusion.fuse import AlignedScores, Fused, fuse, segment_sums, target_models
from tests.support.fusion import loops

VOCABULARY = 40


def scores(
    lengths: list[int],
    seed: int,
    *,
    width: int = 4,
    pivot: bool = False,
    absent: tuple[int, ...] = (),
) -> AlignedScores:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    ids = np.stack([generator.permutation(VOCABULARY)[:width] for _ in range(total)] or [[0] * 4])
    probs = generator.dirichlet(np.ones(width + 1), max(total, 1))[:, :width]
    with np.errstate(divide="ignore"):
        logprobs = np.log(probs * (generator.random(probs.shape) > 0.15))
    logprobs[::7] = -np.inf  # nothing in the pivot's vocabulary stands for any entry
    matched = np.ones(max(total, 1), bool) if pivot else generator.random(max(total, 1)) > 0.4
    starts = np.cumsum([0, *lengths])[:-1]
    nll, tokens = np.zeros(total), np.zeros(total, np.int64)
    for start, length in zip(starts, lengths, strict=True):
        for t in range(start, start + length):
            if matched[t] or t == start:
                nll[t] = generator.exponential(3.0)
                tokens[t] = 1 if pivot else generator.integers(1, 4)
    present = np.array([s not in absent for s in range(len(lengths))])
    return AlignedScores(ids[:total], logprobs[:total], matched[:total], nll, tokens, present)


def as_rows(fused: Fused) -> list[dict[int, float]]:
    assert fused.ids.dtype == np.int32
    assert fused.probs.dtype == np.float32
    assert (np.diff(fused.probs, axis=1) <= 0).all()
    assert not fused.ids[fused.probs == 0].any()
    rows = []
    for ids, probs in zip(fused.ids, fused.probs, strict=True):
        held = [(int(i), float(p)) for i, p in zip(ids, probs, strict=True) if p > 0]
        assert len({token for token, _ in held}) == len(held)
        rows.append(dict(held))
    return rows


LENGTHS = [6, 0, 1, 9, 4, 5]
OFFSETS = np.cumsum([0, *LENGTHS])
BYTES = np.random.default_rng(5).integers(0, 7, sum(LENGTHS))


@pytest.mark.parametrize("unmatched", ["one_hot", "pivot"])
@pytest.mark.parametrize(("tail", "temperature"), [("renormalize", 1.0), ("gold", 1.7)])
@pytest.mark.parametrize("cross_entropy", ["byte", "token"])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("function", ["min_ce", "avg_ce"])
def test_every_choice_equals_the_loops(
    function, level, cross_entropy, tail, temperature, unmatched
):
    pivot = scores(LENGTHS, 1, pivot=True, absent=(4, 5))
    sources = [
        scores(LENGTHS, 2, absent=(3, 5)),
        scores(LENGTHS, 3, width=6),
        scores(LENGTHS, 4, absent=(0, 4, 5)),
    ]
    sources[1] = dataclasses.replace(sources[1], present=np.array([1, 1, 1, 1, 1, 0], bool))
    for models in ([pivot, sources[0]], [pivot, *sources], [pivot]):
        choices = (function, level, cross_entropy, tail, temperature, unmatched)
        names = ("function", "level", "cross_entropy", "tail", "temperature", "unmatched")
        fused = fuse(models, OFFSETS, BYTES, **dict(zip(names, choices, strict=True)))
        rows, weights = loops(models, OFFSETS.tolist(), BYTES, *choices)
        found = as_rows(fused)
        assert len(found) == len(rows)
        for ours, wanted in zip(found, rows, strict=True):
            assert ours == pytest.approx(wanted, rel=1e-5)
        widths = [model.ids.shape[1] for model in models]
        assert fused.ids.shape[1] == (max(widths) if function == "min_ce" else sum(widths))
        by_row = fused.weights
        if level == "sequence":
            assert fused.weights.shape == (len(LENGTHS), len(models))
            by_row = np.repeat(fused.weights, LENGTHS, axis=0)
        np.testing.assert_allclose(by_row, np.array(weights), rtol=1e-5, atol=1e-7)


def one(nll: list[float], **changes: Any) -> AlignedScores:
    """A model on one sample, with one certain entry a position."""
    count = len(nll)
    given = {
        "ids": np.full((count, 1), 7),
        "logprobs": np.zeros((count, 1)),
        "matched": np.ones(count, bool),
        "nll": np.array(nll),
        "tokens": np.ones(count, np.int64),
        "present": np.array([True]),
        **changes,
    }
    return AlignedScores(**given)


def winner(models: list[AlignedScores], **choices: Any) -> list[int]:
    count = len(models[0].nll)
    fused = fuse(models, np.array([0, count]), np.full(count, 4), **choices)
    return [int(np.argmax(row)) if row.any() else -1 for row in fused.weights]


# The same text: the pivot loses 3 nats on 3 tokens, the source 3.6 nats on 6 of its own.
COARSE, FINE = one([1.0] * 3), one([1.2] * 3, tokens=np.array([2, 2, 2]))
EQUAL = [one([0.1, 0.2, 0.3])] * 3
NUMBERS = one([9.0, 9.0])


@pytest.mark.parametrize(
    ("models", "choices", "expected"),
    [
        # Equal models leave the choice to the pivot.
        (EQUAL, {}, [0]),
        (EQUAL, {"level": "token"}, [0, 0, 0]),
        ([one([0.2, 0.2]), one([0.2, 0.1]), one([0.1, 0.2])], {}, [1]),
        # Bytes compare tokenizers; own tokens favour the finer one.
        ([COARSE, FINE], {}, [0]),
        ([COARSE, FINE], {"cross_entropy": "byte"}, [0]),
        ([COARSE, FINE], {"cross_entropy": "token"}, [1]),
        # A loss that is no number never wins.
        *(
            case
            for bad in (math.nan, math.inf)
            for case in (
                ([one([bad, 0.0]), NUMBERS], {}, [1]),
                ([one([bad, 0.0]), one([bad, 0.0])], {}, [0]),
                ([NUMBERS, one([0.0, bad])], {}, [0]),
            )
        ),
    ],
)
def test_who_wins(models, choices, expected):
    assert winner(models, **choices) == expected


@pytest.mark.parametrize("losses", [[4000.0, 4.0], [math.nan], [math.inf]])
def test_a_sample_nobody_understands_is_mixed_like_any_other(losses):
    # exp(-1000) is 0: what counts is the distance to the sample's best, not to another sample's.
    count = len(losses)
    models = [one(losses, present=np.ones(count, bool)) for _ in range(2)]
    fused = fuse(models, np.arange(count + 1), np.full(count, 4), function="avg_ce")
    assert fused.weights.tolist() == [[0.5, 0.5]] * count


def test_a_sample_of_one_position_is_a_segment_of_its_own():
    both = {"present": np.ones(2, bool)}
    models = [
        one([1.0, 1.0, 1.0], **both),
        one([9.0, 9.0, 0.1], matched=np.array([True, True, False]), **both),
    ]
    fused = fuse(models, np.array([0, 2, 3]), np.full(3, 4), level="token")
    assert fused.weights.argmax(axis=1).tolist() == [0, 0, 1]


def test_without_a_score_the_rows_are_zero():
    nobody = one([1.0], present=np.array([False]))
    for function in ("min_ce", "avg_ce"):
        fused = fuse([nobody, nobody], np.array([0, 1]), np.ones(1), function=function)
        assert not fused.weights.any()
        assert not fused.probs.any()


@pytest.mark.parametrize(
    ("logprobs", "choices", "expected"),
    [
        # The temperature divides before the probabilities are made to add up to 1 again.
        (np.log([0.4, 0.1]), {"temperature": 2.0}, np.sqrt([0.4, 0.1]) / np.sqrt([0.4, 0.1]).sum()),
        # The gold tail is what the entries leave.
        (np.log([0.4, 0.1]), {"tail": "gold"}, [0.4, 0.1]),
        # exp(-800) is 0, which can't be divided by.
        ([-800.0, -801.0], {}, [1 / (1 + math.exp(-1)), 1 / (1 + math.e)]),
    ],
)
def test_the_probabilities_of_one_row(logprobs, choices, expected):
    certain = [0.0, -np.inf]  # another row beside it
    model = one([1.0, 1.0], ids=np.array([[3, 5]] * 2), logprobs=np.array([certain, logprobs]))
    fused = fuse([model], np.array([0, 2]), np.ones(2), **choices)
    np.testing.assert_allclose(fused.probs, [[1.0, 0.0], expected], rtol=1e-6)


def test_of_equally_probable_tokens_the_lower_comes_first():
    generator = np.random.default_rng(0)
    ids, mass = generator.permutation(64), generator.choice([0.01, 0.005, 0.0025], 64)
    model = one([1.0], ids=ids[None], logprobs=np.log(mass)[None])
    fused = fuse([model], np.array([0, 1]), np.ones(1))
    assert fused.ids[0].tolist() == ids[np.lexsort((ids, -mass))].tolist()


def test_the_first_source_takes_the_pivots_row_where_it_has_none():
    models = [
        one([9.0, 9.0], ids=np.array([[3], [3]])),
        one([1.0, 1.0], ids=np.array([[5], [5]]), matched=np.array([True, False])),
    ]
    for unmatched, second in (("pivot", [[3], [1.0]]), ("one_hot", [[0], [0.0]])):
        fused = fuse(models, np.array([0, 2]), np.ones(2), unmatched=unmatched)
        assert fused.ids.tolist() == [[5], second[0]]
        assert fused.probs.tolist() == [[1.0], second[1]]


def test_fp16_logprobs_of_a_certain_token_stay_a_probability():
    model = one([0.0], logprobs=np.array([[np.float16(0.0005)]]))
    assert fuse([model], np.array([0, 1]), np.ones(1), tail="gold").probs.max() <= 1.0


def test_nothing_to_fuse_is_no_error():
    nothing = AlignedScores(
        np.zeros((0, 3), np.int64),
        np.zeros((0, 3)),
        np.zeros(0, bool),
        np.zeros(0),
        np.zeros(0, np.int64),
        np.array([True]),
    )
    for level in ("sequence", "token"):
        fused = fuse([nothing, nothing], np.array([0, 0]), np.zeros(0), level=level)
        assert fused.ids.shape == (0, 3)


LOSSES = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


@pytest.mark.parametrize(
    ("matches", "losses", "sums", "counts"),
    [
        ([0, -1, 2, 3, -1], LOSSES, [3.0, 0.0, 4.0, 56.0, 0.0], [2, 0, 1, 3, 0]),
        # What comes before the first match belongs to the first position, and so does everything
        # where nothing matches.
        ([-1, 2, -1, 5], LOSSES, [3.0, 28.0, 0.0, 32.0], [2, 3, 0, 1]),
        ([-1, 0, 2], LOSSES, [0.0, 3.0, 60.0], [0, 2, 4]),
        ([-1, -1], LOSSES, [63.0, 0.0], [6, 0]),
        ([0, 2, 2, 5], LOSSES, [3.0, 0.0, 28.0, 32.0], [2, 0, 3, 1]),
        # Losses are stored in float32, where 2^24 + 1 is 2^24.
        ([2], np.array([2.0**24, 1.0, 0.5], np.float32), [2.0**24 + 1.5], [3]),
        ([0, -1], np.zeros(0), [0.0, 0.0], [0, 0]),
        ([], LOSSES, [], []),
    ],
)
def test_segment_sums_put_every_token_somewhere_once(matches, losses, sums, counts):
    found = segment_sums(np.array(matches, np.int64), losses)
    assert [column.tolist() for column in found] == [sums, counts]


def test_samples_are_put_together_from_what_alignment_stores():
    first = AlignedScores.of(
        np.array([0, -1, 2]),
        np.array([[5, 6], [7, 8]]),
        np.log([[0.5, 0.2], [0.9, 0.1]]),
        np.ones(4),
    )
    second = AlignedScores.of(np.array([0]), np.array([[9]]), np.zeros((1, 1)), np.array([0.25]))
    both = AlignedScores.joined([first, AlignedScores.absent(2), second])
    assert both.ids.tolist() == [[5, 6], [0, 0], [7, 8], [0, 0], [0, 0], [9, 0]]
    assert both.logprobs[5].tolist() == [0.0, -math.inf]
    assert both.logprobs[1].tolist() == [-math.inf, -math.inf]
    assert both.matched.tolist() == [True, False, True, False, False, True]
    assert both.nll.tolist() == [2.0, 0.0, 2.0, 0.0, 0.0, 0.25]
    assert both.tokens.tolist() == [2, 0, 2, 0, 0, 1]
    assert both.present.tolist() == [True, False, True]
    # An absent sample widens nothing.
    assert AlignedScores.joined([second, AlignedScores.absent(2)]).ids.tolist() == [[9], [0], [0]]


def test_the_strategies_name_their_targets():
    assert target_models("pairwise", ["a", "b"]) == {"a": ("a",), "b": ("b",)}
    assert target_models("multi", ["a", "b"]) == {"multi": ("a", "b")}
    assert target_models("sft", ["a", "b"]) == {"sft": ()}


def test_the_same_scores_give_the_same_bytes():
    models = [scores(LENGTHS, 1, pivot=True), scores(LENGTHS, 2)]
    first, second = (fuse(models, OFFSETS, BYTES, function="avg_ce") for _ in range(2))
    assert first.ids.tobytes() == second.ids.tobytes()
    assert first.probs.tobytes() == second.probs.tobytes()
