"""What is known of a model without its weights: configuration, tokenizer, files, identity."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat_common.errors import RequestError, one_line
from fusechat_distill.recipe.schema import Model

PLACEMENT = frozenset({"device_map", "max_memory", "offload_folder", "offload_state_dict"})
"""Keys of `load` that say where a model is placed, not what it computes."""

ADAPTER_CONFIG = "adapter_config.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
"""Files of which a tokenizer has at least one."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""Files by which a vision-language model prepares its inputs."""

NO_TOKENIZER = "has no tokenizer; copy the tokenizer files of its base model there"


@dataclass(eq=False)
class ModelFiles:
    """A model that a recipe names; `config` and `tokenizer` are transformers' objects."""

    spec: Model
    config: Any
    tokenizer: Any
    base: ModelFiles | None = None
    """The base model of an adapter."""
    weights: bool = True
    """Whether its weights can be loaded."""

    @cached_property
    def token_ids(self) -> list[int]:
        """The ids of the tokenizer, ascending."""
        return sorted(set(self.tokenizer.get_vocab().values()))

    def identity(self, digests: Digests) -> dict[str, Any]:
        """What identifies this model: a hub name and commit, or a hash of its files."""
        folder = Path(self.spec.model)
        if folder.is_dir():
            config = ADAPTER_CONFIG if self.base else "config.json"
            return {
                "config": digests.of([folder / config]),
                "weights": digests.of(sorted(folder.glob("*.safetensors"))),
            } | ({"base": self.base.identity(digests)} if self.base else {})
        return {"name": self.spec.model, "commit": self.commit}

    @cached_property
    def commit(self) -> str | None:
        """The hub commit that the configuration was read from, according to the cache.

        None for a local folder. Weights are read from the same commit, wherever the branch is.
        """
        from transformers.utils.hub import cached_file, extract_commit_hash

        if Path(self.spec.model).is_dir():
            return None
        name, revision = self.spec.model, self.spec.revision
        path = cached_file(name, "config.json", revision=revision, local_files_only=True)
        return extract_commit_hash(path, None)


def open_model(
    spec: Model, *, trust_remote_code: bool = False, need_weights: bool = True
) -> ModelFiles:
    """Read everything of a model except its weights.

    Args:
        need_weights: whether missing weights are a problem.

    Raises:
        RequestError: the model can't be scored; it lists every reason.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(spec.model)
    if not folder.is_dir() and (
        spec.model.startswith((".", "/", "~")) or spec.model.count("/") > 1
    ):
        raise RequestError("there is no such folder", spec.model)
    source = {"revision": spec.revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.model, **source)
    except Exception as error:  # transformers and huggingface_hub raise many unrelated classes
        raise RequestError(_config_problem(spec, error), spec.model) from error
    weight_problems = list(_weight_problems(spec, config))
    problems = weight_problems if need_weights else []
    tokenizer = None
    if folder.is_dir() and not _has_tokenizer(folder):
        problems.append(NO_TOKENIZER)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(spec.model, **source)
            if not tokenizer.chat_template:
                tokenizer.chat_template = _processors_template(spec)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            problems.append(f"its tokenizer can't be read: {one_line(error)}")
    if problems:
        raise RequestError(problems, spec.model)
    return ModelFiles(spec, config, tokenizer, weights=not weight_problems)


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a checkpoint whole.

    For a vision-language checkpoint that is not the class of its language model alone, which
    `AutoModelForCausalLM` may give.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    (kind, *_) = config.architectures or [None]
    seeing = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if seeing is not None and seeing.__name__ == kind:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def empty_model(config: Any, *, trust_remote_code: bool = False, **load: Any) -> Any:
    """The model that a configuration describes, without memory for its weights.

    `load`: arguments of `from_pretrained` that apply without weights.
    """
    import torch

    with torch.device("meta"):
        kind = auto_class(config)
        return kind.from_config(config, trust_remote_code=trust_remote_code, **load)


def open_checkpoint(spec: Model, *, trust_remote_code: bool = False) -> ModelFiles:
    """Read everything except the weights of a model, or of an adapter, in a local folder.

    Raises:
        RequestError: it can't be used; the error lists every reason.
    """
    from transformers import AutoTokenizer

    folder = Path(spec.model)
    problems = []
    if not folder.is_dir():
        raise RequestError("there is no such folder", spec.model)
    adapter = folder / ADAPTER_CONFIG
    if not adapter.is_file() or (folder / "config.json").is_file():
        return open_model(spec, trust_remote_code=trust_remote_code)
    if not _has_tokenizer(folder):
        problems.append(NO_TOKENIZER)
    if not (folder / "adapter_model.safetensors").is_file():
        problems.append(f"has {ADAPTER_CONFIG}, but no adapter_model.safetensors")
    base = None
    try:
        saved = json.loads(adapter.read_text("utf-8"))
        name, revision = saved["base_model_name_or_path"], saved.get("revision")
        base_spec = spec.model_copy(update={"model": name, "revision": revision})
        base = open_model(base_spec, trust_remote_code=trust_remote_code)
    except RequestError as error:
        problems += [f"its base model {error.where}: {problem}" for problem in error.problems]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"its {ADAPTER_CONFIG} can't be read: {one_line(error)}")
    if problems or base is None:
        raise RequestError(problems, spec.model)
    return ModelFiles(spec, base.config, AutoTokenizer.from_pretrained(spec.model), base)


def _processors_template(spec: Model) -> str | None:
    """The chat template that a vision-language model keeps with its processor."""
    from transformers.utils import cached_file

    for name in ("chat_template.json", "processor_config.json"):
        path = cached_file(
            spec.model, name, revision=spec.revision, _raise_exceptions_for_missing_entries=False
        )
        template = path and json.loads(Path(path).read_text("utf-8")).get("chat_template")
        if isinstance(template, str):
            return template
    return None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _config_problem(spec: Model, error: Exception) -> str:
    from transformers.utils.hub import has_file

    if "trust_remote_code" in str(error):
        code = "needs code from its own repository to run"
        return f"{code}; read that code, then pass --trust-remote-code"
    try:
        adapter = has_file(spec.model, "adapter_config.json", spec.revision)
    except Exception:  # pragma: no cover (the hub)
        adapter = False
    if adapter:
        return "is an adapter; merge it into its base model first (PEFT's `merge_and_unload`)"
    return f"its configuration can't be read: {one_line(error)}"


def _weight_problems(spec: Model, config: Any) -> Iterable[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.utils.hub import has_file

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or remote
    if not causal and auto_class(config) is AutoModelForCausalLM:
        yield f"is a {config.model_type} model, which is not a causal language model"
    folder = Path(spec.model)
    index = folder / "model.safetensors.index.json"
    if folder.is_dir() and index.is_file():
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            yield f"{index.name} can't be read: {one_line(error)}"
        else:
            outside = ", ".join(sorted(str(s) for s in shards if Path(str(s)).name != s))
            absent = sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
            if outside:
                yield f"{index.name} lists {outside}, which are not file names in the same folder"
            elif absent:
                yield f"lacks {', '.join(absent)}, which {index.name} names; copy them again"
            else:
                yield from _damaged(folder / shard for shard in sorted(shards))
        return
    names = ("model.safetensors", "model.safetensors.index.json")
    try:
        has_weights = any(has_file(spec.model, name, spec.revision) for name in names)
    except Exception as error:  # pragma: no cover (the hub)
        yield f"its files can't be listed: {one_line(error)}"
        return
    if not has_weights:
        yield (
            "has no weights in safetensors; convert them with `save_pretrained`, since pickled "
            "weights are never loaded"
        )
    elif (folder / "model.safetensors").is_file():
        yield from _damaged([folder / "model.safetensors"])


def _damaged(paths: Iterable[Path]) -> Iterable[str]:
    """Files that are truncated or invalid, according to their headers."""
    from safetensors import SafetensorError, safe_open

    for path in paths:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            problem = f"is truncated or not a safetensors file ({one_line(error)})"
            yield f"{path.name} {problem}; copy it again"


class Digests:
    """SHA-256 of files, cached by path, size and modification time.

    The cache is read from the JSON file `cache`; `save` writes it there.
    """

    def __init__(self, cache: Path):
        self._cache = cache
        try:
            self._known: dict[str, list[Any]] = json.loads(cache.read_text("utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, paths: Iterable[Path]) -> str:
        """One hash over the files' names and contents, in their order."""
        paths = list(paths)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(self._file, paths))
        lines = (f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def save(self) -> None:
        from fusechat_common.files import write_json

        write_json(self._cache, self._known)

    def _file(self, path: Path) -> str:
        stat = path.stat()
        key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(key)
        if known and known[:2] == state:
            return str(known[2])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[key] = [*state, digest]
        return digest
