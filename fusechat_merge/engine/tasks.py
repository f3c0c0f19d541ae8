"""mergekit's own tasks: block by block where a method is elementwise, else one output at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from mergekit.graph import Task
from mergekit.tokenizer import BuildTokenizer
from torch import Tensor

from fusechat_common.errors import FusechatError
from fusechat_merge.mergekit_bridge.loader import loading
from fusechat_merge.mergekit_bridge.units import UnitStatistics
from fusechat_merge.methods.blocks import BLOCK, STRIP, Block
from fusechat_merge.planning.configuration import referenced_models
from fusechat_merge.planning.plan import Output, Plan


def run_tasks(
    planned: Plan, outputs: Sequence[Output], device: torch.device
) -> Iterator[tuple[Output, Tensor]]:
    """Compute outputs by mergekit's tasks; the next one's inputs are read meanwhile.

    Random numbers depend on the plan's `random_seed` and the tensor's name only.

    Yields:
        Each output with its tensor: contiguous, on the CPU, of the output's shape and dtype.

    Raises:
        FusechatError: mergekit refuses the tensors, such as integer buffers that differ.
    """
    models = {r: planned.models[str(r)] for r in referenced_models(planned.config)}
    shared: dict[int, Any] = {}
    with (
        loading(models, planned.options.of_mergekit()) as loaders,
        ThreadPoolExecutor(1, "read ahead") as reader,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        by_name = {str(reference): loader for reference, loader in loaders.items()}

        def read(output: Output) -> None:
            for model, tensor in dict.fromkeys((s.model, s.tensor) for s in output.sources):
                by_name[model].read_ahead([tensor])

        reading = [reader.submit(read, output) for output in outputs[:1]]
        for number, output in enumerate(outputs, 1):
            reading.pop().result()
            reading += [reader.submit(read, output) for output in outputs[number : number + 1]]
            torch.manual_seed(_seed(planned.options.random_seed, output.name))
            try:
                value = _value(planned.tasks[output.name], planned, shared, device)
            except (ValueError, RuntimeError, TypeError, AssertionError) as error:
                raise FusechatError(f"{output.name}: {error}") from error
            yield output, _as_planned(value, output)


def by_blocks(planned: Plan, output: Output) -> Callable[[Block, Tensor], None]:
    """What merges a segment of an output by mergekit's own method, an elementwise one."""
    task = planned.tasks[output.name]
    references = {str(model): model for model in task.model_order}
    models = [references[source.model] for source in output.sources]

    def merge(block: Block, out: Tensor) -> None:
        for first in range(0, out.numel(), STRIP * BLOCK):  # what fits into the processor's cache
            part = slice(first, first + STRIP * BLOCK)
            tensors = (tensor[part] for tensor in (block.base, *block.targets))
            out[part] = task.execute(tensors=dict(zip(models, tensors, strict=True)))

    return merge


def _value(task: Task, planned: Plan, shared: dict[int, Any], device: torch.device) -> Any:
    """A task's result. Units' statistics are computed once and kept in `shared`, by task."""
    if isinstance(task, BuildTokenizer):
        return planned.tokenizer
    if id(task) in shared:
        return shared[id(task)]
    arguments = {
        key: _value(other, planned, shared, device) for key, other in task.arguments().items()
    }
    if task.uses_accelerator():
        arguments = _moved(arguments, device)
    value = task.execute(**arguments)
    if isinstance(task, UnitStatistics):
        shared[id(task)] = value
    return value


def _moved(value: Any, device: torch.device) -> Any:
    """The same value with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _as_planned(value: Tensor | None, output: Output) -> Tensor:
    """A method's result as it will be written, checked against the plan."""
    if value is None or tuple(value.shape) != output.shape or value.dtype != output.merged_dtype:
        got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
        raise FusechatError(
            f"{output.name}: the method returned {got}, not {output.merged_dtype}"
            f" {list(output.shape)}: please report this configuration"
        )
    return value.to(device="cpu", dtype=output.dtype).contiguous()


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
