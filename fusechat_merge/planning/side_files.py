"""Which files of the base a merged model takes over, and what its config.json says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mergekit.common import get_config_value

from fusechat_merge.inputs.quantised import schemes
from fusechat_merge.planning.plan import Plan

_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".onnx", ".h5", ".msgpack", ".pkl",
)  # fmt: skip
_OWN = {"config.json", "README.md", "fusechat_merge.json", "mergekit_config.yml"}
_OF_OTHERS = {"adapter_config.json", "params.json", "recipe.yaml"}
"""Files that describe other weights: an adapter's, Mistral's own format's, a quantisation's."""
_TOKENIZER = {
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "encoder.json",
    "chat_template.jinja", "chat_template.json", "tekken.json", "spiece.model",
    "sentencepiece.bpe.model",
}  # fmt: skip


def side_files(planned: Plan, donor: Path) -> list[str]:
    """Names of the donor's files that are copied byte for byte."""
    written = set(_OWN)
    if planned.tokenizer is not None:
        written |= _TOKENIZER
    elif planned.chat_template:
        written |= {"chat_template.jinja", "chat_template.json"}
        if own_template(donor):
            written.add("tokenizer_config.json")
    names = [entry.name for entry in os.scandir(donor) if entry.is_file()]
    more = donor / "additional_chat_templates"
    if more.is_dir():
        names += [f"{more.name}/{entry.name}" for entry in os.scandir(more) if entry.is_file()]
    return sorted(
        name
        for name in names
        if name not in written | _OF_OTHERS
        and not name.startswith(".")
        and not name.endswith(_WEIGHTS)
        and not (planned.tokenizer is not None and name.endswith(".tiktoken"))
    )


def links_that_escape(planned: Plan, donor: Path) -> list[str]:
    """Side files that are links out of the donor's folder: a copy could give away anything.

    A hub cache's snapshot links into the same model's `blobs`.
    """
    roots = [donor.resolve(), donor.resolve().parent.parent / "blobs"]
    files = [(donor / name, (donor / name).resolve()) for name in side_files(planned, donor)]
    return [
        f"{path}: links to {there}, out of the model's folder; if it belongs to the model, put the"
        " file itself there"
        for path, there in files
        if not any(there.is_relative_to(root) for root in roots)
    ]


def merged_config(text: str, planned: Plan) -> str:
    """The donor's `config.json`, its bytes kept but for the keys that the merge changes."""
    before = json.loads(text)
    if planned.models[planned.donor].quantised:
        for path, _ in list(schemes(before)):
            _parent(before, path).pop(path[-1], None)
        text = as_json(before)
    for path, value in _changed_keys(before, planned):
        text = _with_value(text, path, value)
    return text


def _parent(data: Any, path: list[Any]) -> dict[str, Any]:
    """The mapping that holds the value at `path`."""
    for key in path[:-1]:
        data = data[key]
    return data


def _changed_keys(before: dict[str, Any], planned: Plan) -> list[tuple[list[str], Any]]:
    changed: list[tuple[list[str], Any]] = []
    dtype = planned.config.out_dtype or planned.config.dtype
    if dtype:
        names = [name for name in ("dtype", "torch_dtype") if name in before] or ["torch_dtype"]
        changed += [([name], dtype.removeprefix("torch.")) for name in names]
    keys = []
    if planned.config.slices or planned.config.modules:
        modules = planned.architecture.modules.values()
        keys += [module.architecture.num_layers_config_key() for module in modules]
    if planned.tokenizer is not None:
        keys.append(planned.architecture.vocab_size_config_key or "vocab_size")
    if _has_head_of_its_own(planned):
        key, out = "tie_word_embeddings", planned.out_config
        if getattr(out, key, False):
            changed.append(([key], False))
        # Where the language model's part says so, transformers takes it for the whole.
        if "text_config" in before and getattr(out.get_text_config(), key, False):
            changed.append((["text_config", key], False))
    # Old versions of transformers write where they had the model from.
    origin = before.get("_name_or_path")
    if isinstance(origin, str) and (origin.startswith(("/", "~", ".")) or os.path.isdir(origin)):
        changed.append((["_name_or_path"], ""))
    changed += [(key.split("."), get_config_value(planned.out_config, key)) for key in keys if key]
    changed += [(key.split("."), value) for key, value in planned.layer_keys.items()]
    return [(path, value) for path, value in changed if _value_at(before, path) != value]


def _has_head_of_its_own(planned: Plan) -> bool:
    """Whether the output head is written, and need not be the embeddings."""
    import transformers

    kind = getattr(transformers, (planned.out_config.architectures or [""])[0], None)
    tied = getattr(kind, "_tied_weights_keys", None)
    heads = {tuple(head.split(".")[-2:]) for head in tied} if isinstance(tied, dict) else set()
    return any(tuple(output.name.split(".")[-2:]) in heads for output in planned.outputs)


def _value_at(data: Any, path: list[str]) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _with_value(text: str, path: list[str], value: Any) -> str:
    """JSON `text` with one value replaced, or added to its object and all laid out anew."""
    first = text.index("{")
    span = _span(text, first, path)
    if span:
        return text[: span[0]] + json.dumps(value) + text[span[1] :]
    data = json.loads(text)
    inner = data
    for key in path[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}  # null, say
        inner = inner[key]
    inner[path[-1]] = value
    return as_json(data)


def _span(text: str, at: int, path: list[str]) -> tuple[int, int] | None:
    """Where the value at `path` stands in the JSON object that begins at `text[at]`."""
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, end = decoder.raw_decode(text, start)
        if key == path[0]:
            if len(path) == 1:
                return start, end
            return _span(text, start, path[1:]) if text[start] == "{" else None
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return None


def _skip(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at


def index(planned: Plan) -> str:
    """The text of `model.safetensors.index.json`."""
    total = sum(output.nbytes for output in planned.outputs)
    weight_map = {output.tensor: output.file for output in planned.outputs}
    return as_json({"metadata": {"total_size": total}, "weight_map": weight_map})


def own_template(donor: Path) -> dict[str, Any] | None:
    """The tokenizer's settings where they hold a chat template of their own."""
    path = donor / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return settings if isinstance(settings, dict) and "chat_template" in settings else None


def as_json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
