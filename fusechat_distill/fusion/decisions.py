"""The decisions of fusing as data: the sums of a target's shards, and `decisions.json`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from fusechat_common.errors import FusechatError, one_line
from fusechat_common.files import write_json
from fusechat_distill.storage.stage import Details, Summary

NAME = "decisions.json"


class Counts(Summary):
    """The size of a target's dataset."""

    samples: int = 0
    """Conversations with an answer that the pivot can be given."""
    held_out: int = 0
    """Samples that are kept from training."""
    tokens: int = 0
    """The pivot's, of whole conversations."""
    positions: int = 0
    """Tokens that are part of an answer."""
    positions_compared: int | None = None
    """Those of the samples that more than one model scored."""
    positions_with_target: int | None = None
    """Those that have a distribution to learn from."""
    samples_compared: int | None = None
    """Samples that more than one model scored."""

    @property
    def tokens_processed(self) -> int:
        return self.tokens


class FuseSummary(Counts):
    """Counts, and the sums of each model's shares, the pivot's first."""

    positions_won: list[float] | None = None
    samples_won: list[float] | None = None
    """None where segments and not whole samples are decided on."""

    def __add__(self, other: Self) -> Self:
        sums = super().__add__(other)
        won = {}
        for name in ("positions_won", "samples_won"):
            shares = getattr(self, name) or [], getattr(other, name) or []
            # Model by model, and not one list after the other.
            won[name] = [a + b for a, b in zip_longest(*shares, fillvalue=0.0)] or None
        return sums.model_copy(update=won)


class Share(Details):
    """What one model won, from 0 to 1; AvgCE gives a model its weight."""

    positions: float | None = None
    """Of `positions_compared`."""
    samples: float | None = None
    """Of `samples_compared`; only with `fusion.level: sequence`."""


class Decisions(Counts):
    """What a target learns from, and which model won how often; without keys that have no value."""

    format: Literal[1] = 1
    """Version of these keys; another number, other keys."""
    won: dict[str, Share] = Field(default_factory=dict)
    """By model, the pivot first; empty for the baseline, where nothing is compared."""

    @classmethod
    def of(cls, models: Sequence[str], summary: FuseSummary) -> Decisions:
        """From the sum of all shards; `models` in the order of its shares."""

        def share(won: list[float] | None, compared: int | None, model: int) -> float | None:
            if won is None:
                return None
            return won[model] / compared if compared else 0.0

        won = {
            model: Share(
                positions=share(summary.positions_won, summary.positions_compared, i),
                samples=share(summary.samples_won, summary.samples_compared, i),
            )
            for i, model in enumerate(models)
        }
        return cls(**summary.model_dump(include=set(Counts.model_fields)), won=won)

    @classmethod
    def read(cls, folder: Path) -> Decisions:
        """Of a target's folder.

        Raises:
            FileNotFoundError: there are none.
            FusechatError: they can't be read.
        """
        path = folder / NAME
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise FusechatError(
                f"{path}: can't be read ({one_line(error)}); delete it, and `fusechat-distill "
                "train RECIPE` writes it again"
            ) from error

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, self.model_dump(exclude_none=True))
