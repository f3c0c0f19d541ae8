"""Checks a merged model: all files and tensors of the plan exist, recomputed ones are equal."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from fusechat_common.errors import RequestError
from fusechat_merge.engine.execute import MEMORY, local_plan
from fusechat_merge.engine.journal import Sink
from fusechat_merge.engine.merger import Merger, Progress, make_tasks
from fusechat_merge.engine.opening import opening_problems
from fusechat_merge.engine.passes import SourceFiles, divide
from fusechat_merge.inputs.checkpoint import Checkpoint, CheckpointError, Folder, read_checkpoint
from fusechat_merge.mergekit_bridge.loader import DTYPES
from fusechat_merge.planning.plan import Output, Plan
from fusechat_merge.planning.side_files import merged_config, side_files
from fusechat_merge.results.record import read_record

_PIECE = 4 << 20


def verify(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    sample: float = 1.0,
    memory: int = MEMORY,
    threads: int | None = None,
    progress: Progress = lambda tensor, nbytes: None,
    **options: Any,
) -> list[str]:
    """Check a merged model against its sources.

    Args:
        config: the configuration that it was merged by.
        out: the merged model.
        sample: share of the tensors that are recomputed, always the same ones; 1: all.
        memory, threads, progress, options: as for `merge`.

    Returns:
        All differences; none if the model is what the configuration makes.

    Raises:
        RequestError: the configuration or its models can't be used.
    """
    planned = local_plan(config, **options)
    out = Path(out)
    record = read_record(out)
    device = record.device if record else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        planned.problems.append(
            f"{out}: was computed on a CUDA device, which rounds differently; there is none here"
        )
    if planned.problems:
        raise RequestError(planned.problems)
    try:
        made = read_checkpoint(Folder(out), str(out))
    except CheckpointError as error:
        return list(error.problems)
    except OSError as error:
        raise RequestError([f"{out}: can't be read ({error})"]) from error
    misfits = _misfits(planned, made)
    names = {output.tensor for output in planned.outputs}
    problems = list(misfits.values())
    problems += [f"{name}: doesn't belong here" for name in made.tensors if name not in names]
    problems += [f"{name}: lies in {file}, unlisted" for name, file in made.unlisted.items()]
    beside = _side_file_problems(planned, out)
    problems += beside or opening_problems(planned, out)[1]
    chosen = [output for output in planned.outputs if output.tensor not in misfits]
    if sample < 1:
        count = max(1, round(sample * len(chosen))) if chosen else 0
        chosen = random.Random(0).sample(chosen, count)
    native = [output for output in planned.outputs if output.how != "task"]
    ring = divide(native, memory, threads, device)
    with closing(_Comparison(made, out)) as comparison, closing(SourceFiles(planned)) as sources:
        merger = Merger(planned, sources, comparison, ring, progress)
        merger.run([output for output in chosen if output.how != "task"])
        tasks = [output for output in chosen if output.how == "task"]
        make_tasks(planned, tasks, comparison, progress, ring.device)
    return problems + [
        f"{name}: differs from what its sources give, first in element {element}"
        for name, element in sorted(comparison.differing.items())
    ]


def _misfits(planned: Plan, made: Checkpoint) -> dict[str, str]:
    """By name, the outputs that are missing or have another dtype or shape, each with a message."""
    misfits = {}
    for output in planned.outputs:
        name, at = output.tensor, made.tensors.get(output.tensor)
        if at is None:
            misfits[name] = f"{name}: is missing"
        elif at.shape != output.tensor_shape or DTYPES.get(at.dtype) != output.dtype:
            stored, planned_as = f"{at.dtype} {list(at.shape)}", list(output.tensor_shape)
            misfits[name] = f"{name}: is {stored}, not {output.dtype} {planned_as}"
    return misfits


def _side_file_problems(planned: Plan, out: Path) -> list[str]:
    donor = planned.models[planned.donor].folder
    assert donor is not None
    problems = []
    try:
        original = (donor / "config.json").read_text(encoding="utf-8")
        expected = json.loads(merged_config(original, planned))
        if json.loads((out / "config.json").read_text(encoding="utf-8")) != expected:
            problems.append("config.json: differs from the base's as the merge changes it")
    except (OSError, ValueError) as error:
        problems.append(f"config.json: can't be read ({error})")
    for name in side_files(planned, donor):
        if not (out / name).is_file():
            problems.append(f"{name}: is missing")
        elif (out / name).read_bytes() != (donor / name).read_bytes():
            problems.append(f"{name}: differs from the base's")
    return problems


class _Comparison(Sink):
    """A sink that compares what it is given with the bytes of a finished model.

    Attributes:
        differing: of each output that differs, the first element that does.
    """

    def __init__(self, made: Checkpoint, folder: Path) -> None:
        super().__init__()
        self.differing: dict[str, int] = {}
        self._made = made
        self._lock = threading.Lock()
        self._descriptors = {file: os.open(folder / file, os.O_RDONLY) for file in made.files}

    def write(self, output: Output, first: int, data: memoryview) -> None:
        (at,) = self._made.tensors[output.tensor].locations()
        offset = at.offset + output.first * output.dtype.itemsize + first
        for start in range(0, data.nbytes, _PIECE):
            piece = data[start : start + _PIECE]
            stored = os.pread(self._descriptors[at.file], piece.nbytes, offset + start)
            if stored != piece:
                pairs = enumerate(zip(stored, piece, strict=False))
                byte = next((i for i, (a, b) in pairs if a != b), len(stored))
                element = (first + start + byte) // output.dtype.itemsize
                with self._lock:  # segments of a tensor arrive in any order
                    before = self.differing.get(output.name, element)
                    self.differing[output.name] = min(before, element)
                return

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
