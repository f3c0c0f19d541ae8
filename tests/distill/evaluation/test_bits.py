"""Bits per byte against a dense float64 computation, with tokenizers of both kinds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusechat_distill.evaluation.bits import AnswerBits, answer_request
from fusechat_distill.scoring.engine import Scores
from fusechat_distill.scoring.transformers_engine import TransformersScorer
from fusechat_distill.text.conversations import Conversation, Message, Renderer
from fusechat_distill.text.tokens import vocabulary
from tests.support import chain, real_tokenizers
from tests.support.bits import answer_bits

CHATS = [
    [("user", "Hi?"), ("assistant", "Hello there.")],
    [
        ("user", "Où?"),
        ("assistant", "À Paris — là-bas, 東京 🙂"),
        ("user", "x"),
        ("assistant", "Ja."),
    ],
    [("user", "Code"), ("assistant", "def f(x):\n    return x + 1\n")],
    [("user", "Say it"), ("assistant", "  two spaces, no end")],
    [("user", "One"), ("assistant", "1")],
]


def conversations(chats=CHATS) -> list[Conversation]:
    return [
        Conversation(f"{i:032x}", i, tuple(Message(*turn) for turn in chat))
        for i, chat in enumerate(chats)
    ]


def counted(model, renderer: Renderer, chats: list[Conversation]) -> list[list[AnswerBits]]:
    known = vocabulary(renderer.tokenizer)
    ids = sorted(set(renderer.tokenizer.get_vocab().values()))
    scorer = TransformersScorer(model, ids, top_k=1, batch_tokens=64)
    renderings = renderer(chats)
    asked = [answer_request(c, r, known) for c, r in zip(chats, renderings, strict=True)]
    scores = scorer.score([one.request for one in asked])
    return [one.count(found) for one, found in zip(asked, scores, strict=True)]


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**chain.SIZES, vocab_size=len(tokenizer), initializer_range=0.5)
    return LlamaForCausalLM(config).eval()


BEFORE_STOP = real_tokenizers.CHATML.replace("<|im_end|>", "\\n\\n<|im_end|>")


@pytest.mark.parametrize(
    "kind",
    ["sentencepiece", "byte-level", "byte-level, plain text", "byte-level, text before the stop"],
)
def test_bits_are_the_dense_computation(kind):
    """OpenChat's template has the answer begin inside a token, the last two end inside one."""
    tokenizer = {
        "sentencepiece": real_tokenizers.mistral,
        "byte-level": real_tokenizers.qwen,
        "byte-level, plain text": lambda: real_tokenizers.qwen(template=real_tokenizers.PLAIN),
        "byte-level, text before the stop": lambda: byte_level(
            [b"\n\n", b".\n\n", b"d\n\n"], ["<|im_end|>", "<|im_start|>"], BEFORE_STOP
        ),
    }[kind]()
    model = llama(tokenizer)
    renderer = Renderer(tokenizer)
    chats = conversations()
    for chat, found in zip(chats, counted(model, renderer, chats), strict=True):
        for expected, one in zip(answer_bits(model, tokenizer, chat), found, strict=True):
            bits, tokens, num_bytes = expected
            assert one.bits == pytest.approx(bits, abs=2e-4)
            assert (one.tokens, one.num_bytes) == (tokens, num_bytes)
    responses = [response for rendering in renderer(chats) for response in rendering.responses]
    edges = sum(bool(r.pending) or r.end not in r.ends for r in responses)
    assert edges >= 4 or kind == "byte-level"


STOP = 0.1
LETTERS = {"a": 0.3, "b": 0.15, "c": 0.05, "é": 0.2, "ü": 0.1, "東": 0.2}
"""Prefix-free in UTF-8, so that a model of bytes can say just what a model of letters says."""


def byte_level(merged: list[bytes], specials: list[str], template: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of all bytes and these tokens, each the last of them plus bytes."""
    spell = real_tokenizers.byte_alphabet()
    tokens = {spell[b]: b for b in range(256)}
    merges = []
    for token in merged:
        for cut in range(1, len(token)):
            left, right = ("".join(spell[b] for b in part) for part in (token[:cut], token[cut:]))
            if left in tokens and right in tokens:
                merges.append((left, right))
                tokens.setdefault(left + right, len(tokens))
                break
        else:
            raise AssertionError(token)
    backend = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=specials[0], chat_template=template
    )


def bigram(logprobs: np.ndarray) -> LlamaForCausalLM:
    """A Llama whose next token depends on the last one alone: row i is log P(next | i)."""
    size = len(logprobs)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-12,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.from_numpy(logprobs).T / math.sqrt(size))
    return model


def test_equal_byte_probabilities_give_equal_bits():
    """One model spells letters in bytes behind a line break, the other has a token for each letter
    and for each with a space before it, which the template's `A: ` ends in."""
    chatml = real_tokenizers.CHATML
    plain = (
        "{% for m in messages %}{{ ('A: ' if m['role'] == 'assistant' else 'Q: ') + m['content'] "
        "+ '</s>' }}{% endfor %}"
    )
    tiny = 1e-30
    bytewise = byte_level([], ["<|im_end|>", "<|im_start|>"], chatml)
    table = np.full((len(bytewise), len(bytewise)), tiny)
    end = bytewise.eos_token_id
    for last in ["\n", *LETTERS]:
        here = table[last.encode()[-1]]
        share = 1.0 if last == "\n" else 1 - STOP
        here[end] = 1 - share or tiny
        for letter, p in LETTERS.items():
            here[letter.encode()[0]] += share * p
    lead = LETTERS["é"] + LETTERS["ü"]
    for letter in ("é", "ü"):
        table[0xC3, letter.encode()[1]] = LETTERS[letter] / lead
    for one, two in zip("東".encode(), "東".encode()[1:], strict=False):
        table[one, two] = 1.0
    assert len({letter.encode()[-1] for letter in LETTERS}) == len(LETTERS)
    by_bytes = bigram(np.log(table))

    letters = [letter.encode() for letter in LETTERS if len(letter.encode()) > 1]
    whole = [
        t for letter in letters for t in ([letter[:2], letter] if len(letter) > 2 else [letter])
    ]
    spaced = [b" " + letter.encode() for letter in LETTERS]
    lettered = byte_level([*whole, *spaced], ["</s>"], plain)
    ids = vocabulary(lettered).by_bytes
    table = np.full((len(lettered), len(lettered)), tiny)
    for letter, p in LETTERS.items():
        table[ids[b":"], ids[b" " + letter.encode()]] = 0.3 * p
        for last in LETTERS:
            for token in (ids[last.encode()], ids[b" " + last.encode()]):
                table[token, ids[letter.encode()]] = (1 - STOP) * p
                table[token, lettered.eos_token_id] = STOP
    table[ids[b":"], ids[b"x"]] = 0.7
    by_letters = bigram(np.log(table))

    rng = np.random.default_rng(0)
    said = ["".join(rng.choice(list(LETTERS), 1 + i, p=[*LETTERS.values()])) for i in range(12)]
    chats = conversations([[("user", "Q"), ("assistant", text)] for text in said])
    spelt = counted(by_bytes, Renderer(bytewise), chats)
    told = counted(by_letters, Renderer(lettered), chats)
    for text, (one,), (other,) in zip(said, spelt, told, strict=True):
        truth = -sum(math.log2(LETTERS[letter]) for letter in text)
        truth -= (len(text) - 1) * math.log2(1 - STOP)
        assert one.bits == pytest.approx(truth, abs=1e-4)
        assert other.bits == pytest.approx(truth, abs=1e-4)
        assert one.num_bytes == other.num_bytes == len(text.encode())
        assert (one.tokens, other.tokens) == (len(text.encode()), len(text))
        assert one.end_bits == pytest.approx(other.end_bits, abs=1e-4)
        assert one.end_bits == pytest.approx(-math.log2(STOP), abs=1e-4)


def test_what_max_length_cuts_is_not_counted():
    tokenizer = real_tokenizers.qwen()
    renderer = Renderer(tokenizer)
    (chat,) = conversations([[("user", "Hi"), ("assistant", "one two three four five six")]])
    (whole,) = renderer([chat])
    cut, _ = whole.cut_to(len(whole.input_ids) - 3)
    known = vocabulary(tokenizer)
    part = answer_request(chat, cut, known)
    assert len(part.request.positions) == len(cut.responses[0].ends)
    gold = np.full(len(part.request.positions), -math.log(2), np.float32)
    (found,) = part.count(
        Scores(np.zeros((len(gold), 1), np.uint32), gold[:, None], gold, np.zeros(0, np.float32))
    )
    assert found.end_bits is None
    assert found.num_bytes == int(cut.responses[0].ends[-1]) < cut.responses[0].end
    assert found.bits == pytest.approx(len(gold))


@pytest.mark.parametrize("prefix", [b" ", b"\n", b"\xc3", b"\xff", b"zzzzzz", b" the"])
def test_tokens_that_begin_with(prefix):
    for tokenizer in (real_tokenizers.qwen(), real_tokenizers.mistral()):
        known = vocabulary(tokenizer)
        expected = [i for i, t in enumerate(known.tokens) if known.text[i] and t.startswith(prefix)]
        assert known.beginning_with(prefix).tolist() == expected
