"""mergekit's view of a checkpoint, served from headers that were read and checked before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex, ShardInfo
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch import Tensor

from fusechat_common.system import read_into
from fusechat_merge.inputs.checkpoint import Checkpoint
from fusechat_merge.inputs.factors import Factors
from fusechat_merge.inputs.stored import ReadAt, Stored

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""torch's dtype by safetensors' name; what is missing here is a quantised format."""


class CheckpointLoader:
    """Stands in for mergekit's `LazyTensorLoader`: maps no file, keeps no shard open.

    Args:
        checkpoint: with its folder, unless only the index is asked for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._ahead: dict[str, Tensor] = {}
        files = {name: next(at.locations()).file for name, at in checkpoint.tensors.items()}
        by_file: dict[str, list[str]] = defaultdict(list)
        for name, file in files.items():
            by_file[file].append(name)
        self.index = ShardedTensorIndex(
            base_path=str(checkpoint.folder),
            is_safetensors=True,
            tensor_paths=files,
            shards=[ShardInfo(file, names) for file, names in by_file.items()],
        )

    def get_tensor(self, key: str, device: str = "cpu") -> Tensor:
        """The tensor, read anew unless `read_ahead` has it."""
        tensor = self._ahead.pop(key, None)
        return (self._read(key) if tensor is None else tensor).to(device)

    def read_ahead(self, names: Sequence[str]) -> None:
        """Read these now and keep each until it is asked for once."""
        for name in names:
            self._ahead[name] = self._read(name)

    def _read(self, name: str) -> Tensor:
        at = self._checkpoint.tensors[name]
        tensor = self._stored(at)
        update = self._checkpoint.updates.get(name)
        if update is None:
            return tensor
        changed = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        Factors(update, self._stored, at).apply(changed.view(-1), 0)
        return changed.to(tensor.dtype)

    def _stored(self, at: Stored) -> Tensor:
        return whole(at, self._read_at)

    def _read_at(self, file: str, offset: int, into: memoryview) -> None:
        assert self._checkpoint.folder is not None, "weights are read from folders only"
        with open(self._checkpoint.folder / file, "rb", buffering=0) as opened:
            if not fill(opened.fileno(), offset, into):
                raise OSError(f"{file} of {self._checkpoint.name} has become shorter")


def whole(at: Stored, read_at: ReadAt) -> Tensor:
    """The whole tensor, in memory."""
    dtype = DTYPES[at.dtype]
    raw = torch.empty(at.numel * dtype.itemsize, dtype=torch.uint8)
    at.read(read_at, 0, raw.numpy().data)
    return raw.view(dtype).reshape(at.shape)


def fill(descriptor: int, offset: int, into: memoryview) -> bool:
    """Fill a buffer with an open file's bytes from `offset` on; False if the file ends before."""
    while into.nbytes:
        count = read_into(descriptor, into, offset)
        if not count:
            return False
        into, offset = into[count:], offset + count
    return True


@contextmanager
def loading(
    models: Mapping[ModelReference, Checkpoint], options: MergeOptions
) -> Iterator[dict[ModelReference, CheckpointLoader]]:
    """Let mergekit find and load these models' tensors through `CheckpointLoader`."""
    before = LoaderCache.loaders
    loaders = {reference: CheckpointLoader(checkpoint) for reference, checkpoint in models.items()}
    LoaderCache.loaders = loaders
    LoaderCache().setup(options)
    try:
        yield loaders
    finally:
        LoaderCache.loaders = before
