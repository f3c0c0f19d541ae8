"""Positions, vocabulary maps and projections against references that follow the definitions."""

import copy
import dataclasses
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusechat_distill.alignment.positions import (
    Responses,
    align,
    dtw,
    match_positions,
    match_states,
    pair_counts,
)
from fusechat_distill.alignment.vocabularies import (
    DROPPED,
    EXACT,
    MAPPED,
    SPECIAL,
    PairCounts,
    VocabularyMap,
    collapse,
    match_roles,
)
from fusechat_distill.text.conversations import Conversation, Message, Renderer, Response
from fusechat_distill.text.scored import ScoredResponse
from fusechat_distill.text.tokens import Vocabulary, first_tokens, token_bytes, tokenize, vocabulary
from tests.support import real_tokenizers
from tests.support.scores import scored_response
from tests.support.texts import PIECES, texts

# --- positions ----------------------------------------------------------------------------------

offsets = st.lists(st.integers(-1, 12), max_size=12).map(
    lambda values: np.array(sorted(values), dtype=np.int64)
)


@given(pivot=offsets, source=offsets)
def test_positions_match_where_offsets_are_equal(pivot, source):
    expected = [
        max((j for j, e in enumerate(source) if e == end and end >= 0), default=-1) for end in pivot
    ]
    assert match_positions(pivot, source).tolist() == expected


@given(pivot=st.sets(st.integers(0, 40)), source=st.sets(st.integers(0, 40)))
def test_swapping_the_sides_transposes_the_match(pivot, source):
    pivot, source = np.array(sorted(pivot), dtype=int), np.array(sorted(source), dtype=int)
    forth, back = match_positions(pivot, source), match_positions(source, pivot)
    pairs = {(i, j) for i, j in enumerate(forth.tolist()) if j >= 0}
    assert pairs == {(i, j) for j, i in enumerate(back.tolist()) if i >= 0}
    assert match_positions(pivot, pivot).tolist() == list(range(len(pivot)))


@settings(max_examples=60)
@given(text=texts(specials=False).filter(lambda text: "▁" not in text))
def test_matched_positions_have_consumed_the_same_text(mistral, text):
    qwen = real_tokenizers.qwen(False)
    sides = []
    for tokenizer in (mistral, qwen):
        (tokens,) = tokenize(tokenizer, [text])
        joined = token_bytes(tokenizer, tokens.ids.tolist())
        consumed = [b"".join(joined[: i + 1]) for i in range(len(joined))]
        sides.append((tokens, [t[1:] if tokens.dummy[0] else t for t in consumed]))
    (pivot, pivot_texts), (source, source_texts) = sides
    matches = match_positions(pivot.ends, source.ends)
    for i, j in enumerate(matches.tolist()):
        if j >= 0:
            assert pivot_texts[i] == source_texts[j]
        else:
            assert pivot_texts[i] not in source_texts
    assert matches[-1] == len(source.ids) - 1


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's, cell by cell."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def plain_dtw(pivot: list, source: list) -> list[int]:
    """The definition, cell by cell."""

    def cost(a, b) -> int:
        return edit_distance("".join(a.split()), "".join(b.split()))

    total = {(-1, -1): 0}
    n, m = len(source), len(pivot)
    for i, j in product(range(n), range(m)):
        options = [total.get(cell, math.inf) for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
        total[i, j] = cost(source[i], pivot[j]) + min(options)
    i, j, path = n - 1, m - 1, [(n - 1, m - 1)]
    while (i, j) != (0, 0):
        cells = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = min((cell for cell in cells if min(cell) >= 0), key=lambda cell: total[cell])
        path.append((i, j))
    sources = [i for i, _ in path]
    pivots = [j for _, j in path]
    partner = {j: i for i, j in path}
    return [
        partner[j] if pivots.count(j) == 1 and sources.count(partner[j]) == 1 else -1
        for j in range(m)
    ]


tokens_of_text = st.lists(
    st.sampled_from(["a", " a", "b", "ab", " abc", "a b", "", "é"]), max_size=9
)


@given(pivot=tokens_of_text, source=tokens_of_text)
@example(pivot=["a", "b"], source=["a b", "b"])
@example(pivot=["a", "abc", "b"], source=["c", "cc", "c", "abc"])  # up and left are equal
@example(pivot=["", "bbbb", "c"], source=["", "bbb", "", "bbbb", "c"])  # up along the edge
def test_dtw_is_the_papers_recurrence(pivot, source):
    expected = plain_dtw(pivot, source) if pivot and source else [-1] * len(pivot)
    assert dtw(pivot, source).tolist() == expected


def test_dtw_goes_wrong_where_bytes_do_not():
    pivot, source = ["a", "a", "a", "b"], ["aa", "a", "b"]
    wrong = dtw(pivot, source)
    right = match_positions(np.array([1, 2, 3, 4]), np.array([2, 3, 4]))
    assert right.tolist() == [-1, 0, 1, 2]
    assert wrong.tolist() != right.tolist()


# --- vocabularies -------------------------------------------------------------------------------


def small(*tokens: str | bytes | None) -> Vocabulary:
    """A vocabulary of these tokens; None is special."""
    raw = tuple(t.encode() if isinstance(t, str) else (t or b"") for t in tokens)
    return Vocabulary(raw, np.array([t is not None for t in tokens]))


PIVOT = small(None, "a", "ab", " the", "the", "x", "ba", b"\xe6", "日", "ab", None)
SOURCE = small("ab", " the ", "abx", None, b"\xe6\x97", "日", "zz", "b", None, "q")


def test_em_maps_the_same_bytes_and_nothing_else():
    em = VocabularyMap.from_em(PIVOT, SOURCE)
    assert em.ids.tolist() == [2, -1, -1, -1, -1, 8, -1, -1, -1, -1]
    assert em.kinds.tolist() == [EXACT if i in (0, 5) else DROPPED for i in range(10)]


def test_a_token_of_a_longer_vocabulary_is_itself_and_no_byte_fallback(mistral):
    """`A` and `<0x41>` have the same bytes, but only the first is ever written."""
    longer = copy.deepcopy(mistral)
    longer.add_tokens(["<table>"])
    pivot, source = vocabulary(mistral), vocabulary(longer)
    em = VocabularyMap.from_em(pivot, source)
    written = sorted(set(np.flatnonzero(pivot.text).tolist()) - pivot.fallback)
    assert em.ids[written].tolist() == written
    assert len(pivot.fallback) == 256
    letter, byte = mistral.convert_tokens_to_ids(["A", "<0x41>"])
    assert em.ids[[letter, byte]].tolist() == [letter, letter]
    newline = mistral.convert_tokens_to_ids("<0x0A>")
    assert em.ids[newline] == newline
    assert em.ids[len(mistral)] == -1
    mined = VocabularyMap.from_mined(small(None, "b", "c", b"\xff"), small("d", "e"), workers=1)
    assert mined.ids.tolist() == [1, 1]


def reference_distance(a: bytes, b: bytes) -> int:
    return edit_distance(a.decode(errors="surrogateescape"), b.decode(errors="surrogateescape"))


token_text = st.text(st.sampled_from("ab é日"), min_size=1, max_size=7).map(str.encode)
some_bytes = st.binary(min_size=1, max_size=3)
vocabularies = st.lists(st.none() | token_text | some_bytes, min_size=1, max_size=12).map(
    lambda tokens: small(*tokens)
)


def exact(pivot: Vocabulary, token: bytes) -> int:
    return min((i for i, t in enumerate(pivot.tokens) if pivot.text[i] and t == token), default=-1)


def same_vocabulary(pivot: Vocabulary, source: Vocabulary) -> bool:
    return pivot.tokens == source.tokens and (pivot.text == source.text).all()


def expected_id(pivot: Vocabulary, source: Vocabulary, s: int, otherwise) -> int:
    """Of a source token: itself in the same vocabulary, nothing if special, else the same bytes."""
    if same_vocabulary(pivot, source):
        return s
    if not source.text[s]:
        return -1
    same = exact(pivot, source.tokens[s])
    return same if same >= 0 else otherwise(source.tokens[s])


@given(pivot=vocabularies, source=vocabularies)
def test_mined_is_the_least_edit_distance(pivot, source):
    candidates = [i for i in range(len(pivot)) if pivot.text[i]]

    def nearest(token: bytes) -> int:
        distance = {i: reference_distance(token, pivot.tokens[i]) for i in candidates}
        return min(candidates, key=lambda i: (distance[i], i), default=-1)

    mined = VocabularyMap.from_mined(pivot, source, workers=1)
    expected = [expected_id(pivot, source, s, nearest) for s in range(len(source))]
    assert mined.ids.tolist() == expected


@given(
    pivot=vocabularies,
    source=vocabularies,
    pairs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=60),
)
def test_ms_is_the_most_frequent_pair(pivot, source, pairs):
    pairs = [(s % len(source), p % len(pivot)) for s, p in pairs]
    half = len(pairs) // 2
    first, second = (
        PairCounts.of(*np.array(part, dtype=np.int64).reshape(-1, 2).T)
        for part in (pairs[:half], pairs[half:])
    )
    counts = first + second
    assert int(counts.number.sum()) == len(pairs)
    ms = VocabularyMap.from_counts(pivot, source, counts)
    for s in range(len(source)):
        seen = [p for t, p in pairs if t == s and pivot.text[p]]

        def most_frequent(token: bytes, seen=seen) -> int:
            def rank(p: int):
                return -seen.count(p), reference_distance(token, pivot.tokens[p]), p

            return min(seen, key=rank, default=-1)

        assert ms.ids[s] == expected_id(pivot, source, s, most_frequent)


def test_ms_by_hand():
    pivot = small("a", "bb", "bc", "cc", None)
    seen = {
        "b": ({0: 1, 1: 3, 2: 3, 3: 2}, 1),  # of two as frequent and as near the lower id
        "q": ({0: 4, 3: 1}, 0),
        "x": ({1: 1, 3: 4}, 3),
        "cx": ({1: 2, 3: 2}, 3),  # of two as frequent the nearer
        "cy": ({1: 2, 2: 2, 3: 1}, 1),  # nearer, but seen less often
        "cw": ({1: 2, 2: 1, 3: 2}, 3),  # the lower is seen as often, another less
        "a": ({3: 9}, 0),  # the same bytes
        "z": ({4: 5}, -1),  # special
    }
    pairs = np.array(
        [
            (s, p)
            for s, (counts, _) in enumerate(seen.values())
            for p, number in counts.items()
            for _ in range(number)
        ]
    )
    ms = VocabularyMap.from_counts(pivot, small(*seen), PairCounts.of(*pairs.T))
    assert ms.ids.tolist() == [expected for _, expected in seen.values()]
    assert ms.kinds.tolist() == [MAPPED] * 6 + [EXACT, DROPPED]


def test_a_map_says_how_each_token_was_found():
    assert (DROPPED, EXACT, MAPPED, SPECIAL) == (0, 1, 2, 3)  # as they are stored
    sides, roles = (small("a", "ab", None), small("a", "abc", "qrs", None)), {3: 2}
    only_exact = [0, -1, -1, 2], [EXACT, DROPPED, DROPPED, SPECIAL]
    first = np.array([0, 1, -1, -1])
    for mode, built, expected in (
        ("em", VocabularyMap.from_em(*sides, roles), only_exact),
        ("ms", VocabularyMap.from_counts(*sides, PairCounts.empty(), roles), only_exact),
        (
            "mined",
            VocabularyMap.from_mined(*sides, roles, workers=1),
            ([0, 1, 0, 2], [EXACT, MAPPED, MAPPED, SPECIAL]),
        ),
        (
            "bytes",
            VocabularyMap.from_bytes(*sides, first, roles),
            ([0, 1, -1, 2], [EXACT, MAPPED, DROPPED, SPECIAL]),
        ),
    ):
        assert built.mode == mode
        assert (built.ids.tolist(), built.kinds.tolist()) == expected


def test_pairs_of_both_counts_are_added_up():
    last = 2**32 - 1  # of the ids that a store can hold
    one = PairCounts.of(np.array([1, 1, 0]), np.array([2, 2, last], dtype=np.uint32))
    for left, right in ((one, PairCounts.empty()), (PairCounts.empty(), one)):
        assert [c.tolist() for c in left + right] == [[0, 1], [last, 2], [1, 2]]
    both = one + PairCounts.of(np.array([1, 3]), np.array([2, 0]))
    assert [column.tolist() for column in both] == [[0, 1, 3], [last, 2, 0], [1, 3, 1]]
    assert {column.dtype for column in both} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    ("pivot", "source", "expected"),
    [
        (("abcdef", "abxy"), "abcd", 0),  # a token of another length may be as near
        (("b", "a"), "a" * 256, 1),  # distances of 256 and 255: more than a byte
    ],
)
def test_mined_by_hand(pivot, source, expected):
    mined = VocabularyMap.from_mined(small(*pivot), small(source), workers=1)
    assert mined.ids.tolist() == [expected]


def test_lookups_by_hand():
    """In mid-text BPE may begin with another token than the longest; where an answer begins, the
    token of all its bytes is looked up first."""
    pivot = small("ab", "a", "abc")
    source = small(" ab", "ab", " abcx", "abcx", " abcd", " zz", "b", None)
    first = np.array([-1, 1, -1, 0, -1, -1, -1, -1])
    mapped = VocabularyMap.from_bytes(pivot, source, first)
    ids = np.arange(9).reshape(3, 3)  # the last is padding
    for pending in (b"", b" "):
        same = mapped.lookup_pending(ids, pending, pending)
        assert same.tolist() == [[-1, 1, -1], [0, -1, -1], [-1, -1, -1]]
    begin = mapped.lookup_pending(ids, b" ", b"")
    assert begin.tolist() == [[0, -1, 0], [-1, 2, -1], [-1, -1, -1]]
    nothing = mapped.lookup_pending(ids[:0], b" ", b"")
    assert (nothing.shape, nothing.dtype) == ((0, 3), np.int64)
    em = VocabularyMap.from_em(pivot, source)
    begin = em.lookup_pending(ids, b" ", b"")
    assert begin.tolist() == [[0, -1, -1], [-1, -1, -1], [-1, -1, -1]]
    one = VocabularyMap.from_em(small("a"), small("a"))
    assert one.lookup(np.array([1, 0])).tolist() == [-1, 0]


def test_bytes_map_to_the_pivots_first_token(mistral, qwen):
    pivot, source = vocabulary(mistral), vocabulary(qwen)
    first = first_tokens_of(mistral, pivot, source)
    mapped = VocabularyMap.from_bytes(pivot, source, first)
    text = np.flatnonzero(source.text)
    assert (mapped.ids[text] >= 0).all()
    assert (mapped.ids[~source.text] == -1).all()
    for s in text.tolist():
        assert source.tokens[s].startswith(pivot.tokens[mapped.ids[s]])
    for word, expected in ((" Assistant", b" Assistant"), ("日本", "日".encode()), ("\n\n", b"\n")):
        (s,) = qwen(word)["input_ids"]
        assert pivot.tokens[mapped.ids[s]] == expected
    kinds = mapped.kinds[text]
    same = [pivot.tokens[mapped.ids[s]] == source.tokens[s] for s in text.tolist()]
    assert (kinds == np.where(same, EXACT, MAPPED)).all()


def test_specials_map_by_role_alone(mistral, qwen):
    roles = match_roles(Renderer(mistral).roles(), Renderer(qwen).roles())
    assert roles == {151645: 32000, 151643: 32001}
    em = VocabularyMap.from_em(vocabulary(mistral), vocabulary(qwen), roles)
    assert em.ids[[151645, 151643]].tolist() == [32000, 32001]
    assert em.kinds[151645] == SPECIAL
    assert em.ids[qwen.convert_tokens_to_ids("<|im_start|>")] == -1
    both = {"eos": 5, "end_of_turn": 5, "bos": 6, "pad": 7}
    pivots = {"end_of_turn": 0, "bos": 1, "eos": 2, "pad": 3}
    assert match_roles(pivots, both) == {5: 0, 6: 1, 7: 3}
    assert match_roles(pivots, {"pad": 5, "eos": 5}) == {5: 2}
    assert match_roles({"eos": 2}, both) == {5: 2}
    # Text that spells a special token of the pivot stays text.
    spelling = small("</s>", "<|end_of_turn|>")
    assert (VocabularyMap.from_em(vocabulary(mistral), spelling).ids == -1).all()


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 14), st.floats(0, 0.2)), min_size=5, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_projection_adds_up_what_collides(rows):
    target = np.array([3, 3, 0, -1, 4, 5, 5, -1, 2, 9])
    kinds = np.zeros(10, dtype=np.uint8)
    vocabulary_map = VocabularyMap(PIVOT, SOURCE, "em", target, kinds)
    ids = np.array([[i for i, _ in row] for row in rows])
    probs = np.array([[p for _, p in row] for row in rows])
    projection = vocabulary_map.project(ids, probs)
    assert projection.ids.shape == projection.probs.shape == ids.shape
    for row, found, values, mass in zip(rows, *projection, strict=True):
        expected: dict[int, float] = {}
        for i, p in row:
            if i < len(target) and target[i] >= 0 and p > 0:  # 10 to 14: a padded vocabulary
                expected[int(target[i])] = expected.get(int(target[i]), 0.0) + p
        kept = [(i, p) for i, p in zip(found.tolist(), values.tolist(), strict=True) if i >= 0]
        assert dict(kept) == pytest.approx(expected, rel=1e-12)
        assert kept == sorted(kept, key=lambda entry: (-entry[1], entry[0]))
        assert len(kept) == len(expected)
        assert mass == pytest.approx(sum(expected.values()), rel=1e-12)
        assert mass <= sum(p for _, p in row) * (1 + 1e-12)
        assert (found[len(kept) :] == -1).all()
        assert (values[len(kept) :] == 0).all()
    first = vocabulary_map.project(ids[0], probs[0])
    assert first.ids.tolist() == projection.ids[0].tolist()
    assert first.mass.shape == ()


def test_collapse_by_hand():
    rows = (
        # All on one id; equals in the wrong order, at the end and at the beginning; no probability.
        ([7, 7, 7], [0.25, 0.25, 0.5], [7, -1, -1], [1, 0, 0]),
        ([1, 5, 3], [0.5, 0.25, 0.25], [1, 3, 5], [0.5, 0.25, 0.25]),
        ([5, 3, -1], [0.5, 0.5, 0.5], [3, 5, -1], [0.5, 0.5, 0]),
        ([2, 0, 4], [0.5, 0.25, 0], [2, 0, -1], [0.5, 0.25, 0]),
        ([0, 1, 0], [0.25, 0.5, 0.5], [0, 1, -1], [0.75, 0.5, 0]),
    )
    ids, probs, ids_after, probs_after = (np.array(column) for column in zip(*rows, strict=True))
    projection = collapse(ids, probs)
    assert projection.ids.tolist() == ids_after.tolist()
    assert projection.probs.tolist() == probs_after.tolist()
    assert projection.mass.tolist() == [1, 1, 1, 0.75, 1.25]


# --- distributions ------------------------------------------------------------------------------

PAIRS = [
    ("openchat", "qwen"),
    ("qwen", "openchat"),
    ("openchat", "instruct"),
    ("instruct", "qwen-plain"),
    ("spaced", "qwen"),
    ("qwen-nfc", "spaced"),
    ("plain", "qwen-nfc"),
    ("qwen-plain", "openchat"),
]
K = 6


def renderer_of(name: str) -> Renderer:
    tokenizer, template = real_tokenizers.SIDES[name]
    return Renderer(tokenizer(), template)


def scored(renderer: Renderer, answers: list[str], seed: int) -> list[ScoredResponse]:
    """The answers as this model's renderer sees them, with random distributions over tokens that
    are likely there: the gold one, pieces of it, the stop, a space, and any."""
    rng = np.random.default_rng(seed)
    size = len(vocabulary(renderer.tokenizer))
    messages = [
        Message(role, text) for a in answers for role, text in (("user", "Hi"), ("assistant", a))
    ]
    (rendering,) = renderer([Conversation("", 0, tuple(messages))])
    likely = rendering.input_ids
    responses = []
    for response in rendering.responses:
        gold = rendering.input_ids[response.token_slice()]
        ids, logprobs = np.zeros((len(gold), K)), np.zeros((len(gold), K))
        gold_logprobs = np.zeros(len(gold))
        for t, token in enumerate(gold):
            others = rng.permutation(
                np.unique(np.concatenate([rng.choice(likely, K), rng.integers(0, size, K)]))
            )
            others = others[others != token]
            chosen = np.array([token, *others[: K - 1]]) if rng.random() < 0.8 else others[:K]
            weights = rng.dirichlet(np.full(K + 1, 0.5))[:-1] + 1e-6
            order = np.argsort(-weights)
            ids[t], logprobs[t] = chosen[order], np.log(weights[order] / 1.1)
            inside = ids[t] == token
            gold_logprobs[t] = logprobs[t][inside][0] if inside.any() else math.log(1e-3)
        responses.append(scored_response(response, gold, ids, logprobs, gold_logprobs))
    return responses


def state_of(response: ScoredResponse, t: int):
    """What a state of a response has consumed: (kind, byte), or None where it isn't known."""
    states = [response.begin, *response.ends[:-1].tolist()]
    if states[t] < 0 or states[t] in states[t + 1 :]:
        return None
    if t == 0:
        return ("begin", states[t])
    if states[t] == response.end and response.stop != "none":
        return ("end", states[t])
    return ("inside", states[t])


def reference(pivot, source, vocabulary_map, mode):
    """Issue by issue, position by position, in dictionaries of Python floats."""
    states = [state_of(source, t) for t in range(len(source.tokens))]
    tokens = vocabulary_map.source.tokens
    rows = []
    for t in range(len(pivot.tokens)):
        state = state_of(pivot, t)
        if state is None or state not in states:
            rows.append(None)
            continue
        s = states.index(state)
        found: dict[int, float] = {}

        def add(token: int, probability: float, found=found) -> None:
            if token >= 0 and probability > 0:
                found[token] = found.get(token, 0.0) + probability

        def target(token: int, state=state) -> int:
            if state[0] != "begin" or source.pending == pivot.pending:
                return int(vocabulary_map.ids[token])
            if not vocabulary_map.source.text[token]:
                return -1
            if not tokens[token].startswith(source.pending):
                return -1
            text = pivot.pending + tokens[token][len(source.pending) :]
            same = exact_of(vocabulary_map.pivot, text)
            if same < 0 and mode != "em":
                twin = exact_of(vocabulary_map.source, text)
                same = int(vocabulary_map.ids[twin]) if twin >= 0 else -1
            if same < 0 and mode == "bytes":
                prefixes = [text[:n] for n in range(len(text), 0, -1)]
                hits = [exact_of(vocabulary_map.pivot, prefix) for prefix in prefixes]
                same = next((hit for hit in hits if hit >= 0), -1)
            return same

        path = None
        if state[0] == "end":
            path = range(s, len(source.tokens))
        elif same_vocabulary(vocabulary_map.pivot, vocabulary_map.source):
            pass  # the fast path: a token's text is one token on both sides
        elif mode == "bytes" and pivot.ends[t] >= 0 and pivot.ends[t] in source.ends:
            stop = source.ends.tolist().index(pivot.ends[t])
            path = range(s, stop + 1)
        gold_probability = math.exp(source.gold_logprobs[s])
        product_of_path = 0.0
        if path:
            product_of_path = math.exp(sum(float(source.gold_logprobs[j]) for j in path))
            add(int(pivot.tokens[t]), product_of_path)
        for token, logprob in zip(source.ids[s].tolist(), source.logprobs[s].tolist(), strict=True):
            probability = math.exp(logprob)
            if path and token == source.tokens[s]:
                probability = max(gold_probability - product_of_path, 0.0)
            add(target(token), probability)
        rows.append((s, found))
    return rows


def exact_of(table: Vocabulary, text: bytes) -> int:
    return table.by_bytes.get(text, -1)


FIRST: dict[tuple[str, str], np.ndarray] = {}


def first_tokens_of(tokenizer, pivot: Vocabulary, source: Vocabulary) -> np.ndarray:
    """Both ways to build the Mistral tokenizer agree in mid-text, so it is done once for both."""
    key = (pivot.fingerprint, source.fingerprint)
    if key not in FIRST:
        FIRST[key] = first_tokens(tokenizer, source.tokens)
    return FIRST[key]


def vocabulary_map_of(pivot: Renderer, source: Renderer, mode: str, counts=None) -> VocabularyMap:
    sides = vocabulary(pivot.tokenizer), vocabulary(source.tokenizer)
    roles = match_roles(pivot.roles(), source.roles())
    if mode == "em":
        return VocabularyMap.from_em(*sides, roles)
    if mode == "ms":
        return VocabularyMap.from_counts(*sides, counts, roles)
    return VocabularyMap.from_bytes(*sides, first_tokens_of(pivot.tokenizer, *sides), roles)


def by_hand(
    begin: int,
    end: int,
    ends: list[int],
    stop: str = "eos",
    pending: bytes = b"",
    tokens: list[int] | None = None,
) -> ScoredResponse:
    n = len(ends)
    response = Response(1, begin, end, 1, np.array(ends), pending, stop)
    zeros = np.zeros((n, 1))
    return scored_response(response, tokens or range(n), zeros, zeros, np.full(n, -0.5))


def sides_of(pivot: list[ScoredResponse], source: list[ScoredResponse]):
    return Responses.of(pivot), Responses.of(source)


def test_states_of_responses_by_hand():
    # A token without text gives two states one byte; a response begins where the one before ends.
    responses = Responses.of(
        [by_hand(0, 5, [2, 2, 5, -1]), by_hand(5, 9, [7, 7, 9, 9, -1], stop="none")]
    )
    assert responses.at.tolist() == [0, -1, 2, 5, 5, -1, 7, -1, 9]
    assert responses.response.tolist() == [0] * 4 + [1] * 5
    assert np.flatnonzero(responses.is_begin).tolist() == [0, 4]
    assert np.flatnonzero(responses.is_end).tolist() == [3]  # the second has no stop
    assert responses.loss_before.tolist() == [-0.5 * t for t in range(10)]
    assert match_states(responses, responses).tolist() == [0, -1, 2, 3, 4, -1, 6, -1, 8]


def test_an_empty_answer_matches_an_empty_answer_only():
    trimmed, kept = by_hand(1, 1, [-1]), by_hand(0, 4, [2, 4, -1])
    for pivot, source in ((trimmed, kept), (kept, trimmed)):
        assert (match_states(Responses.of([pivot]), Responses.of([source])) == -1).all()
    for begin in (0, 1):
        empty = Responses.of([by_hand(begin, begin, [-1])])
        assert match_states(empty, empty).tolist() == [0]


def test_pairs_are_counted_where_both_begin_after_the_same_text():
    pivots = Responses.of(
        [
            by_hand(0, 5, [2, 5, -1], tokens=[10, 11, 12]),
            by_hand(0, 5, [2, 5, -1], tokens=[20, 21, 22], pending=b" "),
        ]
    )
    sources = Responses.of(
        [
            by_hand(0, 5, [3, 5, -1], tokens=[30, 31, 32]),
            by_hand(0, 5, [2, 5, -1], tokens=[40, 41, 42]),
        ]
    )
    counts = pair_counts(pivots, sources, match_states(pivots, sources))
    # Not 11 (no match), 12 and 22 (stops), 20 (begins with another pending text).
    assert [column.tolist() for column in counts] == [[30, 41], [10, 21], [1, 1]]


def test_of_the_same_vocabulary_only_what_differs_is_changed():
    same = small("a", " a", None, None)
    vocabulary_map = VocabularyMap.from_em(same, same, {3: 2})
    pivot = by_hand(0, 3, [1, 2, 3, -1], tokens=[1, 0, 0, 2], pending=b" ")
    source = dataclasses.replace(
        by_hand(0, 3, [1, 2, 3, -1], tokens=[0, 0, 0, 3]),
        ids=np.array([[0, 1], [1, 0], [3, 0], [1, 0]], dtype=np.uint32),
        logprobs=np.log([[0.5, 0.25], [0.5, 0.5], [0.5, 0.25], [0.5, 0.125]]).astype(np.float16),
        gold_logprobs=np.log([0.5, 0.5, 0.25, 0.25]).astype(np.float32),
    )
    with np.errstate(divide="raise"):  # a missing entry is no warning
        aligned = align(Responses.of([pivot]), Responses.of([source]), vocabulary_map)
    assert aligned.matches.tolist() == [0, 1, 2, 3]
    assert aligned.ids.tolist() == [
        [1, 0],  # the pivot's first token begins with its pending space
        [1, 0],  # passed on as it is, the order of equals too
        [2, 0],  # a stop of another name
        [1, 2],  # the stop is the gold token
    ]
    expected = [[0.5, 0.0], [0.5, 0.5], [0.5, 0.25], [0.5, 0.25]]
    assert np.exp(aligned.logprobs.astype(float)) == pytest.approx(np.array(expected), rel=1e-3)


def test_the_gold_path_needs_both_ends():
    sides = small("abc", "a", "q", None), small("a", "bc", "abcd", None)
    vocabulary_map = VocabularyMap.from_bytes(*sides, np.array([1, 2, 0, -1]))
    source = dataclasses.replace(
        by_hand(0, 4, [1, 3, 4, -1], tokens=[0, 1, 2, 3]),
        ids=np.array([[0, 2]] * 4, dtype=np.uint32),
        logprobs=np.log([[0.5, 0.25]] * 4).astype(np.float16),
        # In float32 a certain token's may come out above 0.
        gold_logprobs=np.array([math.log(0.5), math.log(0.5), 0.01, 0.01], dtype=np.float32),
    )
    for end, expected in ((3, {0: 0.5, 1: 0.25}), (-1, {0: 0.25, 1: 0.5})):
        pivot = by_hand(0, 4, [end, 4, -1], tokens=[0, 2, 3])
        aligned = align(Responses.of([pivot]), Responses.of([source]), vocabulary_map)
        first = dict(zip(aligned.ids[0].tolist(), np.exp(aligned.logprobs[0]), strict=True))
        assert first == pytest.approx(expected, rel=1e-3)
        assert (aligned.logprobs <= 0).all()
        assert aligned.logprobs[-1, 0] == 0


ANSWERS = [
    ["Hello there.", " Leading and trailing \n"],
    ["日本語 with café\n\nand   spaces", "def f(x):\n        return x[0]\n"],
    ["👩🏽‍🚀 ok", "\n\nநன்றி مرحبا", "x"],
    *([piece] for piece in PIECES if piece.strip() and "<" not in piece and "▁" not in piece),
    ["e\u0301a\u0301 caf\u0065\u0301s and A\u030a."],
]


@pytest.mark.parametrize(("pivot_name", "source_name"), PAIRS)
@pytest.mark.parametrize("mode", ["bytes", "ms", "em"])
def test_aligned_distributions_follow_the_definition(pivot_name, source_name, mode):
    pivot, source = renderer_of(pivot_name), renderer_of(source_name)
    pairs = []
    for seed, answers in enumerate(ANSWERS):
        left = {r.turn: r for r in scored(pivot, answers, seed)}
        right = {r.turn: r for r in scored(source, answers, 100 + seed)}
        pairs += [(left[turn], right[turn]) for turn in sorted(left.keys() & right.keys())]
    pivots, sources = (Responses.of(side) for side in zip(*pairs, strict=True))
    counts = pair_counts(pivots, sources, match_states(pivots, sources))
    vocabulary_map = vocabulary_map_of(pivot, source, mode, counts)
    aligned = align(pivots, sources, vocabulary_map)
    expected = []
    for r, (left, right) in enumerate(pairs):
        for row in reference(left, right, vocabulary_map, mode):
            expected.append(row and (row[0] + int(sources.offsets[r]), row[1]))
    assert aligned.matches.tolist() == [-1 if row is None else row[0] for row in expected]
    assert (aligned.matches >= 0).sum() > 0.4 * len(expected)
    rows = [row for row in expected if row is not None]
    assert aligned.ids.shape == aligned.logprobs.shape == (len(rows), K)
    for (_, found), ids, logprobs in zip(rows, aligned.ids, aligned.logprobs, strict=True):
        entries = {
            int(i): math.exp(p)
            for i, p in zip(ids, logprobs.tolist(), strict=True)
            if p > -math.inf
        }
        largest = sorted(found.values(), reverse=True)[:K]
        values = np.exp(logprobs.astype(np.float64))
        np.testing.assert_allclose(values[: len(largest)], largest, rtol=0.01, atol=1e-7)
        for token, probability in entries.items():
            assert probability == pytest.approx(found[token], rel=0.01, abs=1e-7)
        assert values.sum() <= 1.01
    back = match_states(sources, pivots)
    pairs_forth = {(i, j) for i, j in enumerate(aligned.matches.tolist()) if j >= 0}
    assert pairs_forth == {(i, j) for j, i in enumerate(back.tolist()) if i >= 0}


def test_the_same_tokenizer_and_template_change_nothing():
    renderer = renderer_of("openchat")
    pivots = Responses.of([r for a in ANSWERS for r in scored(renderer, a, 1)])
    sources = Responses.of([r for a in ANSWERS for r in scored(renderer, a, 2)])
    sides = vocabulary_map_of(renderer, renderer, "em")
    for mode in ("em", "ms", "bytes", "mined"):
        same = VocabularyMap(sides.pivot, sides.source, mode, sides.ids, sides.kinds)
        aligned = align(pivots, sources, same)
        states = np.flatnonzero(pivots.at >= 0)
        assert aligned.matches[states].tolist() == states.tolist()
        assert aligned.ids.tobytes() == sources.ids[states].tobytes()
        assert aligned.logprobs.tobytes() == sources.logprobs[states].tobytes()


def test_the_same_tokenizer_under_another_template_changes_the_edges_only():
    pivot, source = renderer_of("openchat"), renderer_of("instruct")
    answers = ["日本 Hello.", "Hello there."]
    pivots, sources = sides_of(scored(pivot, answers, 1), scored(source, answers, 2))
    aligned = align(pivots, sources, vocabulary_map_of(pivot, source, "ms", PairCounts.empty()))
    rows = np.flatnonzero(aligned.matches >= 0)
    inside = ~pivots.is_begin[rows] & ~pivots.is_end[rows]
    states = aligned.matches[rows]
    assert (aligned.ids[inside] == sources.ids[states[inside]]).all()
    end_of_turn = pivot.roles()["end_of_turn"]
    for i in np.flatnonzero(pivots.is_end[rows]):
        stop = aligned.logprobs[i][aligned.ids[i] == end_of_turn].astype(float)
        assert stop == pytest.approx(sources.gold_logprobs[states[i]], abs=0.02)


def test_the_first_token_of_an_answer_is_learnt():
    pivot, source = renderer_of("openchat"), renderer_of("qwen")
    (left,), (right,) = scored(pivot, ["Hello."], 1), scored(source, ["Hello."], 2)
    assert (left.pending, right.pending) == (b" ", b"")
    hello, other = source.tokenizer("Hello Hel").input_ids[0], source.tokenizer("Good").input_ids[0]
    right.ids[0, :2], right.ids[0, 2:] = (hello, other), np.arange(4) + 40000
    right.logprobs[0] = np.log([0.5, 0.25, 0.01, 0.01, 0.01, 0.01])
    right.gold_logprobs[0] = math.log(0.5)
    for mode in ("em", "ms", "bytes"):
        vocabulary_map = vocabulary_map_of(pivot, source, mode, PairCounts.empty())
        aligned = align(Responses.of([left]), Responses.of([right]), vocabulary_map)
        words = token_bytes(pivot.tokenizer, aligned.ids[0, :2].tolist())
        assert words == [b" Hello", b" Good"]
        assert np.exp(aligned.logprobs[0, :2].astype(float)) == pytest.approx([0.5, 0.25], rel=2e-3)


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    pivot, source = renderer_of("openchat"), renderer_of("qwen")
    pivots = Responses.of([r for a in ANSWERS[:3] for r in scored(pivot, a, 1)])
    sources = Responses.of([r for a in ANSWERS[:3] for r in scored(source, a, 2)])
    vocabulary_map = vocabulary_map_of(pivot, source, "bytes")
    whole = align(pivots, sources, vocabulary_map)
    monkeypatch.setattr("fusechat_distill.alignment.positions.BLOCK", 4 * K)
    parts = align(pivots, sources, vocabulary_map)
    assert parts.ids.tobytes() == whole.ids.tobytes()
    assert parts.logprobs.tobytes() == whole.logprobs.tobytes()


def test_dtw_pairs_the_tokens_of_each_response():
    pivot, source = renderer_of("openchat"), renderer_of("qwen")
    answers = ["The cat sat.", "日本語 with café", "👩🏽‍🚀 ok"]
    left, right = scored(pivot, answers, 1), scored(source, answers, 2)
    sides = vocabulary(pivot.tokenizer), vocabulary(source.tokenizer)
    expected, before = [], 0
    for response, other in zip(left, right, strict=True):
        texts = [
            [side.tokens[i].decode(errors="surrogateescape") for i in tokens]
            for side, tokens in zip(sides, (response.tokens, other.tokens), strict=True)
        ]
        # Token t's partner is j: the states after both match, and so do the first.
        after = [
            before + j + 1 if 0 <= j < len(other.tokens) - 1 else -1 for j in plain_dtw(*texts)
        ]
        expected += [before, *after[:-1]]
        before += len(other.tokens)
    matches = match_states(*sides_of(left, right), "dtw", sides)
    assert matches.tolist() == expected
    by_bytes = match_states(*sides_of(left, right))
    assert matches.tolist() != by_bytes.tolist()
    # Of English words, whose tokens are the same, both ways say the same.
    assert matches[:5].tolist() == by_bytes[:5].tolist() == [0, 1, 2, 3, 4]


def test_counts_are_added_to_counts_only():
    with pytest.raises(TypeError, match="unsupported operand"):
        PairCounts.empty() + 3
