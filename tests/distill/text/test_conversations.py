"""Datasets, renderings and cuts, over two real tokenizers and templates that trim and refuse."""

import bz2
import copy
import gzip
import json
import lzma
import string

import datasets
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fusechat_common.errors import RequestError
from fusechat_distill.text.conversations import (
    Conversation,
    Conversations,
    Cut,
    Message,
    Renderer,
    open_conversations,
)
from fusechat_distill.text.tokens import token_bytes
from tests.support import chain, real_tokenizers
from tests.support.real_tokenizers import CHATML, INSTRUCT, OPENCHAT, PLAIN
from tests.support.texts import texts

ROW = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


def conversation(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Conversation("0" * 32, 0, tuple(messages))


# --- datasets -----------------------------------------------------------------------------------


def test_every_layout_gives_the_same_conversation(tmp_path):
    rows = {
        "messages.jsonl": {"id": 7, "messages": MESSAGES},
        "sharegpt.json": {"conversations": SHAREGPT},
        "completion.jsonl": {"prompt": "Hi", "completion": "Hello."},
        "turns.jsonl": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    }
    for name, row in rows.items():
        chain.write_rows(tmp_path / name, [row])
    dataset = datasets.Dataset.from_list([{"messages": MESSAGES}])
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "dict")
    with pytest.raises(RequestError, match="no split 'train'; it has 'test'"):
        open_conversations(str(tmp_path / "dict"))
    found = [open_conversations(str(tmp_path / name))[0] for name in (*rows, "a.parquet", "saved")]
    found.append(open_conversations(str(tmp_path / "dict"), split="test")[0])
    columns = {"conversations": [{"from": ["human", "gpt"], "value": ["Hi", "Hello."]}]}
    found.append(Conversations(datasets.Dataset.from_dict(columns))[0])
    assert {c.key for c in found} == {found[0].key}
    assert {c.messages for c in found} == {(Message("user", "Hi"), Message("assistant", "Hello."))}
    assert len(found[0].key) == 32


def test_bad_rows_are_listed_and_left_out(tmp_path):
    user, answer = MESSAGES
    rows = [
        ([user], "no assistant turn"),
        ([user, answer], None),
        ([user, {"role": "assistant", "content": " \n"}], "empty answer"),
        ([user, {"role": "oracle", "content": "x"}], "'oracle'"),
        ([user, {"role": "assistant", "content": None}], "NoneType"),
        (None, "not a list"),
        ([answer], None),
        ([user, answer | {"tool_calls": [{"name": "f"}]}], "message 1 has tool calls"),
    ]
    path = chain.write_rows(tmp_path / "a.jsonl", [{"messages": row} for row, _ in rows])
    conversations = open_conversations(str(path))
    assert [c.row for c in conversations] == [1, 6]
    assert [row for row, _ in conversations.rejected] == [0, 2, 3, 4, 5, 7]
    for row, reason in conversations.rejected:
        assert rows[row][1] in reason
    texts_alone = Conversations(datasets.Dataset.from_dict({"messages": [["Hi", "Hello."]]}))
    assert texts_alone.rejected[0].reason == "message 0 is not an object with role and content"
    assert [c.row for c in open_conversations(str(path), max_samples=1)] == [1]


def test_the_key_depends_on_the_messages_alone():
    def keys(*rows):
        return Conversations(datasets.Dataset.from_list([{"messages": row} for row in rows])).keys

    other = [MESSAGES[0], {"role": "assistant", "content": "Hello. "}]
    joined = [{"role": "user", "content": "Hi\nassistant"}, MESSAGES[1]]
    first, again, spaced, spelt = keys(MESSAGES, MESSAGES, other, joined)
    assert first == again
    assert len({first, spaced, spelt}) == 3


NO_ANSWER = '{"messages": [{"role": "user", "content": "x"}]}\n'
CUT = gzip.compress(ROW.encode() * 99, mtime=0)[:-9]
LATIN = (ROW * 5 + ROW.replace("y", "ö")).encode("latin-1")
HALF = ROW * 5 + ROW.replace("y", r"\ud83d")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', {}, "dataset.column"),
        ("a.jsonl", '{"text": "x"}\n', {"column": "chat"}, "no column 'chat'; it has 'text'"),
        ("a.jsonl", NO_ANSWER, {}, "no assistant turn"),
        ("a.txt", "x", {}, "unknown file type '.txt'"),
        ("a.jsonl", '{"messages": []}\n', {"split": "valid"}, "valid"),
        ("a.jsonl", '{"messages": [}\n', {}, "line 1 is not JSON .Expecting value at column 15"),
        ("missing/a.jsonl", None, {}, "can't be opened"),
        ("a.jsonl", "", {}, "can't be opened: it has no rows"),
        ("a.jsonl", '"text"\n{}\n', {}, "can't be opened: line 1 is not an object"),
        ("a.jsonl", "\n 3{}\n", {}, "can't be opened: line 2 is not JSON .Extra data"),
        ("a.jsonl", "\n\n", {}, "can't be opened: it has no rows"),
        ("a.jsonl", f'{ROW}{ROW}{{"messages": [{{\n{ROW}', {}, "line 3 is not JSON .* column 16"),
        ("a.jsonl", f"\n{ROW}[1, 2]\n{ROW}", {}, "line 3 is not an object"),
        ("a.jsonl", HALF, {}, "line 6 has an unpaired surrogate"),
        ("a.jsonl", (ROW + ROW).encode("utf-16"), {}, "line 1 is not UTF-8 text; save it as UTF-8"),
        ("a.jsonl", LATIN, {}, "line 6 is not UTF-8 text"),
        ("a.json.gz", gzip.compress(f"{ROW}nonsense".encode(), mtime=0), {}, "line 2 is not JSON"),
        ("a.jsonl.gz", CUT, {}, "ended before the end-of-stream"),
        ("a.json", f"[{ROW.strip()}, 3", {}, "can't be opened: Unexpected character"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(tmp_path, name, content, options, message):
    if content is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(RequestError, match=message):
        open_conversations(str(tmp_path / name), **options)


def test_a_folder_of_json_files(tmp_path):
    (tmp_path / "train.jsonl").write_text(ROW)
    assert len(open_conversations(str(tmp_path))) == 1
    (tmp_path / "train-2.jsonl").write_text('"text"\n')
    with pytest.raises(RequestError, match="train-2.jsonl does not begin with an object or an"):
        open_conversations(str(tmp_path))


def test_files_are_known_by_name_compressed_or_not(tmp_path):
    (tmp_path / "a.JSONL").write_text(ROW)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(ROW.encode()))
    (tmp_path / "a.json.bz2").write_bytes(bz2.compress(ROW.encode()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(ROW.encode()))
    (tmp_path / "a.csv").write_text('prompt,completion\n"x","y"\n')
    found = [open_conversations(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 5
    assert len({conversations.fingerprint for conversations in found}) == 1


def test_the_column_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": "x", "chat": SHAREGPT}) + "\n")
    assert len(open_conversations(str(tmp_path / "a.jsonl"), column="chat")) == 1


# --- renderings ---------------------------------------------------------------------------------

NAMES = ["openchat", "instruct", "plain", "qwen", "qwen-plain", "qwen-openchat"]


@pytest.fixture(scope="session", params=NAMES)
def renderer(request) -> Renderer:
    tokenizer, template = real_tokenizers.SIDES[request.param]
    return Renderer(tokenizer(), template, name=request.param)


def check_response(renderer, conversation, rendering, response) -> None:
    """What the tokens consume is the answer's bytes: the definition of an end offset."""
    answer = conversation.messages[response.turn].content.encode()
    gold = rendering.input_ids[response.token_slice()].tolist()
    assert response.first >= 1
    assert len(gold) == len(response.ends)
    consumed = b""
    for token, end in zip(token_bytes(renderer.tokenizer, gold), response.ends, strict=True):
        consumed += token
        if end >= 0:
            assert consumed == response.pending + answer[response.begin : end]
    # As text: templates strip no-break spaces too.
    assert answer.decode().strip() == answer[response.begin : response.end].decode().strip()
    # Between the response's last byte and the stop there is no text but the template's.
    crossing = response.end not in response.ends
    special = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    assert set(gold) & special == ({gold[-1]} if response.stop == "special" else set())
    if not crossing and response.stop != "none":
        assert response.ends[-1] == -1
        assert (response.ends[:-1] == response.end).any()


plain = texts(4, specials=False).filter(lambda text: text.strip() and "▁" not in text)


@settings(max_examples=25)
@given(contents=st.lists(plain, min_size=2, max_size=5), system=st.none() | plain)
@example(contents=["Hello", "Hello", "\ue000\ue001\ue000"], system=None)
@example(contents=["\ue000\ue001", "\ue001\ue000 \ue002"], system="\ue000")
def test_ends_are_the_answers_own_bytes(renderer, contents, system):
    chat = conversation(*contents, system=system)
    (rendering,) = renderer([chat])
    assert rendering.problem is None
    answers = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    assert [response.turn for response in rendering.responses] == answers
    for response in rendering.responses:
        check_response(renderer, chat, rendering, response)
    assert len(rendering.input_ids) == rendering.responses[-1].token_slice().stop


def rendered(tokenizer, *contents: str, template: str | None = None, **options):
    renderer = Renderer(tokenizer, template)
    return renderer([conversation(*contents, **options)])[0]


@pytest.mark.parametrize(
    ("side", "answer", "expected"),
    [
        (("mistral", INSTRUCT), "Hello there.", (0, b" ", [5, 11, 12, -1])),
        (("mistral", OPENCHAT), "日本.", (0, b"", [3, 6, 7, -1])),
        (("qwen", CHATML), "\nHello.", (0, b"\n", [1, 6, 7, -1])),
        # The tokenizer's own dummy prefix, which the template lacks, is pending too.
        (("legacy", OPENCHAT.replace(": '", "' + eos_token")), "Hello.", (0, b" ", [5, 6, -1])),
        # A template that trims starts inside the answer.
        (("mistral", INSTRUCT), " \n Hello. \n", (3, b" ", [8, 9, -1])),
        # No special token stands between the answer and a space before the stop.
        (
            ("mistral", INSTRUCT.replace("+ eos", "+ ' ' + eos")),
            "Hello.",
            (0, b" ", [5, 6, -1, -1]),
        ),
        # The template's newlines join the full stop: no state, no stop.
        (("qwen", PLAIN), "Hello.", (0, b"", [5, -1])),
    ],
)
def test_where_an_answer_begins_and_its_tokens_end(side, answer, expected):
    name, template = side
    legacy = {"legacy": lambda: real_tokenizers.mistral("normalizer")}
    tokenizer = legacy.get(name, getattr(real_tokenizers, name, None))()
    response = rendered(tokenizer, "Hi", answer, template=template).responses[0]
    assert (response.begin, response.pending, response.ends.tolist()) == expected
    assert response.end == len(answer.rstrip().encode())


def test_the_stop_is_the_first_special_token_after_the_response(mistral, qwen):
    rendering = rendered(qwen, "Hi", "Hello.")
    assert rendering.responses[0].stop == "special"
    assert rendering.input_ids[-1] == qwen.convert_tokens_to_ids("<|im_end|>")
    spaced = rendered(mistral, "Hi", "Hello.", template=INSTRUCT.replace("+ eos", "+ ' ' + eos"))
    assert spaced.input_ids[-1] == mistral.eos_token_id
    # A role's special token ends the answer before it; after the last one nothing is left.
    without_end = CHATML.replace("<|im_end|>", "")
    for tokenizer, template, stops in (
        (qwen, without_end, ["special", "text"]),
        (mistral, PLAIN, ["text", "text"]),
    ):
        chat = rendered(tokenizer, "Hi", "One", "More", "Two", template=template)
        assert [response.stop for response in chat.responses] == stops
    # Qwen joins the full stop and the template's newlines.
    assert rendered(qwen, "Hi", "Hello.", template=PLAIN).responses[0].stop == "none"


THINKING = CHATML.replace(
    "message['content']",
    "(message['content'].split('</think>')[-1] if not loop.last else message['content'])",
)
SPELT = "Write <|im_end|> here."


@pytest.mark.parametrize(
    ("template", "contents", "kept", "left_out", "reason"),
    [
        (THINKING, ["Hi", "<think>Hm</think>Yes", "And", "No"], [3], 1, "rewrites"),
        (CHATML, [SPELT, SPELT, "And", "Yes"], [3], 1, "spells the special token <|im_end|>"),
        # In another order: only what comes before an earlier answer.
        (CHATML.replace("in messages", "in messages | reverse"), ["Hi", "Yes", "And", "No"],
         [1], 3, "before an earlier answer"),
    ],
)  # fmt: skip
def test_an_answer_that_can_not_be_learnt_is_context_only(
    qwen, template, contents, kept, left_out, reason
):
    rendering = rendered(qwen, *contents, template=template)
    assert [response.turn for response in rendering.responses] == kept
    assert rendering.responses[0].token_slice().stop <= len(rendering.input_ids)
    assert rendering.skipped[0].turn == left_out
    assert reason in rendering.skipped[0].reason


def test_what_spells_another_models_special_token_is_text(qwen, mistral):
    assert len(rendered(mistral, SPELT, SPELT, "And", "Yes").responses) == 2
    nothing = rendered(qwen, "Hi", "<|im_end|>")
    assert (len(nothing.input_ids), nothing.responses) == (0, ())


def test_a_system_prompt_goes_before_the_user_where_the_template_takes_none(mistral, qwen):
    silent = CHATML.replace("{{", "{% if message['role'] != 'system' %}{{").replace(
        "}}", "}}{% endif %}"
    )
    for tokenizer, template in ((mistral, INSTRUCT), (qwen, silent)):
        rendering = rendered(tokenizer, "Hi", "Yes", system="Be brief.", template=template)
        assert rendering.system_folded
        assert [response.turn for response in rendering.responses] == [2]
        assert "Be brief.\n\nHi" in tokenizer.decode(rendering.input_ids)
    assert not rendered(qwen, "Hi", "Yes", system="Be brief.").system_folded
    assert rendered(mistral, "Hi", "Yes", system=" ", template=INSTRUCT).system_folded
    # What the user says is no sign that the template rendered the system prompt.
    assert rendered(qwen, "Be brief.", "Yes", system="Be brief.", template=silent).system_folded
    lone = Conversation("", 0, (Message("system", "Be brief."), Message("assistant", "Yes")))
    assert "drops the system prompt" in Renderer(qwen, silent)([lone])[0].problem


def test_an_answer_that_can_not_be_found_in_the_rendering_is_left_out(mistral, qwen):
    known = "{{ raise_exception('Who?') if messages[-1].content not in ('Yes', 'No') }}" + CHATML
    (rendering,) = Renderer(qwen, known)([conversation("Hi", "Yes")])
    assert rendering.skipped[0].reason == "the chat template rewrites the answer"
    assert Renderer(qwen, known).after_answer() == ""
    (rendering,) = Renderer(qwen, "{{ messages[1].content }}")([conversation("Hi", "Yes")])
    assert rendering.skipped[0].reason == "no token stands before the answer"


def test_the_stop_is_no_part_of_an_answer_whose_end_the_tokenizer_drops():
    """It has no token for the answer's last character, nor one for what it doesn't know."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<e>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    template = "{% for m in messages %}{{ 'b' + m.content + '<e>' }}{% endfor %}"
    response = rendered(tokenizer, "a", "ab日", template=template).responses[0]
    assert (response.ends.tolist(), response.stop) == ([1, 2, -1], "special")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('No users.') if messages[0].role == 'user' }}" + CHATML, "No users."),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", ""),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ""),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", ""),
        ("{{ raise_exception.__globals__.os }}", ""),
    ],
)
def test_a_conversation_that_the_template_refuses_has_a_problem(qwen, template, problem):
    (rendering,) = Renderer(qwen, template)([conversation("Hi", "Yes")])
    assert rendering.problem.startswith(f"the chat template rejects it: {problem}")
    assert (len(rendering.input_ids), rendering.responses) == (0, ())


def test_no_template_is_an_error_that_names_the_remedy(qwen):
    base = PreTrainedTokenizerFast(tokenizer_object=qwen.backend_tokenizer)
    with pytest.raises(RequestError, match="put its chat_template.jinja beside its tokenizer"):
        Renderer(base, name="base")
    for template in ("{% for %}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}"):
        with pytest.raises(RequestError, match="not valid Jinja"):
            Renderer(qwen, template)


def test_the_date_is_fixed(qwen):
    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    rendering = rendered(qwen, "Hi", "Yes", template=dated)
    assert qwen.decode(rendering.input_ids).startswith("01 Jan 2025\n")


def test_the_fingerprint_tells_tokenizers_and_templates_apart(mistral, qwen):
    sides = [(mistral,), (mistral, CHATML), (qwen,), (qwen, PLAIN)]
    assert len({Renderer(*side).fingerprint for side in sides}) == 4
    assert Renderer(qwen).fingerprint == Renderer(qwen, CHATML).fingerprint
    again = copy.deepcopy(qwen)
    again(["a", "a b"], padding=True, truncation=True, max_length=5)  # leaves traces in the backend
    assert Renderer(again).fingerprint == Renderer(qwen).fingerprint


def test_roles(mistral, qwen):
    assert Renderer(mistral).roles() == {"bos": 1, "eos": 2, "pad": 32001, "end_of_turn": 32000}
    assert Renderer(mistral, INSTRUCT).roles()["end_of_turn"] == 2
    assert Renderer(qwen).roles() == {"eos": 151645, "pad": 151643, "end_of_turn": 151645}
    assert "end_of_turn" not in Renderer(qwen, PLAIN).roles()


# --- cuts ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(contents=st.lists(plain, min_size=2, max_size=6), max_length=st.integers(1, 120))
def test_a_source_sees_what_the_pivot_sees(renderer, contents, max_length):
    chat = conversation(*contents)
    pivot = Renderer(real_tokenizers.mistral())
    (whole,) = pivot([chat])
    cut_pivot, cut = whole.cut_to(max_length)
    (full,) = renderer([chat])
    source = full.cut_at(cut)
    assert len(cut_pivot.input_ids) <= max_length
    assert cut_pivot.input_ids.tolist() == whole.input_ids[: len(cut_pivot.input_ids)].tolist()
    seen = {response.turn: response for response in cut_pivot.responses}
    kept = {response.turn: response for response in source.responses}
    for response in full.responses:
        pivots = seen.get(response.turn)
        mine = kept.get(response.turn)
        if pivots is not None and pivots.stop != "none":  # the pivot sees all of the turn
            assert mine is not None
            assert mine.ends.tolist() == response.ends.tolist()
            continue
        end = -1 if pivots is None else pivots.ends.max()
        inside = [e for e in response.ends.tolist() if 0 <= e <= end]
        assert (mine.ends.max() if mine else None) == (max(inside) if inside else None)
        if mine:
            assert mine.stop == "none"
            assert mine.ends.tolist() == response.ends[: len(mine.ends)].tolist()
    length = source.responses[-1].token_slice().stop if kept else 0
    assert len(source.input_ids) == length


def test_the_cut_is_at_the_end_of_the_pivots_last_whole_token(mistral, qwen):
    chat = conversation("Hi", "Hello there, all.", "And", "Bye.")
    (whole,), (other,) = Renderer(mistral)([chat]), Renderer(qwen)([chat])
    first, second = whole.responses
    cut, at = whole.cut_to(first.first + 2)
    assert at == Cut(1, 11)
    for side in (cut, other.cut_at(at)):
        assert side.responses[0].ends.tolist() == [5, 11]
        assert side.responses[0].stop == "none"
    # Without the stop; with it, but none of the second answer; nothing.
    stop = first.token_slice().stop
    assert whole.cut_to(stop - 1)[1] == Cut(1, 17)
    cut, at = whole.cut_to(stop)
    assert (at, len(cut.responses), len(cut.input_ids)) == (Cut(3, 0), 1, stop)
    assert [response.turn for response in other.cut_at(at).responses] == [1]
    cut, at = whole.cut_to(3)
    assert (at, len(cut.input_ids), cut.responses) == (Cut(1, 0), 0, ())
    assert len(other.cut_at(at).input_ids) == 0
    assert whole.cut_to(len(whole.input_ids)) == (whole, None)
    assert second.stop == "special"


def test_rendering_many_is_rendering_one_by_one(qwen):
    renderer = Renderer(qwen)
    chats = [conversation(word, f"{word} {i}.") for i, word in enumerate(string.ascii_lowercase)]
    for chat, rendering in zip(chats, renderer(chats), strict=True):
        (alone,) = renderer([chat])
        assert np.array_equal(rendering.input_ids, alone.input_ids)


@pytest.mark.parametrize("path", ["chats.jsonl", "./chats", "/chats/train.parquet"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(path, monkeypatch):
    def asked(*_args, **_options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", asked)
    with pytest.raises(RequestError, match="there is no such file or folder here"):
        open_conversations(path)


def test_a_models_folder_is_no_dataset(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="is a model's folder; name a dataset"):
        open_conversations(str(tmp_path))
