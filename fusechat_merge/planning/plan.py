"""A merge as data: what is written where and from which tensors. The engine decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions

from fusechat_merge.inputs.checkpoint import Checkpoint
from fusechat_merge.inputs.stored import Stored, part_of
from fusechat_merge.inputs.update import Update
from fusechat_merge.mergekit_bridge.loader import DTYPES
from fusechat_merge.mergekit_bridge.parameters import SPECS
from fusechat_merge.methods.spherical import COEFFICIENTS
from fusechat_merge.methods.units import Unit

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NATIVE = tuple(SPECS)
"""Our methods."""
ELEMENTWISE = ("linear", "nearswap", "passthrough", "task_arithmetic")
"""mergekit's methods whose every element depends on the inputs' same element only."""


SPHERICAL = tuple(COEFFICIENTS)
"""mergekit's methods that sum the inputs by coefficients from their norms and dot products."""


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


@dataclass(frozen=True, slots=True)
class Source:
    """One model's tensor as an input.

    Attributes:
        model: as the configuration names it.
        tensor: its name there.
        location: where its values are.
        numel: how many of its elements count, from the first (all but those of rows cut off).
        dtype: to which it is converted before anything else (the YAML's `dtype`), or its own.
        update: what an adapter changes of the tensor.
        first: the element of the tensor with which the source begins, where it is a part of it.
    """

    model: str
    tensor: str
    location: Stored
    numel: int
    dtype: torch.dtype
    update: Update | None = None
    first: int = 0

    @property
    def used(self) -> Stored:
        """The elements that count, all or some of the tensor's."""
        if self.numel == self.location.numel:
            return self.location
        return part_of(self.location, self.first, (self.numel,))

    def part(self, first: int, numel: int) -> Source:
        """A matrix of a stack, as a source."""
        return replace(self, numel=numel, first=first)


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor that will be written, or one matrix of it.

    Attributes:
        name: of the tensor; of a matrix in a stack the stack's, followed by the matrix's label.
        how: `varm`, `fusechat_sce`, one of `SPHERICAL`, `copy` (of the one source); or mergekit's
            own code: `blocks`, where its method is elementwise, else `task`, the whole at once.
        sources: the inputs, the base first where the method is one of ours.
        parameters: of methods computed here, resolved for this tensor; `weight` is a list, one a
            target. Those of `SPHERICAL` have `based`: whether the first source is the base.
        unit: of several tensors, a key of the plan's units; None where it is a unit by itself.
        merged_dtype: what the method returns, the promoted dtype of its inputs.
        dtype, shape: as written.
        file, offset, nbytes: its place; `offset` counts from the start of the file.
        stack: name and shape of the tensor that it is a matrix of; None where it is a tensor.
    """

    name: str
    how: str
    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]
    unit: Unit | None
    merged_dtype: torch.dtype
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    stack: tuple[str, tuple[int, ...]] | None = None

    @property
    def tensor(self) -> str:
        """Name of the tensor that it is, or is a matrix of."""
        return self.stack[0] if self.stack else self.name

    @property
    def first(self) -> int:
        """Number of its first element in that tensor."""
        return self.sources[0].first if self.stack else 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return self.stack[1] if self.stack else self.shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its first bytes (length and header) and its size."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True)
class LeftOut:
    """An input tensor that no output uses, and why."""

    model: str
    tensor: str
    reason: str


@dataclass
class Plan:
    """Everything about a merge that can be known before a weight is read.

    Attributes:
        config, source, options: the configuration, its text, and what else decides the bytes.
        models: every model's checkpoint, by the name that the configuration gives it.
        donor: the model whose configuration and side files the output gets.
        outputs: in the order in which they are computed, that of the donor's files.
        shards: the output files.
        units: of several tensors: names of the outputs whose deltas count.
        by_name: outputs that the architecture's table doesn't know, merged by name.
        copied: outputs that it doesn't know and that not every model has; copied from the base.
        left_out: input tensors that are not used.
        problems: what stands in the way; with any, `outputs` may be incomplete.
        tasks: mergekit's tasks of the outputs whose `how` is `blocks` or `task`.
        out_config, architecture: mergekit's configuration of the merged model, its tensors' table.
        layer_keys: config.json's keys that describe layers, where slices change them; keys of
            nested configurations with dots.
        tokenizer, chat_template: mergekit's merged tokenizer with its permutations, and the
            template, where the configuration asks for them.
    """

    config: MergeConfiguration
    source: str
    options: Options
    models: dict[str, Checkpoint] = field(default_factory=dict)
    donor: str = ""
    outputs: list[Output] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    units: dict[Unit, tuple[str, ...]] = field(default_factory=dict)
    by_name: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tasks: dict[str, ExecuteMergeMethodTask] = field(default_factory=dict)
    out_config: Any = None
    architecture: Any = None
    layer_keys: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    chat_template: str | None = None

    @property
    def parameters(self) -> int:
        """Elements of all outputs."""
        return sum(output.numel for output in self.outputs)

    @property
    def input_bytes(self) -> int:
        """Bytes of all tensors that are read, each counted once."""
        read = {
            (source.model, source.tensor, source.first): source.used.nbytes
            for output in self.outputs
            for source in output.sources
        }
        return sum(read.values())

    @property
    def output_bytes(self) -> int:
        """Size of all output files."""
        return sum(shard.size for shard in self.shards)

    def notes(self) -> list[str]:
        """What people should know before the merge: what is copied, and what is left out."""
        notes = []
        if self.copied:
            notes.append(f"the base's alone, copied: {_some(self.copied)}")
        left: dict[str, list[str]] = {}
        for each in self.left_out:
            left.setdefault(each.model, []).append(each.tensor)
        notes += [f"left out of {model}: {_some(tensors)}" for model, tensors in left.items()]
        return notes

    def summary(self) -> dict[str, Any]:
        """The plan in figures and lists, for people and programs."""
        return {
            "merge_method": self.config.merge_method,
            "models": list(self.models),
            "parameters": self.parameters,
            "tensors": len({output.tensor for output in self.outputs}),
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "shards": [{"name": shard.name, "bytes": shard.size} for shard in self.shards],
            "merged_by_name": self.by_name,
            "copied_from_base": self.copied,
            "left_out": [asdict(left) for left in self.left_out],
            "problems": self.problems,
        }


def _some(tensors: Sequence[str]) -> str:
    """How many tensors, and the first of them."""
    if len(tensors) == 1:
        return f"1 tensor ({tensors[0]})"
    return f"{len(tensors)} tensors ({tensors[0]}, …)"
