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


def fast(model, **parts) -> PreTrainedTokenizerFast:
    """A tokenizer of this model: its decoder, and where given its normalizer or pre-tokenizer."""
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def trained(texts: list[str], trainer: trainers.BpeTrainer, **parts) -> PreTrainedTokenizerFast:
    made = fast(models.BPE(), **parts)
    made.backend_tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer)


def test_a_byte_level_piece_outside_the_alphabet_stands_for_itself():
    made = fast(
        models.BPE({"a": 0, "日本": 1, "Ġa": 2}, []),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    assert token_bytes(made, [0, 1, 2]) == [b"a", "日本".encode(), b" a"]


def test_unigram_with_nfkc():
    pieces = ["<unk>", "▁", "▁the", "▁fi", "nance", *"thefinacé", "▁▁"]
    scores = [(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(scores, 0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_tokens([AddedToken("▁▁", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    text = "the \ufb01nance e\u0301"
    (tokens,) = tokenize(tokenizer, [text])
    assert b"".join(token_bytes(tokenizer, tokens.ids.tolist())) == " the finance é".encode()
    assert tokens.ends[-1] == len(text.encode())
    assert tokens.ends[0] == 3
    # A piece with the marker for a space is what it decodes to, added token or not.
    assert token_bytes(tokenizer, [tokenizer.convert_tokens_to_ids("▁▁")]) == [b"  "]


@pytest.mark.parametrize(
    ("tokens", "normalizer", "text", "pieces", "ends"),
    [
        # An end inside a normalised character isn't known.
        ("fix", normalizers.NFKC(), "x\ufb01x", [b"x", b"f", b"i", b"x"], [1, -1, 4, 5]),
        # Where text has no token an end isn't guessed.
        ("ab", normalizers.NFC(), "a日b", [b"a", b"b"], [1, -1]),
    ],
)
def test_an_end_that_is_not_known(tokens, normalizer, text, pieces, ends):
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [])
    tokenizer = fast(model, normalizer=normalizer, decoder=decoders.Fuse())
    (found,) = tokenize(tokenizer, [text])
    assert token_bytes(tokenizer, found.ids.tolist()) == pieces
    assert found.ends.tolist() == ends


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (
            fast(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), decoder=decoders.WordPiece()),
            "WordPiece",
        ),
        (
            fast(
                models.BPE({"a</w>": 0, "a": 1}, [], end_of_word_suffix="</w>"),
                pre_tokenizer=pre_tokenizers.ByteLevel(),
                decoder=decoders.ByteLevel(),
            ),
            "suffix",
        ),
        (
            fast(models.BPE({"a": 0}, []), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
            "no decoder",
        ),
        (ByT5Tokenizer(), "ByT5Tokenizer: it is not backed by the `tokenizers`"),
    ],
    ids=["WordPiece", "suffix", "no decoder", "in Python"],
)
def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused(tokenizer, why):
    with pytest.raises(RequestError, match=why):
        vocabulary(tokenizer)


@pytest.mark.parametrize("beyond", [151936, -1])
def test_an_id_beyond_the_vocabulary_is_refused(qwen, beyond):
    with pytest.raises(ValueError, match=str(beyond)):
        token_bytes(qwen, [1, beyond])


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
    japanese, byte = "日本".encode(), b"\xe6\x97"
    texts = [b" the", b"the", b"ing", b"\n", b"\n\n\n", japanese, b"   x", byte, b"</s>"]
    same = [b" the", b"the", b"ing", b"\n"]
    for tokenizer, others in (
        (qwen, [b"\n\n\n", japanese, b"  ", byte, b"</"]),
        (mistral, [b"\n", "日".encode(), b"  ", b"\xe6", b"</"]),
    ):
        first = token_bytes(tokenizer, first_tokens(tokenizer, texts).tolist())
        assert first == same + others


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), decoders.Fuse(), decoders.Metaspace()])
def test_marked_spaces_have_to_be_turned_back(decoder):
    marking = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(show_progress=False)
    made = trained(["a cat"] * 3, trainer, pre_tokenizer=marking, decoder=decoder)
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
    both = pre_tokenizers.Sequence([pre_tokenizer, level])
    trainer = trainers.BpeTrainer(initial_alphabet=level.alphabet(), show_progress=False)
    made = trained(["a cat"], trainer, pre_tokenizer=both, decoder=decoders.ByteLevel())
    if refused:
        with pytest.raises(RequestError, match="its pre-tokenizer removes white space"):
            vocabulary(made)
    else:
        ids = made("a cat", add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(made, ids)) == b"a cat"
