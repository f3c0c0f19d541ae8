"""The bytes that a tokenizer's tokens stand for, and where tokens end in a text."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The bytes of every token id of a tokenizer.

    `tokens[id]` is the UTF-8 that the token adds to a text, `b""` for special tokens and for ids
    without a token; `text[id]` (bool) is false for these two. `fallback`: ids of single bytes that
    the tokenizer uses only where no other token fits (SentencePiece's byte fallback). `fingerprint`
    is a hash of `tokens` and `text`.
    """

    tokens: tuple[bytes, ...]
    text: NDArray[np.bool_]
    fallback: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[len(self)], bytes of each token."""
        return np.fromiter(map(len, self.tokens), dtype=np.int64, count=len(self.tokens))

    @cached_property
    def _longest(self) -> int:
        return int(self.lengths.max(initial=0))

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes to token id; of several with the same bytes the lowest, fallback tokens last."""
        ids: dict[bytes, int] = {}
        text = np.flatnonzero(self.text).tolist()
        for token_id in sorted(text, key=lambda i: (i in self.fallback, i)):
            ids.setdefault(self.tokens[token_id], token_id)
        return ids

    def longest_prefix(self, text: bytes) -> int:
        """The longest token that the text begins with, or -1."""
        for length in range(min(len(text), self._longest), 0, -1):
            if (token := self.by_bytes.get(text[:length])) is not None:
                return token
        return -1

    @cached_property
    def _in_order(self) -> list[tuple[bytes, int]]:
        return sorted((self.tokens[i], i) for i in np.flatnonzero(self.text).tolist())

    def beginning_with(self, text: bytes) -> NDArray[np.int64]:
        """Ids of the tokens whose bytes begin with `text`, ascending."""
        tokens = self._in_order
        start = bisect.bisect_left(tokens, (text, -1))
        # UTF-8 never contains the byte 0xff; a byte-level token may be that single byte.
        stop = bisect.bisect_right(tokens, (text + b"\xff" * (self._longest + 1), -1), start)
        return np.sort(np.array([i for _, i in tokens[start:stop]], dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self.text.tobytes())
        digest.update(b"".join(self.tokens))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Tokenization:
    """A text's tokens and the bytes at which they end."""

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]
    """[n], offset in the text's UTF-8 after each token; -1 if a normaliser changed the text so that
    the offset is unknown."""
    dummy: NDArray[np.bool_]
    """[n], the token begins with a space that the tokenizer added and the text does not have."""
    special: NDArray[np.bool_]
    """[n], the token is special: it stands for no text."""
    starts: NDArray[np.int64]
    """[n], where a special token's own spelling starts; -1 for the others."""


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The bytes of all tokens, read from the tokenizer's decoder, pre-tokenizer and normaliser.

    Raises:
        RequestError: the tokens do not stand for bytes of the text (WordPiece, end-of-word
            suffixes), or the tokenizer is not backed by the `tokenizers` library.
    """
    return _reading(tokenizer).vocabulary


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The exact bytes that each token stands for.

    Special tokens stand for none, other added tokens for their own text. Joined, the bytes are the
    text that the tokenizer saw; a SentencePiece tokenizer's dummy prefix is a space. The bytes of a
    token need not be valid UTF-8.

    Raises:
        ValueError: an id without a token.
    """
    reading = _reading(tokenizer)
    tokens = reading.vocabulary.tokens
    unknown = [i for i in ids if not 0 <= i < len(tokens) or i in reading.holes]
    if unknown:
        raise ValueError(
            f"token id {unknown[0]} is not in the tokenizer's vocabulary of {len(tokens)} ids; "
            "ids from a model whose output is padded beyond its tokenizer must be left out"
        )
    return [tokens[i] for i in ids]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokenization]:
    """Tokenise texts without adding special tokens; those spelt in a text are parsed."""
    if not texts:
        return []
    reading = _reading(tokenizer)
    batch = _encode(tokenizer, texts, return_offsets_mapping=True)
    return [
        reading.locate(text, ids, spans)
        for text, ids, spans in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: bool
) -> Mapping[str, Any]:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )


# Prefixes with which a text is tokenised as in the middle of a text: without a dummy prefix, and
# without a token across the boundary. The first prefix that is not merged with the text is used.
_ANCHORS = ("\n", "a", ".", "0", "。", "\x00")


def first_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes]) -> NDArray[np.int64]:
    """The first token of each text, int64 [len(texts)], tokenised as in the middle of a text.

    For bytes that are not UTF-8, or that the tokenizer merges with every prefix, it is the longest
    token that the bytes begin with, or -1.
    """
    reading = _reading(tokenizer)
    first = np.full(len(texts), -1, dtype=np.int64)
    todo: list[tuple[int, str]] = []
    for i, raw in enumerate(texts):
        try:
            todo.append((i, raw.decode()))
        except UnicodeDecodeError:
            continue
    for anchor in _ANCHORS:
        joined: list[tuple[int, str]] = []
        for block in range(0, len(todo), 4096):
            part = todo[block : block + 4096]
            encoded = _encode(tokenizer, [anchor + text for _, text in part])["input_ids"]
            for (i, text), ids in zip(part, encoded, strict=True):
                first[i] = reading.token_at(len(anchor.encode()), ids, (anchor + text).encode())
                if first[i] < 0:
                    joined.append((i, text))
        todo = joined
    for i in np.flatnonzero(first < 0).tolist():
        first[i] = reading.vocabulary.longest_prefix(texts[i])
    return first


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that tokenising depends on, 64 hex digits."""
    reading = _reading(tokenizer)
    if reading.fingerprint is None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding"):  # settings of the last call, not of the tokenizer
            del content[key]
        content["specials"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
        text = json.dumps(content, sort_keys=True)
        reading.fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return reading.fingerprint


def _components(component: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a normaliser, pre-tokenizer or decoder in order, sequences flattened."""
    if component is None:
        return
    parts = [json.loads(component.__getstate__())]
    while parts:
        part = parts.pop(0)
        nested = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
        if part["type"] == "Sequence":
            parts = list(nested or ()) + parts
        else:
            yield part


def _byte_level_alphabet() -> dict[str, int]:
    """Character to byte of the byte-level alphabet.

    Printable bytes are their own Latin-1 characters, the others follow in order from U+0100.
    """
    from tokenizers import pre_tokenizers

    own = set(pre_tokenizers.ByteLevel.alphabet())
    shifted = itertools.count(0x100)
    return {chr(b if chr(b) in own else next(shifted)): b for b in range(256)}


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Reading:
    """How one tokenizer's tokens are read as bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if backend is None or not hasattr(backend, "decoder"):
            raise RequestError(
                "it is not backed by the `tokenizers` library; use a model with a tokenizer.json",
                f"tokenizer {name}",
            )
        self.normalizer = backend.normalizer
        decoder = list(_components(backend.decoder))
        normalizer = list(_components(backend.normalizer))
        splits = list(_components(backend.pre_tokenizer))
        self.normalizes_to_bytes = any(part["type"] == "ByteLevel" for part in normalizer)
        byte_level = any(part["type"] == "ByteLevel" for part in decoder + splits + normalizer)
        self.piece_bytes = self._byte_level if byte_level else self._sentence_piece
        self.alphabet = _byte_level_alphabet()
        self.markers: list[tuple[str, str]] = []
        self.byte_fallback = bool(getattr(backend.model, "byte_fallback", False))
        problem = _lossy(backend.model)
        if any(map(_removes, splits)):
            problem = "its pre-tokenizer removes white space"
        for part in decoder:
            kind = part["type"]
            if kind == "Replace" and "String" in part["pattern"]:
                self.markers.append((part["pattern"]["String"], part["content"]))
            elif kind == "Metaspace":
                self.markers.append((part["replacement"], " "))
            elif kind == "ByteFallback":
                self.byte_fallback = True
            elif kind not in ("ByteLevel", "Fuse", "Strip"):
                problem = f"its decoder has a {kind} step"
        marks = {marker for marker, _ in self.markers} | {" "}
        if any(_space_mark(part) not in marks for part in splits + normalizer):
            problem = "it replaces spaces in a way that its decoder does not reverse"
        if not decoder and not byte_level and backend.pre_tokenizer:
            problem = "it has a pre-tokenizer but no decoder"
        if problem:
            raise RequestError(
                f"the bytes of its tokens can't be determined: {problem}; supported are "
                "byte-level BPE and SentencePiece-style BPE and Unigram",
                f"tokenizer {name}",
            )
        self.fingerprint: str | None = None
        self._read_vocabulary(tokenizer)

    def _read_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pieces = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        specials = set(tokenizer.all_special_ids)
        specials.update(i for i, token in added.items() if token.special)
        size = 1 + max(max(pieces.values(), default=-1), max(added, default=-1))
        tokens, text = [b""] * size, np.zeros(size, dtype=np.bool_)
        known = np.zeros(size, dtype=np.bool_)
        for piece, i in pieces.items():
            known[i] = True
            if i in specials:
                continue
            # An added token stands for its own text, unless it contains the marker for a space
            # (Gemma's runs of spaces): then it stands for what it decodes to.
            own = i in added and not any(marker in piece for marker, _ in self.markers)
            tokens[i] = piece.encode() if own else self.piece_bytes(piece)
            text[i] = bool(tokens[i])
        single = (i for piece, i in pieces.items() if text[i] and _BYTE_PIECE.fullmatch(piece))
        fallback = frozenset(single if self.byte_fallback else ())
        text.setflags(write=False)
        self.vocabulary = Vocabulary(tuple(tokens), text, fallback)
        self.holes = frozenset(np.flatnonzero(~known).tolist())
        self.special = np.zeros(size, dtype=np.bool_)
        self.special[sorted(i for i in specials if 0 <= i < size)] = True
        self.size = len(tokenizer)

    def _byte_level(self, piece: str) -> bytes:
        try:
            return bytes(map(self.alphabet.__getitem__, piece))
        except KeyError:  # not in the alphabet, so it stands for itself
            return piece.encode()

    def _sentence_piece(self, piece: str) -> bytes:
        if self.byte_fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return self._marked(piece)

    def token_at(self, offset: int, ids: Sequence[int], text: bytes) -> int:
        """The token of `ids` that starts at byte `offset` of the text, or -1."""
        pieces = [self.vocabulary.tokens[i] for i in ids]
        seen = b"".join(pieces)
        extra = len(seen) - len(text)
        if seen != (b" " + text if extra == 1 else text):
            return -1
        left = offset + extra
        for token, piece in zip(ids, pieces, strict=True):
            if left == 0:
                return token
            left -= len(piece)
        return -1

    def seen(self, text: str) -> bytes:
        """The bytes of a piece of text as the tokenizer sees it, normalised."""
        if self.normalizer is not None:
            text = self.normalizer.normalize_str(text)
        return self.piece_bytes(text) if self.normalizes_to_bytes else self._marked(text)

    def _marked(self, text: str) -> bytes:
        for marker, replacement in self.markers:
            text = text.replace(marker, replacement)
        return text.encode()

    def locate(
        self, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> Tokenization:
        """Find where each token ends.

        Tokens between two special tokens tile the text between them, with or without a dummy
        prefix. Where they do not, character offsets say which tokens belong to which text.
        """
        n = len(ids)
        token_ids = np.asarray(ids, dtype=np.int64)
        special, dummy = self.special[token_ids], np.zeros(n, dtype=np.bool_)
        unknown = np.full(n, -1, dtype=np.int64)
        result = Tokenization(token_ids, unknown, dummy, special, unknown.copy())
        at = byte_offsets(text)
        first, begin = 0, 0  # token and character at which the segment begins
        for border in [*np.flatnonzero(special).tolist(), n]:
            end = spans[border][0] if border < n else len(text)
            if first < border:
                self._locate_segment(result, text, spans, at, (first, border), (begin, end))
            if border < n:
                result.starts[border] = at[end]
                begin = spans[border][1]
                result.ends[border] = at[begin]
            first = border + 1
        return result

    def _locate_segment(
        self,
        result: Tokenization,
        text: str,
        spans: Sequence[tuple[int, int]],
        at: NDArray[np.int64],
        tokens: tuple[int, int],
        characters: tuple[int, int],
    ) -> None:
        """Set `ends` and `dummy` of the tokens first..last, which stand for text[begin:end]."""
        first, last = tokens
        begin, end = characters
        if self._tile(result, text[begin:end], tokens, int(at[begin]), prefix=True):
            return
        for group, (start, stop) in _overlapping(spans, first, last):
            after = spans[group[1]][0] if group[1] < last else end
            # Characters in no token's span were merged into the token before them.
            if group[0] == first:
                start = begin
            for upto in (stop, after):
                piece = text[start:upto]
                # The tokens are the text (a segment's first ones maybe after a dummy prefix), or
                # the normalised text, of which only the end is known.
                if self._tile(result, piece, group, int(at[start]), prefix=group[0] == first):
                    break
                seen = self._join(result.ids, *group)
                if self.seen(piece) in (seen, b" " + seen):
                    result.ends[group[1] - 1] = at[upto]
                    break

    def _join(self, ids: NDArray[np.int64], first: int, last: int) -> bytes:
        tokens = self.vocabulary.tokens
        return b"".join([tokens[i] for i in ids[first:last].tolist()])

    def _tile(
        self, result: Tokenization, text: str, tokens: tuple[int, int], offset: int, *, prefix: bool
    ) -> bool:
        """Set `ends` if the tokens are the text, or (if allowed) a dummy prefix and the text."""
        first, last = tokens
        expected, seen = text.encode(), self._join(result.ids, first, last)
        extra = len(seen) - len(expected)
        if seen != (b" " + expected if prefix and extra == 1 else expected):
            return False
        result.dummy[first] = extra == 1
        lengths = self.vocabulary.lengths[result.ids[first:last]]
        result.ends[first:last] = offset - extra + np.cumsum(lengths)
        return True


def _overlapping(
    spans: Sequence[tuple[int, int]], first: int, last: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Groups of tokens whose character spans overlap: (first, last), (begin, end)."""
    begin, end, start = spans[first][0], spans[first][1], first
    for i in range(first + 1, last):
        a, b = spans[i]
        if a >= end and b > a:
            yield (start, i), (begin, end)
            begin, end, start = a, b, i
        end = max(end, b)
    yield (start, last), (begin, end)


def byte_offsets(text: str) -> NDArray[np.int64]:
    """[len(text) + 1], the UTF-8 offset of each character and of the end."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])


def _removes(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer removes text between its pieces."""
    if pre_tokenizer.get("behavior") == "Removed":
        return not pre_tokenizer.get("invert")  # inverted, the pattern matches what is kept
    removing = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
    return pre_tokenizer["type"] in removing


def _space_mark(part: Mapping[str, Any]) -> str:
    """What a pre-tokenizer or normaliser replaces a space with; a space if it does not."""
    if part["type"] == "Metaspace":
        return str(part["replacement"])
    if part["type"] == "Replace" and part["pattern"].get("String") == " ":
        return str(part["content"])
    return " "


def _lossy(model: Any) -> str | None:
    kind = type(model).__name__
    if kind not in ("BPE", "Unigram"):
        return f"its model is {kind}"
    affixes = ("end_of_word_suffix", "continuing_subword_prefix")
    if any(getattr(model, affix, None) for affix in affixes):
        return "its tokens carry a word prefix or suffix"
    return None


_readings: weakref.WeakKeyDictionary[Any, _Reading] = weakref.WeakKeyDictionary()


def _reading(tokenizer: PreTrainedTokenizerBase) -> _Reading:
    reading = _readings.get(tokenizer)
    if reading is None or reading.size != len(tokenizer):
        reading = _readings[tokenizer] = _Reading(tokenizer)
    return reading
