"""Token bytes and ends, over two real tokenizers and small ones of other kinds."""

import copy
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fusechat_common.errors import RequestError
from fusechat_distill.text.tokens import first_tokens, token_bytes, tokenize, vocabulary
from tests.support import real_tokenizers
from tests.support.texts import PIECES, texts

TOKENIZERS = {
    "mistral-metaspace": lambda: real_tokenizers.mistral("metaspace"),
    "mistral-normalizer": lambda: real_tokenizers.mistral("normalizer"),
    "qwen-nfc": lambda: real_tokenizers.qwen(True),
    "qwen": lambda: real_tokenizers.qwen(False),
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def seen(tokenizer, text: str) -> str:
    """What the tokenizer saw of a text without special tokens, dummy prefix apart."""
    if tokenizer.convert_tokens_to_ids("▁the") != tokenizer.unk_token_id:
        return text.replace("▁", " ")
    return unicodedata.normalize("NFC", text) if tokenizer.backend_tokenizer.normalizer else text


def test_the_mistral_tokenizer_tokenizes_as_sentencepiece_does():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(real_tokenizers.mistral_model()))
    tokenizer = real_tokenizers.mistral("normalizer")
    text = "".join(piece for piece in PIECES if "<" not in piece)
    # Runs of more than 16 spaces are merged in an order that a merge list can't say.
    for line in [text, *PIECES[:20]]:
        assert tokenizer(line, add_special_tokens=False)["input_ids"] == model.encode(line)


@settings(max_examples=100)
@given(text=texts(specials=False))
def test_bytes_tile_what_the_tokenizer_saw(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(token_bytes(tokenizer, ids))
    assert joined in (seen(tokenizer, text).encode(), b" " + seen(tokenizer, text).encode())


@settings(max_examples=100)
@given(text=texts(specials=False))
def test_ends_are_where_the_consumed_text_ends(tokenizer, text):
    (tokens,) = tokenize(tokenizer, [text])
    raw = text.encode()
    consumed = b""
    for token, end in zip(token_bytes(tokenizer, tokens.ids.tolist()), tokens.ends, strict=True):
        consumed += token
        if end >= 0:
            if tokens.dummy[0]:
                assert consumed[:1] == b" "
            without_dummy = consumed[1:] if tokens.dummy[0] else consumed
            before = raw[:end].decode(errors="ignore")
            expected = seen(tokenizer, before).encode() + raw[len(before.encode()) : end]
            # A dummy prefix before a literal ▁ is not told apart from the ▁.
            assert without_dummy in (expected, b" " + expected)
    assert tokens.ends[-1] == len(raw)
    known = tokens.ends[tokens.ends >= 0]
    assert (np.diff(known) >= 0).all()


@settings(max_examples=60)
@given(text=texts(specials=False))
def test_every_end_is_known_where_nothing_was_normalised(tokenizer, text):
    if seen(tokenizer, text) == text:
        (tokens,) = tokenize(tokenizer, [text])
        lengths = [len(token) for token in token_bytes(tokenizer, tokens.ids.tolist())]
        assert (tokens.ends == np.cumsum(lengths) - int(tokens.dummy[0])).all()


def test_a_normalised_text_is_mapped_back(qwen):
    """NFC joins letters and marks; ends are where the letter and its mark end in the text, and
    unknown inside of what was joined."""
    expected = {
        "cafe\u0301 na\u0308ive \u1100\u1161\u11a8!": [
            (b"ca", 2),
            ("fé".encode(), 6),
            (" nä".encode(), 11),
            (b"ive", 14),
            (" 각".encode(), 24),
            (b"!", 25),
        ],
        "A\u030a n\u0303o": [("Å".encode(), 3), (b" \xc3", -1), (b"\xb1", 7), (b"o", 8)],
    }
    for text, ends in expected.items():
        (tokens,) = tokenize(qwen, [text])
        pieces = token_bytes(qwen, tokens.ids.tolist())
        assert list(zip(pieces, tokens.ends.tolist(), strict=True)) == ends


def test_special_tokens_are_no_text_and_bound_the_dummy_prefix():
    text = "<s>Hi there<|end_of_turn|>日<s>  x"
    for prefix, dummies in (("normalizer", 3), ("metaspace", 0)):
        tokenizer = real_tokenizers.mistral(prefix)
        (tokens,) = tokenize(tokenizer, [text])
        assert tokens.dummy.sum() == dummies
        special = np.flatnonzero(tokens.special)
        assert token_bytes(tokenizer, tokens.ids[special].tolist()) == [b"", b"", b""]
        assert tokens.starts[special].tolist() == [0, 11, 29]
        assert tokens.ends[special].tolist() == [3, 26, 32]
        assert tokens.ends[-1] == len(text.encode())
        assert (tokens.ends >= 0).all()


def test_added_tokens_that_are_not_special_stand_for_their_own_text():
    for build in (real_tokenizers.qwen, real_tokenizers.mistral):
        tokenizer = copy.deepcopy(build())
        tokenizer.add_tokens([AddedToken("<table>\n", special=False, normalized=False)])
        (tokens,) = tokenize(tokenizer, ["a<table>\nb"])
        pieces = token_bytes(tokenizer, tokens.ids.tolist())
        assert tokens.ends[pieces.index(b"<table>\n")] == 9
        assert tokens.ends[-1] == 10


def test_a_byte_level_piece_outside_the_alphabet_stands_for_itself():
    backend = Tokenizer(models.BPE({"a": 0, "日本": 1, "Ġa": 2}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_bytes(made, [0, 1, 2]) == [b"a", "日本".encode(), b" a"]


def small_unigram() -> PreTrainedTokenizerFast:
    pieces = [
        "<unk>",
        "▁",
        "▁the",
        "▁fi",
        "nance",
        "t",
        "h",
        "e",
        "f",
        "i",
        "n",
        "a",
        "c",
        "é",
        "▁▁",
    ]
    backend = Tokenizer(
        models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], 0)
    )
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_tokens([AddedToken("▁▁", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_unigram_with_nfkc():
    tokenizer = small_unigram()
    text = "the \ufb01nance e\u0301"
    (tokens,) = tokenize(tokenizer, [text])
    assert b"".join(token_bytes(tokenizer, tokens.ids.tolist())) == " the finance é".encode()
    assert tokens.ends[-1] == len(text.encode())
    assert tokens.ends[0] == 3
    # A piece with the marker for a space is what it decodes to, added token or not.
    assert token_bytes(tokenizer, [tokenizer.convert_tokens_to_ids("▁▁")]) == [b"  "]


def test_an_end_inside_a_normalised_character_is_not_known():
    backend = Tokenizer(models.BPE({"f": 0, "i": 1, "x": 2}, []))
    backend.normalizer = normalizers.NFKC()
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (tokens,) = tokenize(tokenizer, ["x\ufb01x"])
    assert token_bytes(tokenizer, tokens.ids.tolist()) == [b"x", b"f", b"i", b"x"]
    assert tokens.ends.tolist() == [1, -1, 4, 5]


def test_where_text_has_no_token_an_end_is_not_guessed():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    (tokens,) = tokenize(PreTrainedTokenizerFast(tokenizer_object=backend), ["a日b"])
    assert (tokens.ids.tolist(), tokens.ends.tolist()) == ([0, 1], [1, -1])


def lossy(kind: str) -> PreTrainedTokenizerFast:
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece()
    elif kind == "suffix":
        backend = Tokenizer(models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel()
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer(models.BPE({"a": 0}, []))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("WordPiece", "WordPiece"), ("suffix", "suffix"), ("no decoder", "no decoder")],
)
def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused(kind, why):
    with pytest.raises(RequestError, match=why):
        vocabulary(lossy(kind))


def test_a_tokenizer_that_is_written_in_python_is_refused():
    with pytest.raises(RequestError, match="ByT5Tokenizer: it is not backed by the `tokenizers`"):
        vocabulary(ByT5Tokenizer())


def test_an_id_beyond_the_vocabulary_is_refused(qwen):
    with pytest.raises(ValueError, match="151936"):
        token_bytes(qwen, [1, 151936])
    with pytest.raises(ValueError, match="-1"):
        token_bytes(qwen, [-1])


def test_the_vocabulary_holds_every_token_once(tokenizer):
    table = vocabulary(tokenizer)
    assert len(table) == len(tokenizer)
    assert not table.text[tokenizer.all_special_ids].any()
    assert [table.tokens[i] for i in tokenizer.all_special_ids] == [b""] * len(
        tokenizer.all_special_ids
    )
    assert all(table.tokens[i] == text for text, i in table.by_bytes.items())
    # All 256 bytes can be written, alone or (a SentencePiece character) in a longer token.
    assert {bytes([byte]) for byte in range(256)} <= set(table.by_bytes)


def test_first_tokens_are_those_of_mid_text(mistral, qwen):
    texts = [
        b" the",
        b"the",
        b"ing",
        b"\n",
        b"\n\n\n",
        "日本".encode(),
        b"   x",
        b"\xe6\x97",
        b"</s>",
    ]
    first = token_bytes(qwen, first_tokens(qwen, texts).tolist())
    assert first[:4] == [b" the", b"the", b"ing", b"\n"]
    assert first[4:] == [b"\n\n\n", "日本".encode(), b"  ", b"\xe6\x97", b"</"]
    first = token_bytes(mistral, first_tokens(mistral, texts).tolist())
    assert first[:4] == [b" the", b"the", b"ing", b"\n"]
    assert first[4:7] == [b"\n", "日".encode(), b"  "]
    assert first[7] == b"\xe6"
    assert first[8] == b"</"


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Fuse(), decoders.Metaspace()])
def test_marked_spaces_have_to_be_turned_back(decoder):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoder
    backend.train_from_iterator(["a cat"] * 3, trainers.BpeTrainer(show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    if isinstance(decoder, decoders.Metaspace):
        assert b"".join(token_bytes(made, made("a cat")["input_ids"])) == b"a cat"
    else:
        with pytest.raises(RequestError, match="replaces spaces in a way that its decoder"):
            vocabulary(made)


@pytest.mark.parametrize(
    ("pre_tokenizer", "refused"),
    [
        (pre_tokenizers.Whitespace(), True),
        (pre_tokenizers.Split(" ", "removed"), True),
        (pre_tokenizers.Split(Regex(r"\w+|\W+"), "removed", invert=True), False),
        (pre_tokenizers.Split(" ", "isolated"), False),
    ],
)
def test_a_pre_tokenizer_that_loses_text_is_refused(pre_tokenizer, refused):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, level])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["a cat"], trainers.BpeTrainer(initial_alphabet=level.alphabet(), show_progress=False)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    if refused:
        with pytest.raises(RequestError, match="its pre-tokenizer removes white space"):
            vocabulary(made)
    else:
        ids = made("a cat", add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(made, ids)) == b"a cat"
