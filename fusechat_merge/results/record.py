"""The JSON files of a merge and an analysis: `fusechat_merge.json` and `analysis.json`.

The tables in docs/merging.md are generated from the docstrings here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fusechat_common.record import Record

RECORD = "fusechat_merge.json"


class UnitWeights(Record):
    """One set of merge weights and what it was computed from."""

    name: str
    """The unit: a tensor's name, what the names of its tensors begin with, or `model`."""
    granularity: str
    """What the unit is, as in `varm`'s parameter; `matrix` for `fusechat_sce`."""
    tensors: tuple[str, ...]
    """The output tensors merged by these weights."""
    numel: int
    """Elements that the statistics cover."""
    statistics: tuple[float, ...]
    """Mean over those elements of δ² (or |δ|), a target each; empty where none was needed."""
    weights: tuple[float, ...]
    """A target each; they sum to 1, or are all 0 where no target moved."""


class UnusedTensor(Record):
    """An input tensor that no output is made from."""

    model: str
    """As in `models`."""
    tensor: str
    """Its name in that model."""
    reason: str
    """Why it is not used."""


class MergeRecord(Record):
    """How the merged model was made."""

    format: Literal[1] = 1
    """Version of this format."""
    fusechat: str
    """Version of fusechat that made it."""
    merge_method: str
    """As in the configuration."""
    base_model: str | None
    """The pivot, where the method has one."""
    models: tuple[str, ...]
    """All models, the pivot first: the hub's id, or the folder's name for a local model."""
    granularity: str | tuple[str, ...] | None
    """That of all units, or each of them where filters set several; none without units."""
    units: tuple[UnitWeights, ...]
    """In the order of the output's tensors; none for methods that are mergekit's own."""
    merged_by_name: tuple[str, ...]
    """Output tensors that mergekit's table of the architecture doesn't have."""
    copied_from_base: tuple[str, ...]
    """Output tensors that neither the table nor every model has: the pivot's."""
    left_out: tuple[UnusedTensor, ...]
    """Input tensors that are not used."""
    dequantised: tuple[str, ...]
    """Models whose weights were dequantised when read, and how their files hold them."""
    identity: str
    """SHA-256 of the configuration, options and inputs, by which a finished merge is recognised."""
    device: Literal["cpu", "cuda"]
    """Where it was computed."""


class Analysis(Record):
    """The weights of a merge that was not carried out."""

    format: Literal[1] = 1
    """Version of this format."""
    method: str
    """`varm` or `fusechat_sce`."""
    base: str
    """The pivot, as the configuration names it."""
    targets: tuple[str, ...]
    """The targets, in the order of the statistics and weights."""
    units: tuple[UnitWeights, ...]
    """In the order of the output's tensors."""

    def by_tensor(self) -> dict[str, UnitWeights]:
        """The unit of every output tensor."""
        return {tensor: unit for unit in self.units for tensor in unit.tensors}


def read_record(folder: Path) -> MergeRecord | None:
    """The record of a merged model; None if there is none of this format."""
    try:
        return MergeRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None
