"""Two real tokenizers without a hub, from the data files of two PyPI packages.

Mistral's SentencePiece vocabulary (32,000 pieces, the one OpenChat-3.5 builds on) lies in
`mistral-common`, Qwen's byte-level BPE (151,643 tokens) in `qwen-agent`. The packages are
installed without their dependencies and never imported; only their files are read.
"""

from __future__ import annotations

import base64
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
)
OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] + '<|end_of_turn|>' }}{% else %}"
    "{{ 'GPT4 Correct ' + message['role'].title() + ': ' + message['content'] "
    "+ '<|end_of_turn|>' }}{% endif %}{% endfor %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('Only user and assistant roles are supported') }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ '### ' + message['role'].title() + ':\\n' "
    "+ message['content'] + '\\n\\n' }}{% endfor %}"
)


def data_file(distribution: str, name: str) -> Path:
    """A file of an installed distribution, which need not be importable."""
    for file in importlib.metadata.files(distribution) or ():
        if str(file).endswith(name):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{distribution} holds no {name}; install it with `make install`")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of bytes, as the tokenizers library has it."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


def mistral_model() -> Path:
    return data_file("mistral-common", "data/tokenizer.model.v1")


@lru_cache
def mistral(
    prefix: Literal["normalizer", "metaspace"] = "metaspace", template: str = OPENCHAT
) -> PreTrainedTokenizerFast:
    """Mistral's vocabulary with OpenChat's two added specials.

    `prefix` says where the dummy prefix comes from: a normaliser, that adds it after every special
    token (legacy Llama), or a Metaspace pre-tokenizer, that adds it at the text's beginning.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model()))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    scores = [model.get_score(i) for i in range(len(model))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    # SentencePiece merges whatever gives the piece of the highest score; a merge list says the same
    # when it is sorted by the merged piece's score.
    merges = [
        (-scores[i], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[merge[3:] for merge in sorted(merges)],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first", split=False
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in ("<unk>", "<s>", "</s>", "<|end_of_turn|>", "<|pad_0|>")
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|pad_0|>",
        chat_template=template,
    )


@lru_cache
def qwen(nfc: bool = True, template: str = CHATML) -> PreTrainedTokenizerFast:
    """Qwen's byte-level BPE; `nfc` as from Qwen1.5 on."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
            lines = Path(path).read_bytes().splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}

    backend = Converter(
        vocab_file=str(data_file("qwen-agent", "utils/qwen.tiktoken")),
        pattern=QWEN_SPLIT,
        extra_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    ).converted()
    if nfc:
        backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


SIDES = {
    "openchat": (lambda: mistral("metaspace"), OPENCHAT),
    "instruct": (lambda: mistral("normalizer"), INSTRUCT),
    "spaced": (lambda: mistral("normalizer"), INSTRUCT.replace("+ eos_token", "+ ' ' + eos_token")),
    "plain": (lambda: mistral("normalizer"), PLAIN),
    "qwen": (lambda: qwen(False), CHATML),
    "qwen-nfc": (lambda: qwen(True), CHATML),
    "qwen-plain": (lambda: qwen(False), PLAIN),
    "qwen-openchat": (lambda: qwen(False), OPENCHAT.replace("bos_token", "''")),
}
"""Makers of a tokenizer, and a template for it, by a name."""
