"""The ladder's steps, each in a folder of its own: text, models, targets, merges, measurements."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from variants import DEFAULT, LINEAR, TOP_K, Merge, Scale, Variant

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))

PIVOT = "pivot"
STAGES = ("scores", "aligned", "fused")


class Ladder:
    """The folders of one run, and the steps that make them.

    A finished part is left unchanged; an interrupted step is resumed.
    """

    def __init__(self, out: Path, scale: Scale):
        self.out = out
        self.scale = scale

    # Folders.

    def model(self, name: str) -> str:
        """The pivot's or a source's folder, or its name on the hub."""
        return self.scale.models[name] or str(self.out / "models" / name)

    def run_folder(self, variant: Variant, seed: int) -> Path:
        return self.out / "runs" / variant.name / str(seed)

    def target(self, variant: Variant, target: str, seed: int) -> Path:
        return self.run_folder(variant, seed) / "targets" / target

    def merged(self, variant: str, merge: str, seed: int) -> Path:
        return self.out / "merged" / variant / merge.replace(" ", "-") / str(seed)

    # Text and models.

    def make_text(self) -> None:
        import corpus

        chats = itertools.islice(corpus.chats(), self.scale.chats)
        corpus.write(self.out / "text", corpus.split(chats, **self.scale.corpus))

    def make_model(self, name: str) -> None:
        import models

        rows = [json.loads(line) for line in (self.out / "text" / f"{name}.jsonl").open()]
        design = replace(models.DESIGNS[name], **self.scale.designs.get(name, {}))
        with _beside(Path(self.model(name))) as folder:
            models.train(design, rows, folder)

    # Targets.

    def recipe(self, variant: Variant, seed: int) -> Path:
        """The recipe's file, written if it is missing or differs."""
        scale = self.scale
        template = {"template": variant.template}
        content: dict[str, Any] = {
            "output": str(self.run_folder(variant, seed)),
            "pivot": self.model(PIVOT),
            "sources": [
                {"model": self.model(name), "name": name, **template}
                for name in scale.sources_of(variant)
            ],
            "dataset": {
                "path": str(self.out / "text" / "target.jsonl"),
                "eval_fraction": scale.eval_fraction,
            },
            "max_length": scale.max_length,
            "scoring": {"top_k": TOP_K, "dtype": scale.dtype, "device": scale.device},
            "training": {**scale.training, "seed": seed},
            "merge": {"merge_method": "varm", "dtype": "float32"},
        }
        for section, keys in variant.sections.items():
            content[section] = {**content.get(section, {}), **keys}
        return self._write_recipe(f"{variant.name}-{seed}", content)

    def _write_recipe(self, name: str, content: dict[str, Any]) -> Path:
        path = self.out / "recipes" / f"{name}.yaml"
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return path

    def leaders(self) -> list[Variant]:
        """The first variant of each k and template, whose scores the others use."""
        first: dict[tuple[int, str], Variant] = {}
        for variant in self.scale.variants:
            if variant.strategy != "sft":
                first.setdefault((variant.top_k, variant.template), variant)
        return list(first.values())

    def train(self, variant: Variant, seed: int) -> None:
        """`fusechat-distill run`, reusing the stages that another run has finished."""
        if seed:
            self._take(STAGES, self.run_folder(variant, 0), self.run_folder(variant, seed))
        for leader in self.leaders():
            if (leader.top_k, leader.template) == (variant.top_k, variant.template):
                self._take(("scores",), self.run_folder(leader, 0), self.run_folder(variant, seed))
        distill("run", self.recipe(variant, seed))

    def _take(self, stages: Sequence[str], source: Path, target: Path) -> None:
        """Give a run the shards of another one, as links, since shards are never modified."""
        if source == target:
            return
        for stage in stages:
            if (source / stage).exists() and not (target / stage).exists():
                with _beside(target / stage) as folder:
                    shutil.copytree(
                        source / stage,
                        folder,
                        copy_function=os.link,
                        ignore=shutil.ignore_patterns(".lock"),
                        dirs_exist_ok=True,
                    )

    # Merges.

    def merge(self, variant: Variant, merge: Merge, seed: int) -> None:
        models = [str(self.target(variant, name, seed)) for name in self.scale.sources]
        self._merge(merge, models, self.merged(variant.name, merge.name, seed), seed)

    def merge_control(self, sft: Variant, name: str, seed: int) -> None:
        """The merge of two SFT seeds: averaging without any source."""
        other = (seed + 1) % self.scale.seeds
        models = [str(self.target(sft, "sft", s)) for s in (seed, other)]
        self._merge(LINEAR, models, self.merged(DEFAULT, name, seed), seed)

    def _merge(self, merge: Merge, models: list[str], out: Path, seed: int) -> None:
        """Write a YAML beside the result and run `fusechat-merge run` with it."""
        from fusechat_merge import merge as run_merge

        if out.exists():
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        config = out.with_name(f"{out.name}.yml")
        content = merge.configuration(self.model(PIVOT), (models[0], models[1]))
        config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        run_merge(config, out, threads=1, random_seed=seed)

    # Measurements.

    def evaluation_recipe(self) -> Path:
        """The recipe whose held-out rows, pivot and sources everything is measured with."""
        scale = self.scale
        content = {
            "output": str(self.out / "evaluation"),
            "pivot": self.model(PIVOT),
            "sources": [{"model": self.model(name), "name": name} for name in scale.sources],
            "dataset": {
                "path": str(self.out / "text" / "target.jsonl"),
                "eval_fraction": scale.eval_fraction,
            },
            "max_length": scale.max_length,
            "scoring": {"dtype": scale.dtype, "device": scale.device},
            "fusion": {"strategy": "sft"},
        }
        return self._write_recipe("evaluation", content)

    def measure(self, names: dict[str, list[Path]]) -> Any:
        """Bits of each held-out answer by model: a list of `CheckpointBits`, one a checkpoint.

        Of the pivot and the sources as well; what was measured before is read.
        """
        from fusechat_distill.evaluation.candidates import EvaluationPlanner
        from fusechat_distill.evaluation.measure import CheckpointEvaluation
        from fusechat_distill.inputs.open import open_inputs
        from fusechat_distill.storage.processes import Processes

        planner = EvaluationPlanner([f"{name}={p}" for name, paths in names.items() for p in paths])
        inputs = open_inputs(self.evaluation_recipe(), more_problems=planner.problems)
        plan = planner.plan(inputs)
        processes = Processes(self.scale.device)
        bits = {
            candidate.name: [
                CheckpointEvaluation(plan, checkpoint, processes, Silent()).bits(candidate.name)
                for checkpoint in candidate.checkpoints
            ]
            for candidate in plan.candidates
        }
        return plan.held_out, bits


class Silent:
    """No progress."""

    def start(self, title: str, total: int) -> None: ...

    def advance(self, samples: int, tokens: int) -> None: ...

    def stop(self) -> None: ...


def distill(*words: str | Path) -> None:
    """A `fusechat-distill` command in this process; starting one takes as long as it runs."""
    from fusechat_distill.cli import commands

    status = commands.main([str(word) for word in words], standalone_mode=False)
    if status:
        raise RuntimeError(f"fusechat-distill {' '.join(map(str, words))}: exit status {status}")


@contextlib.contextmanager
def _beside(folder: Path) -> Any:
    """A folder that gets its name when it is complete."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    os.replace(part, folder)
