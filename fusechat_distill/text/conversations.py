"""From dataset rows to conversations, and to token ids with the byte offsets of every answer."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import RequestError, one_line
from fusechat_distill.text.tokens import (
    Tokenization,
    byte_offsets,
    fingerprint,
    tokenize,
    vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stop = Literal["special", "text", "none"]
"""What ends a response: a special token, a token of plain text, or nothing (cut, or no token)."""

TEMPLATE_DATE = datetime.datetime(2025, 1, 1)
"""The date that `strftime_now` returns in a chat template, so that renderings are reproducible."""


class Message(NamedTuple):
    role: str  # system, user, assistant or tool
    content: str


@dataclass(frozen=True)
class Conversation:
    """One row of the dataset.

    `key` is a hash of the messages (32 hex digits): rows of all models' stores join by it, and
    two rows with the same messages have the same key. `row` is the row's index in the dataset.
    """

    key: str
    row: int
    messages: tuple[Message, ...]


class Rejected(NamedTuple):
    """A row that is skipped, and the reason."""

    row: int
    reason: str


class Conversations(Sequence[Conversation]):
    """The usable rows of a dataset, in its order; a row is read when it is accessed.

    `rejected` lists the skipped rows; `layout` says which columns were read (`messages`,
    `conversations`, `prompt/completion`); `fingerprint` is a hash of all keys in order.
    """

    def __init__(self, dataset: Any, column: str | None = None, max_samples: int | None = None):
        """`dataset`: a `datasets.Dataset`."""
        self.layout, self._columns = _layout(dataset.column_names, column)
        self._dataset = dataset.select_columns(self._columns)
        self._all = dataset
        self._rows: list[int] = []
        self.keys: list[str] = []
        rejected = []
        for row in range(len(self._dataset)):
            if max_samples is not None and len(self._rows) == max_samples:
                break
            try:
                messages = self._read(row)
            except _UnusableError as problem:
                rejected.append(Rejected(row, str(problem)))
            else:
                self._rows.append(row)
                self.keys.append(_key(messages))
        self.rejected = tuple(rejected)
        self.fingerprint = hashlib.sha256("\n".join(self.keys).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        return Conversation(self.keys[index], row, self._read(row))

    def labels(self, column: str) -> list[str] | None:
        """The values of a column of text or integers, of all usable rows; `(none)` where missing.

        None if the dataset has no such column.
        """
        feature = self._all.features.get(column)
        kind = getattr(feature, "dtype", "")
        if not (kind in ("string", "large_string") or kind.startswith(("int", "uint"))):
            return None
        spelt = getattr(feature, "int2str", str)  # a ClassLabel's names
        values = self._all[column][:]
        return ["(none)" if values[row] is None else spelt(values[row]) for row in self._rows]

    def _read(self, row: int) -> tuple[Message, ...]:
        return _messages(_turns(self._dataset[row], self._columns))


def open_conversations(
    path: str,
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
    max_samples: int | None = None,
) -> Conversations:
    """Open a dataset from the hub, a file (JSON, JSONL, CSV, Parquet, Arrow) or a folder.

    Args:
        path: hub name, file, folder of files, or folder of `save_to_disk`.
        name: configuration of a hub dataset.
        column: the column with the messages; None: `messages`, ShareGPT's `conversations`, or
            `prompt` and `completion`, whichever there is.
        max_samples: the maximum number of usable rows.

    Raises:
        RequestError: the dataset can't be opened, or has no such split, no known layout, or no
            usable row.
    """
    where = f"dataset {path}"
    try:
        dataset = _load(path, name, split)
    except Exception as error:  # `datasets` raises some twenty unrelated classes
        raise RequestError(f"can't be opened: {_reason(Path(path), error)}", where) from error
    try:
        conversations = Conversations(dataset, column, max_samples)
    except UnicodeError as error:  # pyarrow does not check all text for valid UTF-8
        raise RequestError(f"can't be read: {_reason(Path(path), error)}", where) from error
    except ValueError as error:
        raise RequestError(str(error), where) from error
    if not conversations:
        reasons = "; ".join(f"row {row}: {reason}" for row, reason in conversations.rejected[:3])
        raise RequestError(f"no row can be used: {reasons or 'it has no rows'}", where)
    return conversations


_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
_BUILDERS |= {".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".bz2", ".xz")


def _builder(path: Path) -> str | None:
    """The builder of `datasets` for a file of that name; it decompresses by itself."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _reason(path: Path, error: BaseException) -> str:
    """Why a dataset can't be opened: the invalid line of the file, or the first cause."""
    if path.is_file() and _builder(path) == "json" and (problem := _json_problem(path)):
        return problem
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _json_start(path: Path) -> bytes:
    """The beginning of a JSON file, without a byte order mark and white space."""
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(str(path), "rb", compression="infer") as file:
        start: bytes = file.read(256)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")


def _check_json(path: Path) -> None:
    """Refuse a JSON file without rows before it is read: pyarrow 26 may end the process on it."""
    is_json = path.is_file() and _builder(path) == "json"
    if is_json and _json_start(path)[:1] not in (b"{", b"[", b""):
        raise ValueError(f"{path.name} does not begin with an object or an array")


def _json_problem(path: Path) -> str | None:
    """The first invalid line of a JSON file, or None if no line is invalid by itself."""
    import fsspec

    rows = 0
    try:
        if _json_start(path).startswith(b"["):
            return None  # a single array; the parser's own message names the place
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    row = json.loads(text.strip())
                    json.dumps(row, ensure_ascii=False).encode()
                except UnicodeDecodeError:
                    return f"line {number} is not UTF-8 text; save it as UTF-8"
                except UnicodeEncodeError:
                    return f"line {number} has an unpaired surrogate (\\ud800 to \\udfff)"
                except json.JSONDecodeError as error:
                    return f"line {number} is not JSON ({error.msg} at column {error.colno})"
                if not isinstance(row, dict):
                    return f"line {number} is not an object"
                rows += 1
    except (OSError, EOFError):
        return None
    return None if rows else "it has no rows"


def _load(path: str, name: str | None, split: str) -> Any:
    import datasets

    local = Path(path)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise ValueError(f"no split {split!r}; it has {', '.join(map(repr, saved))}")
        return saved[split]
    if local.is_file():
        kind = _builder(local)
        if kind is None:
            known = f"{', '.join(_BUILDERS)}, also compressed ({', '.join(_COMPRESSED)})"
            raise ValueError(f"unknown file type {local.suffix!r}; known are {known}")
        _check_json(local)
        return datasets.load_dataset(kind, data_files=path, split=split)
    if not local.exists() and (_builder(local) or path.startswith(("/", ".", "~"))):
        # Otherwise it would be requested from the hub, repeatedly.
        raise ValueError(f"there is no such file or folder here ({Path.cwd()})")
    if (local / "config.json").is_file():
        # Otherwise its JSON files would be read as rows.
        raise ValueError("is a model's folder; name a dataset")
    for file in sorted(local.rglob("*")):
        _check_json(file)
    return datasets.load_dataset(path, name, split=split)  # pragma: no cover (the hub)


class _UnusableError(Exception):
    """The reason why a row or an answer is skipped."""


_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_ROLES |= {"human": "user", "gpt": "assistant"}


def _layout(columns: list[str], column: str | None) -> tuple[str, list[str]]:
    """The layout's name and the columns with the messages."""
    if column is not None and column not in columns:
        raise ValueError(f"no column {column!r}; it has {', '.join(map(repr, columns))}")
    for known in ("messages", "conversations") if column is None else (column,):
        if known in columns:
            return known, [known]
    if {"prompt", "completion"} <= set(columns):
        return "prompt/completion", ["prompt", "completion"]
    raise ValueError(
        "no column `messages`, `conversations` or `prompt` and `completion`; name the column that "
        f"holds the messages as `dataset.column` (it has {', '.join(map(repr, columns))})"
    )


def _turns(row: Mapping[str, Any], columns: list[str]) -> list[Any]:
    if len(columns) == 2:
        turns: list[Any] = []
        for column, role in zip(columns, ("user", "assistant"), strict=True):
            part = row[column]
            turns += part if isinstance(part, list) else [{"role": role, "content": part}]
        return turns
    cell = row[columns[0]]
    if isinstance(cell, Mapping) and all(isinstance(part, list) for part in cell.values()):
        # `datasets` stores a `Sequence` of objects as one list for each of their keys.
        return [dict(zip(cell, turn, strict=True)) for turn in zip(*cell.values(), strict=True)]
    if not isinstance(cell, list):
        raise _UnusableError(f"`{columns[0]}` is not a list of messages")
    return cell


def _messages(turns: list[Any]) -> tuple[Message, ...]:
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise _UnusableError(f"message {i} is not an object with role and content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _UnusableError(f"message {i} has the role {role!r}")
        if turn.get("tool_calls"):
            raise _UnusableError(f"message {i} has tool calls")
        if not isinstance(content, str):
            kind = type(content).__name__
            raise _UnusableError(f"message {i} has content of type {kind}, not text")
        if _ROLES[role] == "assistant" and not content.strip():
            raise _UnusableError(f"message {i} is an empty answer")
        messages.append(Message(_ROLES[role], content))
    if not any(message.role == "assistant" for message in messages):
        raise _UnusableError("no assistant turn")
    return tuple(messages)


def _key(messages: tuple[Message, ...]) -> str:
    text = json.dumps(messages, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cut(NamedTuple):
    """Where `max_length` cuts a conversation: at `byte` of the content of message `turn`.

    Byte 0 of a turn leaves all turns before it complete, with their stop tokens.
    """

    turn: int
    byte: int


@dataclass(frozen=True, eq=False)
class Response:
    """An assistant's answer as one model sees it: n tokens that are predicted and scored.

    Token i is `input_ids[first + i]`; the state that predicts it is the one after
    `input_ids[first + i - 1]`, `first` >= 1. Offsets are in the UTF-8 bytes of the dataset's own
    answer `messages[turn].content`. The n tokens are: those that hold a byte of the response, then
    (if there is a stop) those of the template up to and including the stop.
    """

    turn: int
    """Index into the conversation's messages."""
    begin: int
    end: int
    """The byte range of the answer that the template rendered; smaller than the answer if the
    template trims it."""
    first: int
    ends: NDArray[np.int32]
    """[n], the byte of the answer where each token ends; -1 for a token that ends after the
    response, or whose text a normaliser changed. State i, which predicts token i, is at `begin` for
    i = 0 and at `ends[i - 1]` otherwise."""
    pending: bytes
    """The text before the response's first byte with which token 0 begins."""
    stop: Stop
    """The kind of stop that token n - 1 is, if it is one."""

    def token_slice(self) -> slice:
        """The response's tokens in `input_ids`: `gold = input_ids[response.token_slice()]`."""
        return slice(self.first, self.first + len(self.ends))

    def state_slice(self) -> slice:
        """The tokens before the response's: `logits[response.state_slice()]` predict the gold."""
        return slice(self.first - 1, self.first - 1 + len(self.ends))

    def _upto(self, byte: int, tokens: int) -> Response | None:
        """Of the first `tokens` tokens those that end at or before `byte`, without the stop."""
        ends = self.ends[:tokens]
        kept = np.flatnonzero((ends >= 0) & (ends <= byte))
        if not len(kept):
            return None
        return replace(self, ends=ends[: kept[-1] + 1], stop="none")


class Skipped(NamedTuple):
    """An assistant turn that is only context for this model, and the reason."""

    turn: int
    reason: str


@dataclass(frozen=True, eq=False)
class Rendering:
    """A conversation as one model sees it."""

    input_ids: NDArray[np.integer[Any]]
    """[length], up to the last scored token."""
    responses: tuple[Response, ...]
    """In order; empty if nothing can be scored."""
    skipped: tuple[Skipped, ...] = ()
    system_folded: bool = False
    """The template has no system prompt; its text was put before the first user message."""
    problem: str | None = None
    """Why the whole conversation is skipped for this model (the template rejects it)."""

    @property
    def why_nothing(self) -> str | None:
        """The first reason why something is skipped."""
        reasons = [self.problem, *(skipped.reason for skipped in self.skipped)]
        return next(filter(None, reasons), None)

    def positions(self) -> NDArray[np.int64]:
        """Of all responses' states in `input_ids`; there is at least one response."""
        states = (response.state_slice() for response in self.responses)
        return np.concatenate([np.arange(state.start, state.stop) for state in states])

    def cut_to(self, max_length: int) -> tuple[Rendering, Cut | None]:
        """Keep at most `max_length` tokens (the pivot's rendering); the cut is None if all fit."""
        if len(self.input_ids) <= max_length:
            return self, None
        kept = [r for r in self.responses if r.token_slice().stop <= max_length]
        response = self.responses[len(kept)]  # the last one ends where `input_ids` do
        part = response._upto(response.end, max(max_length - response.first, 0))
        byte = 0 if part is None else int(part.ends[-1])
        return self._with([*kept, *([part] if part else [])]), Cut(response.turn, byte)

    def cut_at(self, cut: Cut | None) -> Rendering:
        """Keep what ends at or before the pivot's cut (a source's rendering)."""
        if cut is None:
            return self
        parts = (
            response if response.turn < cut.turn else response._upto(cut.byte, len(response.ends))
            for response in self.responses
            if response.turn <= cut.turn
        )
        return self._with([part for part in parts if part])

    def _with(self, responses: list[Response]) -> Rendering:
        length = responses[-1].token_slice().stop if responses else 0
        return replace(self, input_ids=self.input_ids[:length], responses=tuple(responses))


class Renderer:
    """Renders conversations for one tokenizer under one chat template.

    `fingerprint` is a hash of everything that a rendering depends on: tokenizer, template, date.

    Args:
        template: the text of a chat template, None for the tokenizer's own.
        name: the model's name in error messages.

    Raises:
        RequestError: there is no valid template, or the bytes of tokens can't be determined.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, name: str = ""
    ) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        where = f"tokenizer {name or tokenizer.name_or_path}"
        if template is None:
            try:
                template = tokenizer.get_chat_template()
            except ValueError as error:
                raise RequestError(
                    "it has no chat template; put its chat_template.jinja beside its tokenizer, or "
                    "name its chat model (a source can borrow the pivot's with `template: pivot`)",
                    where,
                ) from error
        try:
            self._compiled = _compile_jinja_template(template)
        except Exception as error:  # Jinja's, or Python's in the compiled template
            problem = f"its chat template is not valid Jinja: {' '.join(str(error).split())}"
            raise RequestError(problem, where) from error
        vocabulary(tokenizer)
        self.tokenizer = tokenizer
        self.template = template
        inputs = fingerprint(tokenizer), template, TEMPLATE_DATE.isoformat()
        self.fingerprint = hashlib.sha256("\n".join(inputs).encode()).hexdigest()

    def __call__(self, conversations: Sequence[Conversation]) -> list[Rendering]:
        """One rendering for each conversation, in order."""
        texts = [self._text(conversation.messages) for conversation in conversations]
        tokens = iter(tokenize(self.tokenizer, [t.text for t in texts if isinstance(t, _Text)]))
        return [
            self._rendering(conversation.messages, text, next(tokens))
            if isinstance(text, _Text)
            else Rendering(np.zeros(0, dtype=np.int64), (), problem=text)
            for conversation, text in zip(conversations, texts, strict=True)
        ]

    def roles(self) -> dict[str, int]:
        """Special token ids by role: `end_of_turn` (from a rendered probe), `bos`, `eos`, `pad`.

        Without the roles that the tokenizer or the template does not have.
        """
        roles = {
            role: token_id
            for role in ("bos", "eos", "pad")
            if (token_id := getattr(self.tokenizer, f"{role}_token_id")) is not None
        }
        probe = (Message("user", "Hello."), Message("assistant", "Hello."))
        rendering = self([Conversation("", 0, probe)])[0]
        if rendering.responses and rendering.responses[0].stop == "special":
            roles["end_of_turn"] = int(rendering.input_ids[-1])
        return roles

    def after_answer(self) -> str:
        """The text that the template puts between an answer and the next user turn.

        Empty if it can't be determined, is white space, or begins with a special token.
        """
        marks = "\ue000", "\ue001"
        chat = (("user", "Hello."), ("assistant", marks[0]), ("user", marks[1]))
        try:
            text = self._render([Message(*turn) for turn in chat])
        except _UnusableError:
            return ""
        between = text.partition(marks[0])[2].partition(marks[1])[0]
        first = self.tokenizer(between, add_special_tokens=False)["input_ids"][:1]
        plain = bool(first) and bool(vocabulary(self.tokenizer).text[first[0]])
        return between if plain and between.strip() else ""

    def _render(self, messages: Sequence[Message]) -> str:
        values = {
            **self.tokenizer.special_tokens_map,
            **{"tools": None, "documents": None, "add_generation_prompt": False},
            "messages": [message._asdict() for message in messages],
            "strftime_now": TEMPLATE_DATE.strftime,
        }
        try:
            return self._compiled.render(**values)
        except Exception as error:  # a template is a program that may raise anything
            raise _UnusableError(f"the chat template rejects it: {error}") from error

    def _text(self, messages: tuple[Message, ...]) -> _Text | str:
        """The rendered text with the place of each message in it, or why there is none."""
        text, refusal, folded = None, "", False
        try:
            text = self._render(messages)
        except _UnusableError as error:
            refusal = str(error)
        if messages[0].role == "system" and self._drops_system(messages, text):
            try:
                messages = _fold_system(messages)
                text, folded = self._render(messages), True
            except _UnusableError as error:
                return refusal or str(error)
        if text is None:
            return refusal
        spans: dict[int, tuple[int, int]] = {}
        for i, message in enumerate(messages):
            after_answer = i > 0 and messages[i - 1].role == "assistant"
            if (message.role == "assistant" or after_answer) and (
                span := self._span(messages, i, text)
            ):
                spans[i + folded] = span
        return _Text(text, spans, folded)

    def _drops_system(self, messages: tuple[Message, ...], text: str | None) -> bool:
        if text is None:
            return True
        return bool(messages[0].content.strip()) and self._span(messages, 0, text) is None

    def _span(self, messages: tuple[Message, ...], i: int, text: str) -> tuple[int, int] | None:
        """The characters that come from message i: those that change if only it is replaced."""
        mark = _mark(text, *(message.content for message in messages))
        marked = messages[i]._replace(content=mark)
        try:
            probe = self._render([*messages[:i], marked, *messages[i + 1 :]])
        except _UnusableError:
            return None
        before, *rest = probe.split(mark)
        if len(rest) != 1 or not (text.startswith(before) and text.endswith(rest[0])):
            return None
        begin, end = len(before), len(text) - len(rest[0])
        return (begin, end) if begin < end else None

    def _rendering(
        self, messages: tuple[Message, ...], text: _Text, tokens: Tokenization
    ) -> Rendering:
        responses: list[Response] = []
        skipped: list[Skipped] = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            try:
                response = self._response(turn, message.content, text, tokens)
                if responses and response.first < responses[-1].token_slice().stop:
                    raise _UnusableError("the chat template puts it before an earlier answer")
                responses.append(response)
            except _UnusableError as problem:
                skipped.append(Skipped(turn, str(problem)))
        whole = Rendering(tokens.ids, (), tuple(skipped), system_folded=text.folded)
        return whole._with(responses)

    def _response(self, turn: int, answer: str, text: _Text, tokens: Tokenization) -> Response:
        if turn not in text.spans:
            raise _UnusableError("the chat template rewrites the answer")
        begin, end = text.spans[turn]
        lead = _lead(answer, text.text[begin:end])
        if lead is None:
            raise _UnusableError("the chat template rewrites the answer")
        following = [span[0] for later, span in text.spans.items() if later > turn]
        # Bytes of the rendered text: the response, and where the next message begins.
        start, stop, limit = text.at[begin], text.at[end], text.at[min(following, default=-1)]
        ends, special = tokens.ends, tokens.special
        # The response's first token is the one after the last that ends before the response.
        before = np.flatnonzero((ends >= 0) & (ends <= start))
        if not len(before):
            raise _UnusableError("no token stands before the answer")
        first = int(before[-1]) + 1
        # The last token that holds a byte of the response, and the stop after it.
        last = first + int(np.argmax(ends[first:] >= stop))
        # Special tokens inside the response, which are refused; one that begins after it is not.
        inside = first + np.flatnonzero(special[first : last + 1])
        if len(inside) and tokens.starts[inside[-1]] >= stop:
            inside = inside[:-1]
            last -= 1
        unknown = self.tokenizer.unk_token_id
        if any(tokens.ids[i] != unknown for i in inside):
            spelt = self.tokenizer.convert_ids_to_tokens(int(tokens.ids[inside[0]]))
            raise _UnusableError(f"the answer spells the special token {spelt}")
        # The stop: the next special token before the next message, or else a token of text.
        stops = np.flatnonzero(
            special[last + 1 :]
            & (tokens.starts[last + 1 :] < limit)
            & (tokens.ids[last + 1 :] != unknown)
        )
        kind: Stop
        if len(stops):
            kind, after = "special", last + 2 + int(stops[0])
        elif ends[last] == stop and stop < limit:
            kind, after = "text", last + 2
        else:
            kind, after = "none", last + 1
        # From offsets in the rendered text to offsets in the dataset's answer.
        offset = len(answer[:lead].encode())
        inside_answer = (ends[first:after] >= 0) & (ends[first:after] <= stop)
        inside_answer[last + 1 - first :] = False
        pending = text.raw[ends[first - 1] : start]
        return Response(
            turn=turn,
            begin=offset,
            end=offset + int(stop - start),
            first=first,
            ends=np.where(inside_answer, ends[first:after] - start + offset, -1).astype(np.int32),
            pending=b" " + pending if tokens.dummy[first] else pending,
            stop=kind,
        )


def _mark(*texts: str) -> str:
    """A string of characters that occur in none of these texts."""
    used = set().union(*texts)
    private = (chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)
    first, second = next(private), next(private)
    return first + second + first


@dataclass(frozen=True, eq=False)
class _Text:
    """A rendered conversation, and the range of characters of each message's content."""

    text: str
    spans: dict[int, tuple[int, int]]
    folded: bool

    @cached_property
    def at(self) -> NDArray[np.int64]:
        return byte_offsets(self.text)

    @cached_property
    def raw(self) -> bytes:
        return self.text.encode()


def _fold_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages with the system prompt put before the first user message."""
    system, *others = messages
    for i, message in enumerate(others):
        if message.role == "user":
            others[i] = message._replace(content=f"{system.content}\n\n{message.content}")
            return tuple(others)
    raise _UnusableError(
        "the chat template drops the system prompt, and no user message can take it"
    )


def _lead(answer: str, rendered: str) -> int | None:
    """Number of characters trimmed from the answer's start; None if other text was changed."""
    core = rendered.strip()
    if not core or core != answer.strip():
        return None
    lead = answer.index(core) - rendered.index(core)
    return lead if lead >= 0 and answer.startswith(rendered, lead) else None
