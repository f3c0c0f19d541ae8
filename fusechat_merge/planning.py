"""From a mergekit configuration to what will be written: every output, its place and its sources.

A plan is data and follows from the configuration and the checkpoints' headers alone; whatever is
wrong with the request is found here, everything at once, before a weight is read.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from mergekit.architecture import (
    WeightInfo,
    get_architecture_info,
)
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.io.tasks import GatherTensors
from mergekit.merge import _model_out_config, _set_chat_template, _update_config_vocab
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import OptionalTensorPolicy
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from transformers import PreTrainedTokenizerFast

from fusechat_merge.checkpoint import (
    Checkpoint,
    CheckpointError,
    Folder,
    HubRepository,
    Location,
    Store,
    download_model,
    read_checkpoint,
)
from fusechat_merge.errors import ConfigError
from fusechat_merge.granularity import SHARED, layer_of, unit_of
from fusechat_merge.lora import LowRank, with_adapter
from fusechat_merge.mergekit_loader import DTYPES, loading
from fusechat_merge.mergekit_units import with_units
from fusechat_merge.parameters import parameter_problems, weightless

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NATIVE = ("varm", "fusechat_sce")
"""Methods that are computed block by block; the others run as mergekit's own tasks."""


@dataclass(frozen=True)
class Options:
    """What besides the configuration decides what is written; names and meaning as in mergekit.

    Attributes:
        shard_size: most bytes of tensors in one output file (a larger tensor has one to itself).
        random_seed: of the methods that draw random numbers.
    """

    shard_size: int = 5_000_000_000
    random_seed: int = 0
    trust_remote_code: bool = False
    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None

    def of_mergekit(self) -> MergeOptions:
        return MergeOptions(
            out_shard_size=self.shard_size,
            trust_remote_code=self.trust_remote_code,
            allow_crimes=self.allow_crimes,
            unsafe_truncate_embeddings=self.unsafe_truncate_embeddings,
            transformers_cache=self.transformers_cache,
            lora_merge_cache=self.lora_merge_cache,
            device="cpu",
            quiet=True,
        )


@dataclass(frozen=True)
class Source:
    """One model's tensor as an input.

    Attributes:
        model: as the configuration names it.
        tensor: its name there.
        location: where its bytes are.
        numel: how many of its elements count, from the first (all but those of rows cut off).
        dtype: to which it is converted before anything else (the YAML's ``dtype``), or its own.
        low_rank: what an adapter adds to it.
    """

    model: str
    tensor: str
    location: Location
    numel: int
    dtype: torch.dtype
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class Output:
    """One tensor that will be written.

    Attributes:
        name: of the tensor.
        how: ``varm``, ``fusechat_sce``, ``copy`` (of the one source) or ``task`` (mergekit's own).
        sources: the inputs, the base first where the method is one of ours.
        parameters: of our methods, resolved for this tensor; ``weight`` is a list, one a target.
        unit: key into the plan's units; None where weights are not shared or have no unit.
        merged_dtype: what the method returns, the promoted dtype of its inputs.
        dtype, shape: as written.
        file, offset, nbytes: its place; ``offset`` counts from the start of the file.
    """

    name: str
    how: str
    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    unit: str | None
    merged_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class SharedUnit:
    """Tensors that share their statistics.

    Attributes:
        name: such as ``model.layers.3``.
        granularity, statistic: as the parameters of ``varm``.
        members: names of the outputs whose deltas count.
    """

    name: str
    granularity: str
    statistic: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its first bytes (length and header) and its size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class LeftOut:
    """An input tensor that no output is made from, and why."""

    model: str
    tensor: str
    reason: str


@dataclass
class Plan:
    """Everything about a merge that can be known before a weight is read.

    Attributes:
        config: the configuration; ``source`` is its text.
        options: what else decides the bytes.
        models: every model's checkpoint, by the name that the configuration gives it.
        donor: the model whose configuration and side files the output gets.
        outputs: in the order in which they are made, which is the order of the donor's files.
        shards: the files.
        units: by key, for the granularities that span tensors.
        by_name: outputs that the architecture's table doesn't know, merged by name.
        copied: outputs that it doesn't know and that not every model has, the base's.
        left_out: input tensors that are not used.
        problems: what stands in the way; with any, ``outputs`` may be incomplete.
        tasks: mergekit's tasks of the outputs that are made by ``task``.
        out_config: mergekit's configuration of the merged model.
        architecture: mergekit's table of the tensors.
        tokenizer: mergekit's merged tokenizer with its permutations, where one is asked for.
        chat_template: the one that the configuration asks for.
    """

    config: MergeConfiguration
    source: str
    options: Options
    models: dict[str, Checkpoint] = field(default_factory=dict)
    donor: str = ""
    outputs: list[Output] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    units: dict[str, SharedUnit] = field(default_factory=dict)
    by_name: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tasks: dict[str, ExecuteMergeMethodTask] = field(default_factory=dict)
    out_config: Any = None
    architecture: Any = None
    tokenizer: Any = None
    chat_template: str | None = None

    @property
    def parameters(self) -> int:
        """Elements of all outputs."""
        return sum(output.numel for output in self.outputs)

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensors that are read, each counted once."""
        read = {(s.model, s.tensor): s.location.nbytes for o in self.outputs for s in o.sources}
        return sum(read.values())

    @property
    def output_bytes(self) -> int:
        """Size of all output files."""
        return sum(shard.size for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """The plan in figures and lists, for people and programs."""
        return {
            "merge_method": self.config.merge_method,
            "models": list(self.models),
            "parameters": self.parameters,
            "tensors": len(self.outputs),
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "shards": [{"name": shard.name, "bytes": shard.size} for shard in self.shards],
            "merged_by_name": self.by_name,
            "copied_from_base": self.copied,
            "left_out": [asdict(left) for left in self.left_out],
            "problems": self.problems,
        }


def plan(
    config: str | Path | Mapping[str, Any] | MergeConfiguration,
    *,
    download: bool = False,
    **options: Any,
) -> Plan:
    """Plan a merge from its configuration and the models' headers.

    Args:
        config: path of a mergekit YAML, or the configuration itself.
        download: fetch models from the hub whole; else only their headers are read there.
        options: fields of ``Options``.

    Returns:
        The plan; what is wrong with the request is listed in its ``problems``.

    Raises:
        ConfigError: the configuration can't be read as one of mergekit's.
    """
    result = read_config(config, Options(**options))
    _name_adapters(result.config)
    for reference in referenced_models(result.config):
        try:
            result.models[str(reference)] = _read_model(reference, result.options, download)
        except CheckpointError as error:
            result.problems += error.problems
    if not result.problems:
        models = {r: result.models[str(r)] for r in referenced_models(result.config)}
        with loading(models, result.options.of_mergekit()):
            _plan_outputs(result)
    return result


def read_config(
    config: str | Path | Mapping[str, Any] | MergeConfiguration, options: Options
) -> Plan:
    """The configuration alone, as a plan without outputs, the problems of its text in it."""
    if isinstance(config, MergeConfiguration):
        config, source = config.model_copy(deep=True), config.to_yaml()
        return Plan(config, source, options, problems=_config_problems(config))
    if isinstance(config, Mapping):
        raw, source = dict(config), yaml.safe_dump(dict(config), sort_keys=False)
    else:
        try:
            source = Path(config).read_text(encoding="utf-8")
            raw = yaml.safe_load(source)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError([f"{config}: can't be read as YAML ({_line(error)})"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(["a mergekit configuration is a YAML mapping with merge_method in it"])
    known = sorted(MergeConfiguration.model_fields)
    problems = [
        f"unknown key {key!r} at the top of the configuration{_nearest(str(key), known)}"
        for key in raw
        if key not in known
    ]
    try:
        parsed = MergeConfiguration.model_validate(raw)
    except Exception as error:  # pydantic's, or a RuntimeError of mergekit's validators
        details = error.errors() if hasattr(error, "errors") else None
        found = (
            [f"{'.'.join(map(str, d['loc'])) or 'configuration'}: {d['msg']}" for d in details]
            if details
            else [_line(error)]
        )
        raise ConfigError(problems + found) from error
    return Plan(parsed, source, options, problems=problems + _config_problems(parsed))


def _config_problems(config: MergeConfiguration) -> list[str]:
    problems = []
    methods = sorted(method.spec.name for method in registry.registered_methods())
    if config.merge_method not in methods:
        problems.append(
            f"unknown merge_method {config.merge_method!r}{_nearest(config.merge_method, methods)};"
            f" use one of {', '.join(methods)}"
        )
    for key in ("dtype", "out_dtype"):
        try:
            dtype_from_name(getattr(config, key))
        except RuntimeError:
            problems.append(
                f"{key}: {getattr(config, key)!r} is unknown; use float16, bfloat16, float32 or"
                " float64"
            )
    return problems + parameter_problems(config)


def referenced_models(config: MergeConfiguration) -> list[ModelReference]:
    """Every model, the base first, then in the order in which the configuration names them."""
    found: dict[ModelReference, None] = {}
    if config.base_model:
        found[config.base_model] = None
    pieces: list[Any] = [config, *(config.modules or {}).values()]
    for piece in pieces:
        for entry in piece.models or []:
            found[entry.model] = None
        for part in piece.slices or []:
            if part.base_model:
                found[part.base_model] = None
            for source in part.sources:
                found[source.model] = None
    return list(found)


def _name_adapters(config: MergeConfiguration) -> None:
    """Read a model that is an adapter's folder as the base with this adapter."""
    base = config.base_model
    pieces: list[Any] = [config, *(config.modules or {}).values()]
    entries = [entry for piece in pieces for entry in piece.models or []]
    entries += [s for piece in pieces for part in piece.slices or [] for s in part.sources]
    for entry in entries:
        folder = Path(entry.model.model.path)
        if (
            base is not None
            and entry.model.lora is None
            and (folder / "adapter_config.json").is_file()
            and not (folder / "config.json").exists()
        ):
            entry.model = ModelReference(model=base.model, lora=entry.model.model)


def _read_model(reference: ModelReference, options: Options, download: bool) -> Checkpoint:
    store = _store(reference.model, options, download)
    try:
        checkpoint = read_checkpoint(store, str(reference))
    except OSError as error:
        raise CheckpointError([f"{reference.model}: can't be read ({_line(error)})"]) from error
    problems = _quantised(checkpoint, store)
    if problems:
        raise CheckpointError(problems)
    if reference.lora is None:
        return checkpoint
    adapter = _store(reference.lora, options, download)
    return with_adapter(checkpoint, adapter, str(reference.lora))


def _store(model: ModelPath, options: Options, download: bool) -> Store:
    path = model.path
    if Path(path).is_dir():
        return Folder(Path(path))
    if Path(path).exists():
        raise CheckpointError([f"{path}: a model is a folder, this is a file"])
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise CheckpointError([f"{path}: no such folder"])
    fetch = download_model if download else HubRepository
    return fetch(path, model.revision, options.transformers_cache)


def _quantised(checkpoint: Checkpoint, store: Store) -> list[str]:
    """What keeps a checkpoint from being merged because its weights are not plain numbers."""
    try:
        size, _ = store.stat("config.json")
        config = json.loads(store.read("config.json", 0, size))
    except (OSError, ValueError) as error:
        return [f"{checkpoint.name}: config.json can't be read ({_line(error)})"]
    scheme = config.get("quantization_config") if isinstance(config, dict) else None
    if scheme:
        kind = scheme.get("quant_method", "quantised") if isinstance(scheme, dict) else "quantised"
    else:
        odd = sorted({at.dtype for at in checkpoint.tensors.values()} - DTYPES.keys())
        if not odd:
            return []
        kind = ", ".join(odd)
    return [
        f"{checkpoint.name}: its weights are quantised ({kind}); merge the original checkpoint, or"
        ' write one: python -c "import sys, transformers as t; m, o = sys.argv[1:];'
        " t.AutoModelForCausalLM.from_pretrained(m, device_map='auto').dequantize()"
        '.save_pretrained(o)" MODEL NEW_FOLDER'
    ]


@dataclass(frozen=True)
class _Input:
    """What loading one model's weight gives: shape and dtype, and which tensors that reads."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: tuple[str, ...]
    direct: bool  # one tensor as it is, not converted from others


@dataclass(frozen=True)
class _Layer:
    """Where one output layer comes from: name prefixes of it and of each model's layer."""

    prefix: str
    prefixes: tuple[str, ...]
    models: tuple[ModelReference, ...]
    reader: ConfigReader


class _Planner(MergePlanner):
    """mergekit's planner, which also remembers where each output's layer came from."""

    def __init__(self, planned: Plan, architecture: Any, config: MergeConfiguration) -> None:
        super().__init__(
            config, architecture, planned.options.of_mergekit(), out_model_config=planned.out_config
        )
        self.layers: dict[str, _Layer] = {}
        self.outside: list[_Layer] = []
        self.problems: list[str] = []
        self.by_name = False

    def plan_all(self) -> list[tuple[WeightInfo, ExecuteMergeMethodTask]]:
        self.normalize_config()
        for name, module in self.config.modules.items():
            self.plan_module(name, module)
        return self._take()

    def plan_by_name(
        self, name: str, inputs: Sequence[str], layer: _Layer
    ) -> list[tuple[WeightInfo, ExecuteMergeMethodTask]]:
        """A tensor that the architecture's table doesn't know."""
        MergePlanner.plan_tensor(
            self,
            WeightInfo(name=name),
            [WeightInfo(name=n) for n in inputs],
            list(layer.models),
            layer.reader,
        )
        return self._take()

    def _take(self) -> list[tuple[WeightInfo, ExecuteMergeMethodTask]]:
        taken = list(self._tensors)
        self._tensors.clear()
        return taken

    def plan_module(self, module_name: str, definition: Any) -> None:
        sources = definition.slices[0].sources
        reader = ConfigReader(config=self.config, t=0, module=definition)
        models = tuple(source.model for source in sources)
        self.outside.append(
            _Layer("", ("",) * len(models), models, reader.for_out_slice(definition.slices[0]))
        )
        super().plan_module(module_name, definition)

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        prefix = layer_of(weight.name)
        if prefix != weight.name and prefix not in self.layers:
            prefixes = tuple(layer_of(w.name) for w in weights_in)
            self.layers[prefix] = _Layer(prefix, prefixes, tuple(models), cfg_reader)
        try:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
        except Exception as error:  # mergekit raises RuntimeError, ValueError and pydantic's own
            self.problems.append(f"{weight.name}: {_line(error)}")

    def known_names(self, model: ModelReference) -> set[str]:
        """Every name under which the architecture's table knows a tensor of the model."""
        return {
            name
            for weight in self._model_arch(model).all_weights()
            for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        }


def _plan_outputs(planned: Plan) -> None:
    config = planned.config.model_copy(deep=True)
    references = referenced_models(config)
    planned.donor = str(references[0])
    try:
        planned.architecture = get_architecture_info(config, planned.options.of_mergekit())
        planned.out_config = _model_out_config(
            config, planned.architecture, trust_remote_code=planned.options.trust_remote_code
        )
        planner = _Planner(planned, planned.architecture, config)
        tensors = planner.plan_all()
        if planner._tokenizer_task:
            planned.tokenizer = _tokenizer(planner._tokenizer_task, references)
        if config.chat_template:
            holder = SimpleNamespace(chat_template=None)
            _set_chat_template(holder, config, planned.options.trust_remote_code)
            planned.chat_template = holder.chat_template
        if planned.tokenizer is not None:
            _update_config_vocab(
                planned.out_config,
                planned.architecture,
                planned.tokenizer.tokenizer,
                pad_to_multiple_of=config.tokenizer and config.tokenizer.pad_to_multiple_of,
            )
    except ConfigError:
        raise
    except Exception as error:  # what mergekit refuses is refused; its errors have no common base
        planned.problems.append(_architecture_remedy(_line(error)))
        return
    planned.problems += planner.problems

    maker = _OutputMaker(planned, config)
    for weight, task in tensors:
        maker.add(weight, task)
    _plan_unknown(planned, planner, maker)
    if maker.weightless:
        planned.problems.append(weightless(maker.weightless))
    planned.outputs = _ordered(planned, maker)
    planned.tasks = maker.tasks
    _plan_units(planned, maker)
    _place(planned)
    _account(planned, maker, planner)


def _tokenizer(task: BuildTokenizer, references: Sequence[ModelReference]) -> Any:
    """mergekit's tokenizer, the same every time: it takes models and words in no fixed order."""
    unordered = PreTrainedTokenizerFast.get_vocab

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(unordered(self).items(), key=lambda item: item[1]))

    PreTrainedTokenizerFast.get_vocab = get_vocab
    try:
        return task.model_copy(update={"referenced_models": tuple(references)}).execute()
    finally:
        PreTrainedTokenizerFast.get_vocab = unordered


def _architecture_remedy(message: str) -> str:
    if "--allow-crimes" in message:
        return "the models have different architectures; --allow-crimes tries all the same"
    return message


class _OutputMaker:
    """Turns mergekit's tasks into outputs, noting which input tensors they use."""

    def __init__(self, planned: Plan, config: MergeConfiguration) -> None:
        self.planned = planned
        self.config = config
        self.outputs: dict[str, Output] = {}
        self.tasks: dict[str, ExecuteMergeMethodTask] = {}
        self.used: dict[str, set[str]] = defaultdict(set)
        self._returned: dict[tuple[str, int, torch.dtype, int], torch.dtype] = {}
        self.weightless: list[str] = []  # outputs for which all weights are 0
        self.regular: dict[str, ExecuteMergeMethodTask] = {}  # varm's, those by name aside
        self.complete: set[str] = set()  # outputs to which every model contributes
        self.coarse: set[str] = set()  # outputs whose own unit has other tensors too

    def add(self, weight: WeightInfo, task: ExecuteMergeMethodTask, alone: bool = False) -> None:
        """One planned tensor; ``alone`` keeps it out of every unit of several tensors."""
        problems = self.planned.problems
        gather = task.gather_tensors
        inner = gather if isinstance(gather, GatherTensors) else gather.gather_tensors
        present: list[tuple[ModelReference, _Input]] = []
        missing: list[str] = []
        for model in task.model_order:
            wanted = inner.weight_info[model]
            found = self._input(model, wanted, inner.dtype)
            if found is not None:
                present.append((model, found))
                self.used[str(model)].update(found.read)
            elif not wanted.optional:
                missing.append(str(model))
                problems.append(f"{model}: lacks {wanted.name}, which its architecture needs")
        if missing:
            return
        outcome = self._outcome(weight, task, [model for model, _ in present])
        if outcome is None:
            return
        base = task.base_model
        first = [pair for pair in present if pair[0] == base]
        ordered = first + [pair for pair in present if pair[0] != base]
        shape = self._shape(weight, task, ordered)
        if shape is None:
            return
        dtypes = [found.dtype for _, found in present]
        if all(dtype.is_floating_point for dtype in dtypes):
            merged = dtypes[0]
            for dtype in dtypes[1:]:
                merged = torch.promote_types(merged, dtype)
        elif len(set(dtypes)) == 1:
            merged = dtypes[0]
        else:
            problems.append(f"{weight.name}: numbers and whole numbers mixed: {dtypes}")
            return
        name = weight.name
        how = self._how(task, ordered, outcome)
        if how == "task" and merged.is_floating_point:
            merged = self._returned_dtype(task, present, shape, merged)
        rows = shape if how != "task" else None
        output = Output(
            name=name,
            how=how,
            sources=tuple(
                source
                for model, found in (ordered if how in NATIVE else present)
                for source in self._sources(model, found, rows)
            ),
            parameters=self._parameters(task, ordered) if how in NATIVE else {},
            unit=None,
            merged_dtype=merged,
            dtype=dtype_from_name(weight.force_dtype or self.config.out_dtype) or merged,
            shape=shape,
        )
        self.outputs[name] = output
        if how == "task":
            self.tasks[name] = task
        if task.method_name == "varm" and how != "copy":
            targets = [model for model, _ in ordered if model != base]
            if not any(task.input_parameters[m]["weight"] for m in targets):
                self.weightless.append(name)
            if not alone:
                self.regular[name] = task
                if len(present) == len(task.model_order) and merged.is_floating_point:
                    self.complete.add(name)
                if task.parameters["granularity"] in SHARED:
                    self.coarse.add(name)

    def copy(self, name: str, model: ModelReference, tensor: str) -> None:
        """The base's tensor under another name: converted like any other if it is floating."""
        at = self.planned.models[str(model)].tensors[tensor]
        dtype = DTYPES[at.dtype]
        loaded = written = dtype
        if dtype.is_floating_point:
            loaded = dtype_from_name(self.config.dtype) or dtype
            written = dtype_from_name(self.config.out_dtype) or loaded
        low_rank = self.planned.models[str(model)].low_rank.get(tensor)
        source = Source(str(model), tensor, at, at.numel, loaded, low_rank)
        self.used[str(model)].add(tensor)
        self.outputs[name] = Output(name, "copy", (source,), {}, None, loaded, written, at.shape)

    def _input(self, model: ModelReference, weight: WeightInfo, dtype: str | None) -> _Input | None:
        tensors = self.planned.models[str(model)].tensors
        loaded = dtype_from_name(weight.force_dtype or dtype)
        for name in (weight.name, *(weight.aliases or ()), *(weight.tied_names or ())):
            if name in tensors:
                at = tensors[name]
                return _Input(at.shape, loaded or DTYPES[at.dtype], (name,), True)
        return self._converted(model, weight, loaded)

    def _converted(
        self, model: ModelReference, weight: WeightInfo, loaded: torch.dtype | None
    ) -> _Input | None:
        """What mergekit's checkpoint conversion would give, found out on tensors without data."""
        tensors = self.planned.models[str(model)].tensors
        read: list[str] = []

        def without_data(name: str) -> torch.Tensor:
            read.append(name)
            at = tensors[name]
            return torch.empty(at.shape, dtype=DTYPES[at.dtype], device="meta")

        lazy = {name: (lambda name=name: without_data(name)) for name in tensors}
        model_type = model.config(
            trust_remote_code=self.planned.options.trust_remote_code
        ).model_type
        for name in (weight.name, *(weight.aliases or ())):
            found = convert_checkpoint_tensors(model_type, lazy, name)
            if found is not None:
                return _Input(tuple(found.shape), loaded or found.dtype, tuple(read), False)
        return None

    def _outcome(
        self, weight: WeightInfo, task: ExecuteMergeMethodTask, present: list[ModelReference]
    ) -> str | None:
        """``merge`` or ``copy`` (of the only input), None for no output, as in mergekit's task."""
        method = registry.get(task.method_name)
        if weight.optional and len(present) < len(task.model_order):
            policy = method.spec.optional_tensor_policy
            alone, is_base = len(present) == 1, present == [task.base_model]
            if alone and (
                policy == OptionalTensorPolicy.PASSTHROUGH_SINGLETON
                or (policy == OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON and is_base)
            ):
                return "copy"
            if (
                policy == OptionalTensorPolicy.BASE_OR_SKIP
                and len(present) < method.spec.contract.min_inputs
            ):
                if is_base:
                    return "copy"
                self._leave_out(weight, task, "too few models have it for this method")
                return None
        try:
            method.validate_inputs(present, task.base_model, group_name=weight.name)
        except ValueError as error:
            self.planned.problems.append(f"{weight.name}: {_line(error)}")
            return None
        return "merge"

    def _leave_out(self, weight: WeightInfo, task: ExecuteMergeMethodTask, reason: str) -> None:
        for model in task.model_order:
            if weight.name in self.planned.models[str(model)].tensors:
                self.planned.left_out.append(LeftOut(str(model), weight.name, reason))

    def _shape(
        self,
        weight: WeightInfo,
        task: ExecuteMergeMethodTask,
        present: list[tuple[ModelReference, _Input]],
    ) -> tuple[int, ...] | None:
        shapes = [found.shape for _, found in present]
        axis = weight.vocabulary_axis
        gather = task.gather_tensors
        if isinstance(gather, (PermutedVocabulary, TruncatedVocabulary)) and axis is not None:
            others = {shape[:axis] + shape[axis + 1 :] for shape in shapes if len(shape) > axis}
            if len(others) == 1 and all(len(shape) > axis for shape in shapes):
                if isinstance(gather, TruncatedVocabulary):
                    rows = min(shape[axis] for shape in shapes)
                else:
                    rows = self._vocabulary_size(gather)
                return (*shapes[0][:axis], rows, *shapes[0][axis + 1 :])
        elif len(set(shapes)) == 1:
            return shapes[0]
        listed = ", ".join(f"{list(found.shape)} in {model}" for model, found in present)
        remedy = ""
        if axis is not None:
            remedy = "; bring the vocabularies together: tokenizer: {source: base} in the YAML"
        self.planned.problems.append(f"{weight.name}: shapes don't fit: {listed}{remedy}")
        return None

    def _vocabulary_size(self, gather: PermutedVocabulary) -> int:
        size = len(self.planned.tokenizer.tokenizer.get_vocab())
        multiple = gather.pad_to_multiple_of
        return -(-size // multiple) * multiple if multiple else size

    def _how(
        self,
        task: ExecuteMergeMethodTask,
        present: list[tuple[ModelReference, _Input]],
        outcome: str,
    ) -> str:
        gather = task.gather_tensors
        contiguous = isinstance(gather, GatherTensors) or (
            isinstance(gather, TruncatedVocabulary) and gather.weight_info.vocabulary_axis == 0
        )
        if not contiguous or not all(found.direct for _, found in present):
            return "task"
        if outcome == "copy" or (
            len(present) == 1
            and (
                task.method_name in NATIVE
                or (
                    task.method_name == "passthrough"
                    and task.input_parameters[present[0][0]]["scale"] is None
                )
            )
        ):
            return "copy"
        floating = all(found.dtype.is_floating_point for _, found in present)
        return task.method_name if task.method_name in NATIVE and floating else "task"

    def _returned_dtype(
        self,
        task: ExecuteMergeMethodTask,
        present: list[tuple[ModelReference, _Input]],
        shape: tuple[int, ...],
        promoted: torch.dtype,
    ) -> torch.dtype:
        """What the method returns, found out by merging a few numbers: some return float32."""
        key = (task.method_name, len(present), promoted, len(shape))
        if key not in self._returned:
            small = tuple(min(size, 3) for size in shape)
            numbers = torch.linspace(0.5, 1, math.prod(small)).reshape(small)
            few = {
                model: (numbers * (1 + i / 8)).to(promoted) for i, (model, _) in enumerate(present)
            }
            try:
                with torch.random.fork_rng(devices=[]):
                    result = task.execute(tensors=few)
                self._returned[key] = promoted if result is None else result.dtype
            except (ValueError, RuntimeError, TypeError):
                self._returned[key] = promoted  # it will say so when it runs
        return self._returned[key]

    def _sources(
        self, model: ModelReference, found: _Input, shape: tuple[int, ...] | None
    ) -> Iterator[Source]:
        for name in found.read:
            at = self.planned.models[str(model)].tensors[name]
            numel = at.numel if shape is None else math.prod(shape)
            low_rank = self.planned.models[str(model)].low_rank.get(name)
            yield Source(str(model), name, at, numel, found.dtype, low_rank)

    def _parameters(
        self, task: ExecuteMergeMethodTask, ordered: list[tuple[ModelReference, _Input]]
    ) -> dict[str, Any]:
        parameters = dict(sorted(task.parameters.items()))
        targets = [model for model, _ in ordered[1:]]
        for spec in registry.get(task.method_name).spec.input_parameters:
            parameters[spec.name] = [task.input_parameters[model][spec.name] for model in targets]
        return parameters


def _plan_unknown(planned: Plan, planner: _Planner, maker: _OutputMaker) -> None:
    """Tensors that the architecture's table doesn't know: merged by name, or the base's copied."""
    unknown: dict[str, dict[str, list[str]]] = {}  # model -> layer (or "") -> rest of the name
    for reference in referenced_models(planned.config):
        model = str(reference)
        known = planner.known_names(reference)
        layers = {layer_of(name) for name in known}
        rests = unknown.setdefault(model, defaultdict(list))
        for name in planned.models[model].tensors:
            if name not in known and name not in maker.used[model]:
                prefix = layer_of(name)
                if prefix == name or prefix not in layers:
                    prefix = ""
                rests[prefix].append(name[len(prefix) :])
    for layer in (*planner.outside[:1], *planner.layers.values()):
        models = list(zip(layer.models, layer.prefixes, strict=True))
        base = layer.reader.base_model or layer.models[0]
        for rest in dict.fromkeys(
            rest for model, prefix in models for rest in unknown[str(model)].get(prefix, ())
        ):
            name = layer.prefix + rest
            if name not in maker.outputs:
                _plan_one_unknown(planned, planner, maker, layer, models, base, rest)


def _plan_one_unknown(
    planned: Plan,
    planner: _Planner,
    maker: _OutputMaker,
    layer: _Layer,
    models: list[tuple[ModelReference, str]],
    base: ModelReference,
    rest: str,
) -> None:
    name = layer.prefix + rest
    found = {
        model: planned.models[str(model)].tensors[prefix + rest]
        for model, prefix in models
        if prefix + rest in planned.models[str(model)].tensors
    }
    if base not in found:
        return  # accounted for at the end
    same_shape = len({at.shape for at in found.values()}) == 1
    floating = all(DTYPES[at.dtype].is_floating_point for at in found.values())
    if len(found) == len(models) and same_shape and floating:
        ((weight, task),) = planner.plan_by_name(
            name, [prefix + rest for _, prefix in models], layer
        )
        maker.add(weight, task, alone=True)
        planned.by_name.append(name)
    else:
        maker.copy(name, base, dict(models)[base] + rest)
        planned.copied.append(name)


def _ordered(planned: Plan, maker: _OutputMaker) -> list[Output]:
    """In the order of the donor's files, if all of it comes from there once; else as planned."""
    outputs = list(maker.outputs.values())
    ranks = {
        (model, tensor): rank
        for model, checkpoint in planned.models.items()
        for rank, tensor in enumerate(checkpoint.tensors)
    }
    leads = []
    for output in outputs:
        own = [s for s in output.sources if s.model == planned.donor] or list(output.sources)
        leads.append((own[0].model, own[0].tensor))
    if len({model for model, _ in leads}) == 1 and len(set(leads)) == len(leads):
        order = sorted(range(len(outputs)), key=lambda i: ranks[leads[i]])
        return [outputs[i] for i in order]
    return outputs


def _plan_units(planned: Plan, maker: _OutputMaker) -> None:
    """Give every output whose granularity spans tensors its unit."""
    if not maker.coarse:
        return
    if any(maker.outputs[name].how == "task" for name in maker.complete | maker.coarse):
        # Converted or permuted tensors: only mergekit's tasks can read units that hold such.
        try:
            united = with_units(list(maker.regular.values()))
        except ConfigError as error:
            planned.problems += error.problems
            return
        for name, task in zip(maker.regular, united, strict=True):
            if name in maker.coarse:
                maker.tasks[name] = task
        planned.outputs = [
            replace(output, how="task", parameters={}) if output.name in maker.coarse else output
            for output in planned.outputs
        ]
        return
    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    used = {maker.outputs[name].parameters["granularity"] for name in maker.coarse}
    for output in planned.outputs:
        if output.name in maker.complete:
            for granularity in used:
                members[granularity, unit_of(output.name, granularity)].append(output.name)
    for index, output in enumerate(planned.outputs):
        if output.name in maker.coarse:
            granularity = output.parameters["granularity"]
            statistic = output.parameters["statistic"]
            unit = unit_of(output.name, granularity)
            key = f"{granularity} {statistic} {unit}"
            planned.outputs[index] = replace(output, unit=key)
            planned.units.setdefault(
                key, SharedUnit(unit, granularity, statistic, tuple(members[granularity, unit]))
            )


def _place(planned: Plan) -> None:
    """Split the outputs into shards and fix every offset."""
    groups: list[list[Output]] = []
    size = 0
    for output in planned.outputs:
        if not groups or (size and size + output.nbytes > planned.options.shard_size):
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    placed: dict[str, Output] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Wider items first, so that every tensor is aligned to its own item.
        group.sort(key=lambda output: -output.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for output in group:
            header[output.name] = {
                "dtype": DTYPE_NAMES[output.dtype],
                "shape": list(output.shape),
                "data_offsets": [position, position + output.nbytes],
            }
            position += output.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        first = 8 + len(raw)
        planned.shards.append(Shard(name, len(raw).to_bytes(8, "little") + raw, first + position))
        position = first
        for output in group:
            placed[output.name] = replace(output, file=name, offset=position)
            position += output.nbytes
    planned.outputs = [placed[output.name] for output in planned.outputs]


def _account(planned: Plan, maker: _OutputMaker, planner: _Planner) -> None:
    """List every input tensor that is not used."""
    listed = {(left.model, left.tensor) for left in planned.left_out}
    for reference in referenced_models(planned.config):
        model = str(reference)
        checkpoint = planned.models[model]
        known = planner.known_names(reference)
        for tensor in checkpoint.tensors:
            if tensor in maker.used[model] or (model, tensor) in listed:
                continue
            if tensor in known:
                reason = "no slice of the configuration takes it"
            elif tensor in maker.outputs:
                reason = "the base has another shape or not every model has it"
            else:
                reason = "the architecture doesn't know it and the base has no such tensor"
            planned.left_out.append(LeftOut(model, tensor, reason))
        for tensor, file in checkpoint.unlisted.items():
            reason = f"it lies in {file}, but the index doesn't place it there"
            planned.left_out.append(LeftOut(model, tensor, reason))


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
