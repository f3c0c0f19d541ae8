"""The YAML recipe: every decision of a run in one place, checked before anything is done."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fusechat_common.errors import RequestError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

PIVOT = "pivot"
"""The name of the pivot's store; no source may have it."""


class Section(BaseModel):
    """A section of the recipe; the docstrings of its fields are their documentation.

    `reference` generates the recipe that `init` writes, the JSON schema and the reference page
    from them.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_by_name=False,
        use_attribute_docstrings=True,
    )


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
            remedy = f"use {instead}" if instead else "weights are read from safetensors only"
            raise ValueError(f"`{key}` can't be set here; {remedy}")
    return value


FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def _folder_name(value: str) -> str:
    if not FOLDER_NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} can't name a folder; use a letter or digit, then letters, digits and "
            ". _ + -, 128 at most"
        )
    return value


class Model(Section):
    """A model: a hub name or a folder, and how to load it. A plain string stands for `model`."""

    model: Annotated[str, Field(min_length=1, examples=["Qwen/Qwen2.5-0.5B-Instruct"])]
    """Hub name (`org/model`), or a folder with a model written by `save_pretrained`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the branch `main`."""
    dtype: Dtype | None = None
    """Dtype of the weights while the model is scored; null: `scoring.dtype`.

    Training has its own setting: float32 weights, see `training`."""
    template: Literal["native", "pivot"] = "native"
    """The chat template that conversations are rendered with: the model's own, or the pivot's."""
    load: Annotated[dict[str, Any], AfterValidator(_load_keys)] = {}
    """Passed unchanged to the engine that loads the model: `device_map`, `quantization_config`, ...

    transformers: arguments of `from_pretrained`; vLLM: of `vllm.LLM`. All of them are part of the
    identity of the scores, except where the model is placed (`device_map`, `max_memory`,
    `offload_folder`, `offload_state_dict`)."""


class Source(Model):
    """A model that the pivot learns from: the keys of `pivot`, and two more. A plain string stands
    for `model`."""

    name: Annotated[str, AfterValidator(_folder_name)] | None = None
    """Name of its folders and of its target; null: the last part of `model`.

    A letter or digit, then letters, digits and `. _ + -`; different from every other source's
    name, ignoring case, and from `pivot`."""
    vocabulary: Literal["ms", "mined", "em", "bytes"] | None = None
    """This source's map to the pivot's vocabulary; null: `alignment.vocabulary`."""

    @property
    def title(self) -> str:
        """The name of its folders: as given, or the last part of the model's."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


def _as_model(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Dataset(Section):
    """Chats: `messages`, ShareGPT `conversations`, or `prompt` and `completion`. A plain string
    stands for `path`."""

    path: Annotated[str, Field(min_length=1, examples=["trl-lib/Capybara"])]
    """Hub name; JSON, JSONL, CSV, Parquet or Arrow file; folder of such files or of `save_to_disk`.

    JSON, JSONL and CSV may be compressed (`.gz`, `.bz2`, `.xz`)."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = "train"
    """The split that is read; the held-out conversations are taken from it too."""
    column: str | None = None
    """The column that contains the messages; null: recognised by its name."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Use only the first so many usable rows; null: all."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the conversations that is held out from training, for `evaluate`.

    A hash of each conversation decides, so adding or removing rows does not affect the others."""


class Scoring(Section):
    """What is stored of every model's next-token distributions, and how they are computed."""

    top_k: Annotated[int, Field(ge=1, le=1024)] = 10
    """Number of most probable tokens stored per position; each takes about 3 bytes in every store.

    At most the size of the smallest vocabulary."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The library that runs the models."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights, for models without their own `dtype`; auto: as saved."""
    batch_tokens: Annotated[int, Field(ge=1)] = 16384
    """Tokens in one forward pass, padding included; halved if memory runs out. vLLM: not used."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|npu)(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1, mps, xpu or npu; auto uses an accelerator if there is one.

    One process with several CUDA devices distributes each model over all of them."""


class Alignment(Section):
    """How a source's distributions become distributions over the pivot's tokens."""

    positions: Literal["bytes", "dtw"] = "bytes"
    """How positions are matched: by the bytes consumed, or by the papers' dynamic time warping."""
    vocabulary: Literal["ms", "mined", "em", "bytes"] = "ms"
    """The pivot token that a source token is mapped to: the one that most often begins at the same
    byte (ms), the nearest by edit distance (mined), the one with the same bytes or none (em), the
    first token of its bytes (bytes)."""
    unmatched: Literal["one_hot", "pivot"] = "one_hot"
    """The distribution where no position of the source matches: the label, or the pivot's own
    distribution."""


class Fusion(Section):
    """Which distributions the targets are trained on."""

    strategy: Literal["pairwise", "multi", "sft"] = "pairwise"
    """One target for each source, one for all sources together, or the baseline without sources."""
    function: Literal["min_ce", "avg_ce"] = "min_ce"
    """The model with the lowest cross-entropy, or all models weighted by softmax(-cross-entropy).

    With avg_ce a row has `top_k` entries for each model, so the dataset is larger."""
    level: Literal["sequence", "token"] = "sequence"
    """Decided per conversation, or per segment between two positions that all models match."""
    cross_entropy: Literal["byte", "token"] = "byte"
    """Nats per byte, comparable across tokenizers, or per token of each model's tokenizer, as in
    the papers."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Divides log-probabilities before they are fused; above 1 the distributions become flatter."""
    tail: Literal["renormalize", "gold"] = "renormalize"
    """Where the probability outside the top k goes: to these in proportion, or to the label."""


OWN_TRAINING_KEYS = {
    "max_length": "the recipe's top-level `max_length` holds for every stage",
    "output_dir": "targets are written under the recipe's `output`",
    "completion_only_loss": "the loss is over response tokens only",
    "assistant_only_loss": "the loss is over response tokens only",
    "chat_template_path": "the pivot's own chat template is used",
    "eos_token": "the pivot's own tokenizer is used",
    "clm_weight": "the recipe calls it `lambda`",
    "trust_remote_code": "use the option --trust-remote-code",
    "push_to_hub": "upload the finished target, with its card, instead",
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "save_only_model": "an interrupted run could not be resumed",
}


class Training(BaseModel):
    """How a target is trained; any field of TRL's `SFTConfig` is a key here as well.

    The defaults are TRL's, with two exceptions: weights are float32, under autocast to bfloat16
    where the hardware supports it (`pivot.dtype` is for scoring), and one checkpoint is kept."""

    model_config = Section.model_config | ConfigDict(extra="allow")

    clm_weight: Annotated[float, Field(alias="lambda", ge=0, le=1)] = 0.9
    """Weight of the language-modelling loss; 1 - lambda is the weight of the fusion loss.

    For the baseline (`fusion.strategy: sft`) it is always 1."""
    lora: dict[str, Any] | None = None
    """Fields of PEFT's `LoraConfig`: {r: 16, lora_alpha: 32}; null: all weights are trained."""

    @property
    def sft(self) -> dict[str, Any]:
        """The SFTConfig fields that the recipe sets."""
        fields = self.model_extra or {}
        # In YAML an unquoted `no`, which is a value of these fields, is false.
        return {k: "no" if v is False and k.endswith("_strategy") else v for k, v in fields.items()}


class Merge(Section):
    """The content of `merge.yml`, which is written when all targets are complete."""

    merge_method: Annotated[str, Field(min_length=1)] = "varm"
    """varm, fusechat_sce, or any merge method of mergekit."""
    parameters: dict[str, Any] = {}
    """Parameters of the method, such as {granularity: layer}."""
    dtype: str = "bfloat16"
    """Dtype of the merged weights: bfloat16, float16, float32 or float64."""


class Recipe(Section):
    """Which models to fuse, on which dataset, and how."""

    output: Annotated[str, Field(min_length=1, examples=["runs/fusechat"])]
    """The folder that everything is written to; relative to the folder where the command runs."""
    pivot: Annotated[Model, BeforeValidator(_as_model)]
    """The model that is trained; all distributions are mapped to its vocabulary."""
    sources: tuple[Annotated[Source, BeforeValidator(_as_model)], ...] = Field(
        default=(), strict=False, examples=[["HuggingFaceTB/SmolLM2-1.7B-Instruct"]]
    )
    """The models that the pivot learns from; an empty list only with `fusion.strategy: sft`."""
    dataset: Annotated[Dataset, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]
    """The chats whose answers every model scores."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Maximum length of a conversation in tokens of the pivot; a longer one is cut, for all models
    at the same place."""
    scoring: Scoring = Scoring()
    alignment: Alignment = Alignment()
    fusion: Fusion = Fusion()
    training: Training = Training()
    merge: Merge = Merge()

    @property
    def models(self) -> dict[str, Model]:
        """Every model that is scored, by the name of its folder; the pivot comes first."""
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
        """Checkpoints of targets that are still being trained."""
        return self.output_folder / "training"

    @property
    def targets_folder(self) -> Path:
        return self.output_folder / "targets"


def load_recipe(path: str | Path) -> Recipe:
    """Read the recipe at `path`, a YAML file.

    Raises:
        RequestError: the recipe can't be used; it lists every problem.
    """
    recipe, problems = read_recipe(path)
    if problems or recipe is None:
        raise RequestError(problems, path)
    return recipe


def read_recipe(path: str | Path) -> tuple[Recipe | None, list[str]]:
    """The recipe at `path` and every problem found in it.

    If only some values are wrong, they are replaced by their defaults and the recipe is returned
    too, so that the caller can check what it names and report those problems as well.
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
        return None, ["is not a mapping; `fusechat-distill init` writes a recipe"]
    recipe, problems = _parse(raw)
    if recipe is not None:
        # Unreadable sources are not the same as no sources.
        no_list = any(problem.startswith("sources:") for problem in problems)
        problems += _contradictions(recipe, no_list)
        unknown = _training_problems(recipe.training)
        problems += unknown.values()
        if unknown:
            keys = recipe.training.model_dump(by_alias=True, exclude_unset=True)
            training = Training.model_validate(_without(keys, unknown))
            recipe = recipe.model_copy(update={"training": training})
    return recipe, problems


def _training_problems(training: Training) -> dict[tuple[str, ...], str]:
    """The problems of the keys in `training:` and `training.lora:`, by the key's path.

    TRL and PEFT define the keys; they are imported only if the recipe sets any.
    """
    problems: dict[tuple[str, ...], str] = {}
    others = []
    for key in training.sft:
        if key in OWN_TRAINING_KEYS or key.startswith("dataset_"):
            why = OWN_TRAINING_KEYS.get(key, "the pipeline prepares the dataset")
            problems[(key,)] = f"training.{key}: remove it, {why}"
        else:
            others.append(key)

    def check(keys: Iterable[str], known: set[str], what: str, *path: str) -> None:
        for key in keys:
            if key not in known:
                where = ".".join(("training", *path, key))
                problems[(*path, key)] = f"{where}: {unknown_key(key, known, what)}"

    if others:
        from trl import SFTConfig

        fields = set(SFTConfig.__dataclass_fields__) - OWN_TRAINING_KEYS.keys()
        check(others, fields | {"lambda", "lora"}, "a field of SFTConfig")
    if training.lora:
        from peft import LoraConfig

        check(training.lora, set(LoraConfig.__dataclass_fields__), "a field of LoraConfig", "lora")
    return problems


def _contradictions(recipe: Recipe, no_list: bool) -> list[str]:
    problems = []
    try:
        os.lstat(recipe.output_folder / "manifest.json")
    except ValueError as error:
        problems.append(f"output: can't be the name of a folder ({error}); set another")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            problems.append("output: is too long for the name of a folder; set another")
    if not (recipe.sources or no_list) and recipe.fusion.strategy != "sft":
        problems.append(
            "sources: is empty; name at least one model, or set fusion.strategy: sft for the "
            "baseline without sources"
        )
    seen: dict[str, str] = {PIVOT: "the pivot's"}
    for index, source in enumerate(recipe.sources):
        where, owner = f"sources[{index}].name: {source.title!r}", f"sources[{index}]'s"
        if not FOLDER_NAME.fullmatch(source.title):
            problems.append(f"{where} can't name a folder; give this source a `name`")
        elif (other := seen.setdefault(source.title.lower(), owner)) != owner:
            problems.append(f"{where} is already {other} name; give this source another `name`")
    return problems


def _parse(raw: dict[Any, Any]) -> tuple[Recipe | None, list[str]]:
    """The recipe without its invalid values, None if that is not possible; and the problems."""
    problems: list[str] = []
    removed: set[tuple[str | int, ...]] = set()
    while True:
        try:
            return Recipe.model_validate(raw), problems
        except ValidationError as error:
            errors = error.errors(include_url=False)
            problems += [_problem(e) for e in errors if e["loc"] not in removed]
            # A key that is not text can't be located by its path, so it can't be removed either.
            stuck = removed >= {e["loc"] for e in errors}
            if stuck or any(e["type"] == "missing" for e in errors):
                return None, problems
            removed |= {e["loc"] for e in errors}
            raw = _without(raw, removed)


def _problem(error: Any) -> str:
    loc: tuple[str | int, ...] = error["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if error["type"] == "extra_forbidden":
        known = _keys_at(loc[:-1])
        return f"{name}: {unknown_key(str(loc[-1]), known, 'a key here')}"
    if error["type"] == "missing":
        return f"{name}: is missing"
    if error["type"] == "invalid_key":
        return f"{name}: the key {error['input']!r} is not text; every key has to be"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {unexpected([error], error['input'])}"


def unexpected(errors: Sequence[Any], value: Any) -> str:
    """`should be …, found …`: what pydantic expected (one type or several) instead of `value`."""
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
    if isinstance(value, (dict, list)):
        shown = "a mapping" if isinstance(value, dict) else "a list"
    else:
        shown = repr(value)
    return f"should be {' or '.join(dict.fromkeys(wanted))}, found {shown}"


def unknown_key(key: str, known: Iterable[str], what: str) -> str:
    """`is not WHAT`, with the nearest known key, or all of them where they are few."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    if near:
        return f"is not {what}; did you mean `{near[0]}`?"
    listed = sorted(known)
    return f"is not {what}" + (f"; use one of {', '.join(listed)}" if len(listed) <= 12 else "")


def _keys_at(loc: Sequence[str | int]) -> set[str]:
    """The keys of the section at the path `loc`."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        section = {"pivot": Model, "sources": Source}.get(
            part, Recipe.model_fields[part].annotation
        )
    return {field.alias or name for name, field in section.model_fields.items()}


def _without(raw: Any, locs: Iterable[Sequence[str | int]]) -> Any:
    """A copy of `raw` without the values at the paths `locs`."""
    cut: dict[Any, list[Sequence[str | int]]] = {}
    for loc in locs:
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


DEPTH = 50
NODES = 100_000
"""Limit of the values in a recipe, each counted as often as an alias repeats it."""


def _invalid(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that `5e-6` is a number, and that duplicate keys are errors.

    Errors too: nesting deeper than `DEPTH`, an alias inside the value that it stands for, and
    aliases that expand to more than `NODES` values in total.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEPTH}", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _expanded(node, {}) > NODES:
            raise _invalid(f"its aliases expand to more than {NODES:,} values", node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            # Deep, so that an alias inside the value that it stands for is an error.
            return super().construct_object(node, deep=True)
        except (ValueError, TypeError) as error:  # no such day; a list as a mapping's key
            raise _invalid(" ".join(str(error).split()), node) from error
        except (LookupError, AttributeError) as error:  # `!!bool x`, `!!int ''`, `!!timestamp x`
            kind = node.tag.rpartition(":")[2]
            raise _invalid(f"{node.value!r} is not a valid {kind}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _invalid(f"duplicate key `{key}`", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node has once its aliases are expanded."""
    if node not in known:
        known[node] = 1
        if isinstance(node, yaml.MappingNode):
            known[node] += sum(_expanded(part, known) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            known[node] += sum(_expanded(part, known) for part in node.value)
    return known[node]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
