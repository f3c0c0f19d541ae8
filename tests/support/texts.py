"""Texts that tokenizers disagree about, as a hypothesis strategy and as a list."""

from hypothesis import strategies as st

PIECES = [
    "Hello world", " the cat's tail.", "def f(x):\n    return x[0] + 17\n", "don't I'LL", "12345.678",
    "<div class='a'>&amp;</div>", "日本語のテキスト", "中文句子。", "مرحبا بالعالم", "नमस्ते दुनिया",
    "👍🏽👩🏽‍🚀🇩🇪", "cafe\u0301 A\u030a n\u0303", "\u1100\u1161\u11a8", "\ufb01nance ½ Å ①",
    "\ufeff\u200b\u200d\xa0", "  ", "        ", "\n", "\n\n", "\r\n", "\t\t", " ", "▁", "a▁b▁▁c",
    "Ġ", "Ġthe Ċ", "<0x0A>", "<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>assistant\n",
    "<|end_of_turn|>", "[INST]", "\x00\x7f", "\U0010fffd",
]  # fmt: skip
"""English, code, Chinese, Japanese, Arabic, Devanagari, emoji with skin tones, NFD text, conjoining
Jamo, compatibility characters, zero-width characters, runs of spaces, newlines, literal ▁ and Ġ,
text that spells special tokens of either tokenizer."""

SPECIALS = ("<s>", "</s>", "<unk>", "<|end_of_turn|>", "<|pad_0|>", "<|endoftext|>", "<|im_")

characters = st.characters(exclude_categories=["Cs"])


def texts(max_pieces: int = 8, *, specials: bool = True) -> st.SearchStrategy[str]:
    pieces = st.sampled_from(PIECES) | st.text(characters, max_size=6)
    joined = st.lists(pieces, min_size=1, max_size=max_pieces).map("".join).filter(bool)
    if specials:
        return joined
    return joined.filter(lambda text: not any(special in text for special in SPECIALS))
