"""From mergekit's tasks to a plan's outputs: how each is computed, its inputs and its shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration
from mergekit.io.tasks import GatherTensors
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import OptionalTensorPolicy
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner
from mergekit.tokenizer import PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary

from fusechat_common.errors import one_line
from fusechat_merge.mergekit_bridge.by_files import FilesModule
from fusechat_merge.mergekit_bridge.loader import DTYPES
from fusechat_merge.methods.stacks import down_of, has_halves, is_stack, matrices
from fusechat_merge.methods.units import layer_of, shared_unit
from fusechat_merge.planning.configuration import referenced_models
from fusechat_merge.planning.plan import (
    ELEMENTWISE,
    NATIVE,
    SPHERICAL,
    LeftOut,
    Output,
    Plan,
    Source,
)


@dataclass(frozen=True)
class _Input:
    """What loading one model's weight gives: the tensor's name there, its shape and dtype."""

    tensor: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Layer:
    """Where one output layer comes from: name prefixes of it and of each model's layer."""

    prefix: str
    prefixes: tuple[str, ...]
    models: tuple[ModelReference, ...]
    reader: ConfigReader


class LayerPlanner(MergePlanner):
    """mergekit's planner, which also remembers where each output's layer came from."""

    def __init__(self, planned: Plan, architecture: Any, config: MergeConfiguration) -> None:
        super().__init__(
            config, architecture, planned.options.of_mergekit(), out_model_config=planned.out_config
        )
        self.layers: dict[str, _Layer] = {}
        self.outside: list[_Layer] = []
        # Of each module, for each of its layers the model and layer that lead.
        self.sources: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.problems: list[tuple[str, str]] = []  # (tensor, problem)

    def plan_all(self, add: Callable[[WeightInfo, ExecuteMergeMethodTask], None]) -> None:
        """Plan every tensor; `add` gets each at once, so that their tasks take no memory."""
        self.normalize_config()
        self._add = add
        for name, module in self.config.modules.items():
            self.plan_module(name, module)

    def plan_by_name(
        self, name: str, inputs: Sequence[str], layer: _Layer
    ) -> tuple[WeightInfo, ExecuteMergeMethodTask]:
        """A tensor that the architecture's table doesn't know."""
        weights = [WeightInfo(name=n) for n in inputs]
        super().plan_tensor(WeightInfo(name=name), weights, list(layer.models), layer.reader)
        return self._tensors.pop()

    def plan_module(self, module_name: str, definition: Any) -> None:
        sources = definition.slices[0].sources
        reader = ConfigReader(config=self.config, t=0, module=definition)
        models = tuple(source.model for source in sources)
        reader = reader.for_out_slice(definition.slices[0])
        self.outside.append(_Layer("", ("",) * len(models), models, reader))
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
            self.problems.append((weight.name, f"{weight.name}: {one_line(error)}"))
        while self._tensors:
            self._add(*self._tensors.pop())

    def plan_layer(
        self,
        sources: list[InputSliceDefinition],
        layer_offset: int,
        t: float,
        cfg_reader: ConfigReader,
        module_name: str,
    ) -> None:
        module = self.arch_info.modules[module_name].architecture
        numbers = [source.layer_range[0] + layer_offset for source in sources]
        models = [source.model for source in sources]
        base = cfg_reader.base_model
        first = models.index(base) if base in models else 0
        lead = numbers[first]
        self.sources[module_name].append((str(models[first]), lead))
        if not isinstance(module, FilesModule):
            super().plan_layer(sources, layer_offset, t, cfg_reader, module_name)
            return
        # Layers may differ: the base's layer says what the output's has.
        for weight in module.layer_weights(lead, None):
            self.plan_tensor(
                module.renumbered(weight, self._current_module_layers),
                [module.renumbered(weight, n) for n in numbers],
                models,
                cfg_reader.with_t(t),
            )
        self._current_module_layers += 1

    def known_names(self, model: ModelReference) -> set[str]:
        """Every name under which the architecture's table knows a tensor of the model."""
        return {name for w in self._model_arch(model).all_weights() for name in _names_of(w)}


def _names_of(weight: WeightInfo) -> tuple[str, ...]:
    return (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))


class OutputMaker:
    """Turns mergekit's tasks into outputs, noting which input tensors they use."""

    def __init__(self, planned: Plan, config: MergeConfiguration) -> None:
        self.planned = planned
        self.config = config
        self.outputs: dict[str, Output] = {}
        self.tensors: dict[str, Output] = {}  # the same, stacks of experts in one piece
        self.problems: list[tuple[str, str]] = []  # (tensor, problem)
        self.tasks: dict[str, ExecuteMergeMethodTask] = {}
        self.used: dict[str, set[str]] = defaultdict(set)
        self._returned: dict[tuple[str, int, torch.dtype, int], torch.dtype] = {}
        self.weightless: list[str] = []  # outputs for which all weights are 0
        # varm's, those by name aside, where units of several tensors may need them.
        self.regular: dict[str, ExecuteMergeMethodTask] = {}
        self._keep = "granularity" in planned.source
        self.complete: set[str] = set()  # outputs to which every model contributes

    def add(self, weight: WeightInfo, task: ExecuteMergeMethodTask, alone: bool = False) -> None:
        """One planned tensor; `alone` keeps it out of every unit of several tensors."""
        name, problems = weight.name, self.problems
        # Which models have the tensor; a tokenizer merge wraps the task that gathers them.
        gather = task.gather_tensors
        inner = gather if isinstance(gather, GatherTensors) else gather.gather_tensors
        present: list[tuple[ModelReference, _Input]] = []
        number = len(problems)
        for model in task.model_order:
            wanted = inner.weight_info[model]
            loaded = self._input(model, wanted, inner.dtype)
            if loaded is not None:
                present.append((model, loaded))
                self.used[str(model)].add(loaded.tensor)
            elif not wanted.optional:
                problem = f"{model}: lacks {wanted.name}, which its architecture needs"
                problems.append((wanted.name, problem))
        if len(problems) > number:
            return
        outcome = self._outcome(weight, task, [model for model, _ in present])
        if outcome is None:
            return
        # Our methods take the base first; mergekit's tasks keep the order of the models.
        base = task.base_model
        ordered = sorted(present, key=lambda pair: pair[0] != base)
        shape = self._shape(weight, task, ordered)
        if shape is None:
            return
        # Floating inputs are promoted to one dtype; others (buffers, say) have to agree already.
        dtypes = [loaded.dtype for _, loaded in present]
        if len(set(dtypes)) > 1 and not all(dtype.is_floating_point for dtype in dtypes):
            problems.append((name, f"{name}: numbers and whole numbers mixed: {dtypes}"))
            return
        merged = reduce(torch.promote_types, dtypes)
        how = self._how(task, ordered, outcome)
        of_mergekit = how in ("blocks", "task")
        ours = how in NATIVE or how in SPHERICAL
        if how not in ("copy", *NATIVE) and merged.is_floating_point:
            merged = self._returned_dtype(task, present, shape, merged)
        rows = shape if how != "task" else None
        regular = task.method_name == "varm" and how != "copy" and not alone
        output = Output(
            name=name,
            how=how,
            sources=tuple(
                self._source(model, loaded, rows)
                for model, loaded in (ordered if ours else present)
            ),
            parameters=self._parameters(task, ordered) if ours else {},
            unit=shared_unit(name, task.parameters) if regular else None,
            merged_dtype=merged,
            dtype=dtype_from_name(weight.force_dtype or self.config.out_dtype) or merged,
            shape=shape,
        )
        self.tensors[name] = output
        matrices = self._matrices(output)
        self.outputs |= {each.name: each for each in matrices}
        if of_mergekit:
            self.tasks[name] = task
        if task.method_name == "varm" and how != "copy":
            targets = [model for model, _ in ordered if model != base]
            if not any(task.input_parameters[m]["weight"] for m in targets):
                self.weightless.append(name)
        if regular and self._keep:
            self.regular[name] = task
            if len(present) == len(task.model_order) and merged.is_floating_point:
                self.complete.update(each.name for each in matrices)

    def _matrices(self, output: Output) -> list[Output]:
        """An output; of a stack of experts each matrix as an output of its own."""
        if output.how not in NATIVE or not is_stack(output.name, output.shape):
            return [output]
        base = output.sources[0]
        down = self.planned.models[base.model].tensors.get(down_of(base.tensor) or "")
        halves = down is not None and has_halves(output.shape, down.shape)
        return [
            replace(
                output,
                name=output.name + matrix.label,
                sources=tuple(s.part(matrix.first, matrix.numel) for s in output.sources),
                shape=matrix.shape,
                stack=(output.name, output.shape),
            )
            for matrix in matrices(output.shape, halves)
        ]

    def copy(self, name: str, model: ModelReference, tensor: str) -> None:
        """The base's tensor under another name: converted like any other if it is floating."""
        checkpoint = self.planned.models[str(model)]
        at = checkpoint.tensors[tensor]
        dtype = DTYPES[at.dtype]
        loaded = written = dtype
        if dtype.is_floating_point:
            loaded = dtype_from_name(self.config.dtype) or dtype
            written = dtype_from_name(self.config.out_dtype) or loaded
        source = Source(str(model), tensor, at, at.numel, loaded, checkpoint.updates.get(tensor))
        self.used[str(model)].add(tensor)
        output = Output(name, "copy", (source,), {}, None, loaded, written, at.shape)
        self.outputs[name] = self.tensors[name] = output

    def _input(self, model: ModelReference, weight: WeightInfo, dtype: str | None) -> _Input | None:
        tensors = self.planned.models[str(model)].tensors
        loaded = dtype_from_name(weight.force_dtype or dtype)
        for name in _names_of(weight):
            if name in tensors:
                at = tensors[name]
                return _Input(name, at.shape, loaded or DTYPES[at.dtype])
        return None

    def _outcome(
        self, weight: WeightInfo, task: ExecuteMergeMethodTask, present: list[ModelReference]
    ) -> str | None:
        """`merge` or `copy` (of the only input), None for no output, as in mergekit's task."""
        method = registry.get(task.method_name)
        if weight.optional and len(present) < len(task.model_order):
            spec, only_base = method.spec, present == [task.base_model]
            skipped = (
                spec.optional_tensor_policy == OptionalTensorPolicy.BASE_OR_SKIP
                and len(present) < spec.contract.min_inputs
            )
            copied = {
                OptionalTensorPolicy.PASSTHROUGH_SINGLETON: len(present) == 1,
                OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON: only_base,
                OptionalTensorPolicy.BASE_OR_SKIP: skipped and only_base,
            }
            if copied.get(spec.optional_tensor_policy):
                return "copy"
            if skipped:
                reason = "too few models have it for this method"
                for model in map(str, task.model_order):
                    if weight.name in self.planned.models[model].tensors:
                        self.planned.left_out.append(LeftOut(model, weight.name, reason))
                return None
        try:
            method.validate_inputs(present, task.base_model, group_name=weight.name)
        except ValueError as error:
            self.problems.append((weight.name, f"{weight.name}: {one_line(error)}"))
            return None
        return "merge"

    def _shape(
        self,
        weight: WeightInfo,
        task: ExecuteMergeMethodTask,
        present: list[tuple[ModelReference, _Input]],
    ) -> tuple[int, ...] | None:
        shapes = [loaded.shape for _, loaded in present]
        axis = weight.vocabulary_axis
        gather = task.gather_tensors
        if isinstance(gather, (PermutedVocabulary, TruncatedVocabulary)) and axis is not None:
            others = {shape[:axis] + shape[axis + 1 :] for shape in shapes if len(shape) > axis}
            if len(others) == 1 and all(len(shape) > axis for shape in shapes):
                if isinstance(gather, TruncatedVocabulary):
                    rows = min(shape[axis] for shape in shapes)
                else:
                    rows = len(self.planned.tokenizer.tokenizer.get_vocab())
                    if multiple := gather.pad_to_multiple_of:
                        rows += -rows % multiple
                    sizes = [(model, loaded.shape[axis]) for model, loaded in present]
                    if misfits := list(self._misfits(rows, sizes)):
                        self.problems += [(weight.name, misfit) for misfit in misfits]
                        return None
                return (*shapes[0][:axis], rows, *shapes[0][axis + 1 :])
        elif len(set(shapes)) == 1:
            return shapes[0]
        listed = ", ".join(f"{list(loaded.shape)} in {model}" for model, loaded in present)
        remedy = ""
        if axis is not None:
            remedy = "; bring the vocabularies together: tokenizer: {source: base} in the YAML"
        problem = f"{weight.name}: shapes don't fit: {listed}{remedy}"
        self.problems.append((weight.name, problem))
        return None

    def _misfits(self, rows: int, sizes: list[tuple[ModelReference, int]]) -> Iterator[str]:
        """Token ids of a tokenizer merge that no row of the embeddings is for."""
        ids = self.planned.tokenizer.tokenizer.get_vocab().values()
        if max(ids, default=-1) >= rows:
            yield (
                f"the merged tokenizer has {len(ids)} tokens and ids up to {max(ids)}: mergekit"
                " needs ids without gaps, each of one token"
            )
        for model, size in sizes:
            rows_of = self.planned.tokenizer.permutations[model]
            if len(rows_of) < len(set(ids)) or max(rows_of.values(), default=-1) >= size:
                yield f"{model}: its tokenizer has ids beyond its {size} embeddings"

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
        if not contiguous:
            return "task"
        unchanged = task.method_name in NATIVE or (
            task.method_name == "passthrough"
            and task.input_parameters[present[0][0]]["scale"] is None
        )
        if outcome == "copy" or (len(present) == 1 and unchanged):
            return "copy"
        floating = all(loaded.dtype.is_floating_point for _, loaded in present)
        if not floating:
            return "task"
        parameters = dict(task.parameters.items())
        whole = not parameters.get("filter_wise") and parameters.get("nuslerp_flatten", True)
        if task.method_name in NATIVE or (task.method_name in SPHERICAL and whole):
            return task.method_name
        return "blocks" if task.method_name in ELEMENTWISE else "task"

    def _returned_dtype(
        self,
        task: ExecuteMergeMethodTask,
        present: list[tuple[ModelReference, _Input]],
        shape: tuple[int, ...],
        promoted: torch.dtype,
    ) -> torch.dtype:
        """What the method returns, by merging a few numbers: some return float32."""
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

    def _source(
        self, model: ModelReference, loaded: _Input, shape: tuple[int, ...] | None
    ) -> Source:
        checkpoint, name = self.planned.models[str(model)], loaded.tensor
        at = checkpoint.tensors[name]
        numel = at.numel if shape is None else math.prod(shape)
        return Source(str(model), name, at, numel, loaded.dtype, checkpoint.updates.get(name))

    def _parameters(
        self, task: ExecuteMergeMethodTask, ordered: list[tuple[ModelReference, _Input]]
    ) -> dict[str, Any]:
        parameters = dict(sorted(task.parameters.items()))
        targets = [model for model, _ in ordered if model != task.base_model]
        if task.method_name in SPHERICAL:
            parameters["based"] = len(targets) < len(ordered)
        for spec in registry.get(task.method_name).spec.input_parameters:
            parameters[spec.name] = [task.input_parameters[model][spec.name] for model in targets]
        return parameters


def plan_unknown(planned: Plan, planner: LayerPlanner, maker: OutputMaker) -> None:
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
        rests_of_all = [rest for m, prefix in models for rest in unknown[str(m)].get(prefix, ())]
        for rest in dict.fromkeys(rests_of_all):
            name = layer.prefix + rest
            if name in maker.tensors:
                continue
            present = {
                model: planned.models[str(model)].tensors[prefix + rest]
                for model, prefix in models
                if prefix + rest in planned.models[str(model)].tensors
            }
            if base not in present:
                continue  # accounted for at the end
            alike = len({at.shape for at in present.values()}) == 1
            floating = all(DTYPES[at.dtype].is_floating_point for at in present.values())
            if len(present) == len(models) and alike and floating:
                inputs = [prefix + rest for prefix in layer.prefixes]
                maker.add(*planner.plan_by_name(name, inputs, layer), alone=True)
                planned.by_name.append(name)
            else:
                maker.copy(name, base, dict(models)[base] + rest)
                planned.copied.append(name)
