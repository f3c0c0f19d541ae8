"""The YAML recipe: every decision of a run in one place, checked before anything is done."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from fusechat_distill.errors import RequestError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

PIVOT = "pivot"
"""The name that the pivot's store has, and that no source may take."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_by_name=False)


OWN_LOAD_KEYS = {
    "pretrained_model_name_or_path": "the model's `model`",
    "revision": "the model's `revision`",
    "dtype": "the model's `dtype`",
    "torch_dtype": "the model's `dtype`",
    "use_safetensors": None,
    "trust_remote_code": "the option --trust-remote-code",
}


def _load_keys(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        if key in OWN_LOAD_KEYS:
            instead = OWN_LOAD_KEYS[key]
            raise ValueError(
                f"`{key}` can't be set here; "
                + (f"use {instead}" if instead else "weights are read from safetensors only")
            )
    return value


FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def _folder_name(value: str) -> str:
    if not FOLDER_NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} can't name a folder; use a letter or digit, then letters, digits and "
            ". _ + -"
        )
    return value


class Model(Section):
    """A model that is read: a hub name or a folder, and how to load it."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Dtype | None = None
    template: Literal["native", "pivot"] = "native"
    load: Annotated[dict[str, Any], AfterValidator(_load_keys)] = {}
    """Passed to the engine that loads it: `device_map`, `quantization_config`, ..."""


class Source(Model):
    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    vocabulary: Literal["ms", "mined", "em", "bytes"] | None = None

    @property
    def title(self) -> str:
        """The name of its folders: as given, or the last part of the model's."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Dataset(Section):
    path: Annotated[str, Field(min_length=1)]
    name: str | None = None
    split: str = "train"
    column: str | None = None
    max_samples: Annotated[int, Field(ge=1)] | None = None
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02


class Scoring(Section):
    top_k: Annotated[int, Field(ge=1, le=1024)] = 10
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: Dtype = "bfloat16"
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:\d+)?)$")] = "auto"


class Alignment(Section):
    positions: Literal["bytes", "dtw"] = "bytes"
    vocabulary: Literal["ms", "mined", "em", "bytes"] = "ms"
    unmatched: Literal["one_hot", "pivot"] = "one_hot"


class Fusion(Section):
    strategy: Literal["pairwise", "multi", "sft"] = "pairwise"
    function: Literal["min_ce", "avg_ce"] = "min_ce"
    level: Literal["sequence", "token"] = "sequence"
    cross_entropy: Literal["byte", "token"] = "byte"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    tail: Literal["renormalize", "gold"] = "renormalize"


OWN_TRAINING_KEYS = {
    "max_length": "the recipe's top-level `max_length` holds for every stage",
    "output_dir": "targets are written under the recipe's `output`",
    "completion_only_loss": "the loss is over response tokens only",
    "assistant_only_loss": "the loss is over response tokens only",
    "chat_template_path": "the pivot's own chat template is used",
    "eos_token": "the pivot's own tokenizer is used",
    "clm_weight": "the recipe calls it `lambda`",
    "trust_remote_code": "the option --trust-remote-code says so",
    "push_to_hub": "upload the finished target, with its card, instead",
    "resume_from_checkpoint": "a run that was stopped goes on by itself",
    "save_only_model": "a run that was stopped could not go on",
}


class Training(BaseModel):
    """λ, LoRA, and any field of TRL's SFTConfig (in `model_extra`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, validate_by_name=False)

    clm_weight: Annotated[float, Field(alias="lambda", ge=0, le=1)] = 0.9
    lora: dict[str, Any] | None = None

    @property
    def sft(self) -> dict[str, Any]:
        """The SFTConfig fields that the recipe sets."""
        given = self.model_extra or {}
        # In YAML an unquoted `no`, which is what TRL calls it, is false.
        return {k: "no" if v is False and k.endswith("_strategy") else v for k, v in given.items()}


class Merge(Section):
    merge_method: Annotated[str, Field(min_length=1)] = "varm"
    parameters: dict[str, Any] = {}
    dtype: str = "bfloat16"


class Recipe(Section):
    output: Annotated[str, Field(min_length=1)]
    pivot: Annotated[Model, BeforeValidator(_as_model)]
    sources: tuple[Annotated[Source, BeforeValidator(_as_model)], ...] = Field(
        default=(), strict=False
    )
    dataset: Annotated[Dataset, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]
    max_length: Annotated[int, Field(ge=2)] = 2048
    scoring: Scoring = Scoring()
    alignment: Alignment = Alignment()
    fusion: Fusion = Fusion()
    training: Training = Training()
    merge: Merge = Merge()

    @property
    def models(self) -> dict[str, Model]:
        """Every model that is scored, by the name of its folder; the pivot first."""
        return {PIVOT: self.pivot} | {source.title: source for source in self.sources}

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def scores_folder(self) -> Path:
        return self.output_folder / "scores"

    @property
    def aligned_folder(self) -> Path:
        return self.output_folder / "aligned"

    @property
    def fused_folder(self) -> Path:
        return self.output_folder / "fused"

    @property
    def training_folder(self) -> Path:
        """Checkpoints of targets that are not finished yet."""
        return self.output_folder / "training"

    @property
    def targets_folder(self) -> Path:
        return self.output_folder / "targets"


def load_recipe(path: str | Path) -> Recipe:
    """Read the recipe at `path`.

    Raises:
        RequestError: with every problem found in it.
    """
    recipe, problems = read_recipe(path)
    if problems or recipe is None:
        raise RequestError(str(path), problems)
    return recipe


def read_recipe(path: str | Path) -> tuple[Recipe | None, list[str]]:
    """The recipe at `path` and every problem found in it.

    Where the problems leave enough to go on with (a wrong value stands for its default), the
    recipe comes as well, so that a caller can look for further problems in what it names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        return None, [f"can't be read ({error.strerror}); `fusechat-distill init` writes a recipe"]
    except UnicodeDecodeError as error:
        return None, [f"is not UTF-8 text (byte {error.start}); save it as UTF-8"]
    try:
        raw = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        return None, [f"is not YAML: {' '.join(str(error).split())}"]
    if not isinstance(raw, dict):
        return None, ["holds no mapping; `fusechat-distill init` writes a recipe"]
    recipe, problems = _parse(raw)
    if recipe is not None:
        # Sources that couldn't be read are not none.
        no_list = any(problem.startswith("sources:") for problem in problems)
        problems += _contradictions(recipe, no_list)
        unknown = _training_problems(recipe.training)
        problems += unknown.values()
        if unknown:
            given = recipe.training.model_dump(by_alias=True, exclude_unset=True)
            training = Training.model_validate(_without(given, unknown))
            recipe = recipe.model_copy(update={"training": training})
    return recipe, problems


def _training_problems(training: Training) -> dict[tuple[str, ...], str]:
    """What is wrong with the keys of `training:` and `training.lora:`, by where they are.

    TRL and PEFT say which keys there are; they are imported only when a recipe sets any.
    """
    problems: dict[tuple[str, ...], str] = {}
    others = []
    for key in training.sft:
        if key in OWN_TRAINING_KEYS or key.startswith("dataset_"):
            why = OWN_TRAINING_KEYS.get(key, "the pipeline prepares the dataset")
            problems[(key,)] = f"training.{key}: remove it, {why}"
        else:
            others.append(key)
    if others:
        from trl import SFTConfig

        fields = [f for f in SFTConfig.__dataclass_fields__ if f not in OWN_TRAINING_KEYS]
        known = {*fields, "lambda", "lora"}
        problems |= {
            (key,): f"training.{key}: {unknown_key(key, known, 'a field of SFTConfig')}"
            for key in others
            if key not in known
        }
    if training.lora:
        from peft import LoraConfig

        known = set(LoraConfig.__dataclass_fields__)
        what = "a field of LoraConfig"
        problems |= {
            ("lora", key): f"training.lora.{key}: {unknown_key(key, known, what)}"
            for key in training.lora
            if key not in known
        }
    return problems


def _contradictions(recipe: Recipe, no_list: bool) -> list[str]:
    problems = []
    if not (recipe.sources or no_list) and recipe.fusion.strategy != "sft":
        problems.append(
            "sources: is empty; name at least one model, or set fusion.strategy: sft for the "
            "baseline without sources"
        )
    seen: dict[str, str] = {PIVOT: "the pivot's"}
    for index, source in enumerate(recipe.sources):
        if not FOLDER_NAME.fullmatch(source.title):
            problems.append(
                f"sources[{index}].name: {source.title!r} can't name a folder; give this source "
                "a `name`"
            )
        elif source.title.lower() in seen:
            problems.append(
                f"sources[{index}].name: {source.title!r} is {seen[source.title.lower()]} name "
                "already; give this source another `name`"
            )
        else:
            seen[source.title.lower()] = f"sources[{index}]'s"
    return problems


def _parse(raw: dict[Any, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe, with what is wrong left out where that leaves a recipe; and what is wrong."""
    problems: list[str] = []
    left_out: set[tuple[str | int, ...]] = set()
    while True:
        try:
            return Recipe.model_validate(raw), problems
        except ValidationError as error:
            errors = error.errors(include_url=False)
            problems += [_problem(e) for e in errors if e["loc"] not in left_out]
            if any(e["type"] == "missing" for e in errors):
                return None, problems
            left_out |= {e["loc"] for e in errors}
            raw = _without(raw, left_out)


def _problem(error: Any) -> str:
    loc: tuple[str | int, ...] = error["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if error["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1])
        return f"{name}: {unknown_key(str(loc[-1]), known, 'a key here')}"
    if error["type"] == "missing":
        return f"{name}: is missing"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {unexpected([error], error['input'])}"


def unexpected(errors: Sequence[Any], found: Any) -> str:
    """What pydantic would have taken in the place of `found`, of one type or several."""
    wanted = []
    for error in errors:
        message = error["msg"].removeprefix("Input should ").removeprefix("be ")
        message = message.replace("String should have", "text of")
        if error["type"] in ("model_type", "model_attributes_type"):
            message = "a mapping of keys to values"
        elif error["type"] == "tuple_type":
            message = "a list"
        elif error["type"] == "string_pattern_mismatch":
            message = f"text that matches {error['ctx']['pattern']}"
        wanted.append(message)
    if isinstance(found, (dict, list)):
        shown = "a mapping" if isinstance(found, dict) else "a list"
    else:
        shown = repr(found)
    return f"should be {' or '.join(dict.fromkeys(wanted))}, found {shown}"


def unknown_key(key: str, known: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if near:
        return f"is not {what}; did you mean `{near[0]}`?"
    listed = sorted(known)
    return f"is not {what}" + (f"; there are {', '.join(listed)}" if len(listed) <= 12 else "")


def _keys_at(loc: Sequence[str | int]) -> set[str]:
    """The keys that the section at `loc` knows."""
    section: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        section = {"pivot": Model, "sources": Source}.get(part) or _section(part)
    return {field.alias or name for name, field in section.model_fields.items()}


def _section(key: str) -> type[BaseModel]:
    annotation = Recipe.model_fields[key].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def _without(raw: Any, locs: Iterable[Sequence[str | int]]) -> Any:
    """A copy of `raw` without the values at `locs`."""
    cut: dict[Any, list[Sequence[str | int]]] = {}
    for loc in locs:
        if loc:
            cut.setdefault(loc[0], []).append(loc[1:])
    if isinstance(raw, Mapping):
        items: Iterable[tuple[Any, Any]] = raw.items()
    elif isinstance(raw, list):
        items = enumerate(raw)
    else:
        return raw
    kept = [
        (key, _without(value, cut.get(key, ())))
        for key, value in items
        if not (key in cut and any(len(rest) == 0 for rest in cut[key]))
    ]
    return dict(kept) if isinstance(raw, Mapping) else [value for _, value in kept]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `5e-6` is a number, as everyone who writes one means it, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


TEMPLATE = """\
# What to fuse, from what, and how. Every key is shown with its default, unless a comment says that
# it has none; what is left out has its default, and an unknown key is an error.

output: runs/fusechat               # no default; everything is written below this folder

# Models are hub names or folders. A plain string will do; the long form also takes `load`, which
# goes to the engine as it is (device_map, quantization_config, attn_implementation, ...).
pivot:                              # no default; the model that is trained
  model: Qwen/Qwen2.5-0.5B-Instruct
  revision: null                    # branch, tag or commit; null: the hub's main
  dtype: null                       # for scoring; null: scoring.dtype
  template: native                  # the model's own chat template, or the pivot's: pivot
  load: {}
sources:                            # no default; the models it learns from
  - HuggingFaceTB/SmolLM2-1.7B-Instruct
  # - model: org/model              # as above, and:
  #   name: model                   # of its folders; default: the last part of `model`
  #   vocabulary: ms                # default: alignment.vocabulary

dataset:                            # chats: messages, ShareGPT conversations, or prompt/completion
  path: trl-lib/Capybara            # no default; hub name, file, or saved folder
  name: null                        # configuration of a hub dataset
  split: train
  column: null                      # null: found by its name and content
  max_samples: null                 # null: all
  eval_fraction: 0.02               # held out from training
max_length: 2048                    # in the pivot's tokens; longer conversations are cut

scoring:
  top_k: 10                         # entries kept at each position
  engine: transformers              # or vllm
  dtype: bfloat16                   # auto, bfloat16, float16, float32
  batch_tokens: 16384               # tokens in one forward; halved where memory runs out
  device: auto                      # auto, cpu, cuda, cuda:1, mps

alignment:
  positions: bytes                  # or dtw, the papers' alignment
  vocabulary: ms                    # ms, mined, em, bytes
  unmatched: one_hot                # or pivot: the pivot's own distribution

fusion:
  strategy: pairwise                # one target for each source; multi: one for all; sft: baseline
  function: min_ce                  # or avg_ce
  level: sequence                   # or token
  cross_entropy: byte               # or token, the papers'
  temperature: 1.0
  tail: renormalize                 # or gold: what the top k leave goes to the gold token

training:                           # any field of TRL's SFTConfig as well
  lambda: 0.9                       # weight of the language-modelling loss; the rest is fusion's
  lora: null                        # or fields of PEFT's LoraConfig: {r: 16, lora_alpha: 32}

merge:                              # goes into merge.yml
  merge_method: varm
  parameters: {}
  dtype: bfloat16
"""
