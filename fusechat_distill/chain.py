"""The whole chain of a recipe: score, align, fuse, train, merge.yml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import RequestError
from fusechat_common.files import write_text
from fusechat_distill.alignment.stage import AlignStage, align_stages
from fusechat_distill.fusion.fuse import target_models
from fusechat_distill.fusion.stage import FuseStage
from fusechat_distill.inputs.merge_yaml import edited, merge_yaml
from fusechat_distill.recipe.schema import Recipe
from fusechat_distill.scoring.stage import ScoreStage, score_stages
from fusechat_distill.storage.shards import Shards
from fusechat_distill.storage.stage import Details, Progress, ShardedStage, Stage, StageStatus
from fusechat_distill.training.stage import train_stages, train_status

if TYPE_CHECKING:
    from fusechat_distill.inputs.open import Inputs
    from fusechat_distill.storage.processes import Processes


class MergeStage:
    """Writes `merge.yml` once all of the recipe's targets are trained."""

    stage, name = "merge", "merge.yml"

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = recipe.output_folder / self.name

    def problems(self) -> list[str]:
        text = self.path.read_text("utf-8") if self.path.exists() else self._text()
        if text == self._text() or not edited(text):
            return []
        problem = "was changed by hand and would be overwritten"
        return [f"{self.path}: {problem}; move it away, or set another `output`"]

    def status(self) -> StageStatus[Details]:
        done = self.path.exists() and self.path.read_text("utf-8") == self._text()
        targets = target_names(self.recipe)
        # A file that differs from what the recipe asks for doesn't count as done.
        return StageStatus(
            stage=self.stage,
            name=self.name,
            done=len(targets) if done else 0,
            total=len(targets) if done else None,
            details=Details(),
            bytes=self.path.stat().st_size if done else 0,
            unit="targets",
        )

    def run(self, processes: Processes, progress: Progress) -> StageStatus[Details]:
        return processes.first(self._write)

    def _write(self) -> StageStatus[Details]:
        folders = [self.recipe.targets_folder / name for name in target_names(self.recipe)]
        if all((folder / "manifest.json").exists() for folder in folders):
            if problem := next(iter(self.problems()), None):
                raise RequestError(problem, self.path)
            if not self.status().complete:
                write_text(self.path, self._text())
        return self.status()

    def _text(self) -> str:
        return merge_yaml(self.recipe, target_names(self.recipe))


def target_names(recipe: Recipe) -> list[str]:
    return list(target_models(recipe.fusion.strategy, [s.title for s in recipe.sources]))


def run_stages(inputs: Inputs, *, trust_remote_code: bool = False) -> list[Stage]:
    """Every stage of the recipe, in order; the baseline without sources needs no scores."""
    before: list[Stage] = []
    if inputs.recipe.fusion.strategy != "sft":
        before = [*score_stages(inputs, trust_remote_code=trust_remote_code), *align_stages(inputs)]
    return [*before, *target_stages(inputs, trust_remote_code=trust_remote_code)]


def target_stages(
    inputs: Inputs, names: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> list[Stage]:
    """The stages after the alignment, for all targets or those of the named sources."""
    trained = train_stages(inputs, names, trust_remote_code=trust_remote_code)
    merged = [MergeStage(inputs.recipe)] if inputs.recipe.fusion.strategy == "pairwise" else []
    return [*(stage.fused for stage in trained), *trained, *merged]


def run_status(recipe: Recipe) -> list[StageStatus[Any]]:
    """How far every stage is, read from its folder; opens no model and no dataset."""
    sources = [source.title for source in recipe.sources]
    targets = target_names(recipe)
    folders: list[tuple[type[ShardedStage[Any, Any]], str, Path]] = [
        *((ScoreStage, name, recipe.scores_folder / name) for name in recipe.models),
        *((AlignStage, name, recipe.aligned_folder / name) for name in sources),
    ]
    if recipe.fusion.strategy == "sft":  # needs neither
        folders = [entry for entry in folders if entry[2].exists()]
    folders += [(FuseStage, name, recipe.fused_folder / name) for name in targets]
    states: list[StageStatus[Any]] = [
        kind.status_of(name, Shards.open(folder))
        if (folder / "manifest.json").exists()
        else StageStatus(stage=kind.stage, name=name, done=0, total=None, details=kind.summary())
        for kind, name, folder in folders
    ]
    states += [
        train_status(name, recipe.targets_folder / name, recipe.training_folder / name)
        for name in targets
    ]
    merged = [MergeStage(recipe).status()] if recipe.fusion.strategy == "pairwise" else []
    return [*states, *merged]


def run_problems(inputs: Inputs) -> list[str]:
    """Results of earlier runs that the recipe's stages can't continue from."""
    return [problem for stage in run_stages(inputs) for problem in stage.problems()]
