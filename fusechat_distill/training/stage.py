"""The train stage: a target's dataset and the pivot become a checkpoint that anything can load."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import FusechatError, RequestError
from fusechat_common.files import sync_path, write_json
from fusechat_distill.fusion.decisions import Decisions
from fusechat_distill.fusion.stage import FuseStage, fuse_stages
from fusechat_distill.inputs.models import PROCESSOR_FILES, ModelFiles
from fusechat_distill.inputs.open import disk_problems
from fusechat_distill.inputs.trl_settings import (
    checkpoint_bytes,
    determining,
    fusion_config,
    lora_config,
)
from fusechat_distill.storage.shards import Manifest, Shards, stale
from fusechat_distill.storage.stage import Details, Progress, StageStatus
from fusechat_distill.training.card import model_card, publishable

if TYPE_CHECKING:
    from datasets import Dataset

    from fusechat_distill.inputs.open import Inputs
    from fusechat_distill.storage.processes import Processes
    from fusechat_distill.trainer.trainer import FusionTrainer

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""Files that a tokenizer and its chat template are read from, beside those of its own class."""

STATE = "trainer_state.json"
"""The trainer's state: its steps, and everything that it logged."""

PACKAGES = ("fusechat", "trl", "transformers", "torch")


class Losses(Details):
    """The last of each loss that the trainer logged."""

    loss: float | None = None
    clm_loss: float | None = None
    fusion_loss: float | None = None
    eval_loss: float | None = None
    eval_clm_loss: float | None = None

    @classmethod
    def last_of(cls, state: dict[str, Any]) -> Losses:
        """From what the trainer keeps in `trainer_state.json`."""
        logged: dict[str, Any] = {}
        for entry in state.get("log_history", ()):
            logged |= {name: entry[name] for name in cls.model_fields if name in entry}
        return cls(**logged)


class TrainStage:
    """One target, in `targets/<target>/`: complete, or not there.

    Until then TRL's checkpoints lie in `training/<target>/`; training resumes from the last
    complete one.
    """

    stage = "train"

    def __init__(self, inputs: Inputs, fused: FuseStage, *, trust_remote_code: bool = False):
        self.inputs = inputs
        self.fused = fused
        self.name = fused.name
        self.folder = inputs.recipe.targets_folder / self.name
        self.work = inputs.recipe.training_folder / self.name
        self._trust_remote_code = trust_remote_code

    def manifest(self) -> Manifest:
        """What determines the weights."""
        fused = self.fused.manifest()
        fingerprint = {
            "pivot": self.inputs.pivot.files.identity(self.inputs.digests),
            "fused": fused.digest,
            "training": determining(self.inputs.recipe),
        }
        return Manifest("target", fused.samples, fingerprint)

    def problems(self) -> list[str]:
        manifest = self.manifest() if self.folder.exists() or self.work.exists() else None
        problems = []
        folders = {"target": self.folder}
        if any(_checkpoints(self.work)):
            folders["training of target"] = self.work
        for what, folder in folders.items():
            if manifest and (problem := stale(folder, manifest)):
                problems.append(f"{what} {self.name}: {folder} {problem}")
        if not problems and (problem := incomplete(self.folder)):
            problems.append(f"target {self.name}: {self.folder} {problem}")
        problems += self._disk_problems()
        evaluates = self.inputs.recipe.training.sft.get("eval_strategy", "no") != "no"
        if evaluates and not self.fused.held_out():
            none = "training.eval_strategy: no conversation is held out to evaluate on"
            problems.append(f"{none}; raise dataset.eval_fraction")
        return problems

    def _disk_problems(self) -> list[str]:
        recipe = self.inputs.recipe
        if self.status().complete:
            return []
        config = self.inputs.pivot.files.config
        size = checkpoint_bytes(recipe, config, trust_remote_code=self._trust_remote_code)
        what = f"target {self.name}: its weights and checkpoints"
        there = _size(self.work)
        return disk_problems(recipe, what, size, "set training.lora", there=there)

    def status(self) -> StageStatus[Losses]:
        return train_status(self.name, self.folder, self.work)

    def run(self, processes: Processes, progress: Progress) -> StageStatus[Losses]:
        """Train the target where it is not there.

        Raises:
            FusechatError: its dataset is not complete.
            RequestError: the target, or checkpoints of it, were made with another fingerprint.
        """
        with contextlib.ExitStack() as stack:

            def prepare() -> tuple[bool, str | None]:
                """Whether there is something to do, and the checkpoint to resume from."""
                if problem := stale(self.folder, self.manifest()) or incomplete(self.folder):
                    raise RequestError(problem, self.folder)
                if (self.folder / "manifest.json").exists():
                    shutil.rmtree(self.work, ignore_errors=True)
                    return False, None
                if not self.fused.status().complete:
                    raise FusechatError(f"fused {self.name}: is not complete")
                if stale(self.work, self.manifest()) and not any(_checkpoints(self.work)):
                    with Shards.open(self.work).exclusive():  # not one that trains just now
                        shutil.rmtree(self.work)
                work = Shards.create(self.work, self.manifest())
                self.inputs.digests.save()
                stack.enter_context(work.exclusive())
                self._check_processes(processes)
                return True, self._last_checkpoint()

            missing, checkpoint = processes.first(prepare)
            if missing:
                # What TRL prints goes where progress goes; stdout is for results.
                with contextlib.redirect_stdout(sys.stderr):
                    self._train(processes, checkpoint)
            return processes.first(self.status)

    def _check_processes(self, processes: Processes) -> None:
        """A step's batch is shared by all processes, so that their number is part of the run."""
        path = self.work / "processes.json"
        try:
            before = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            write_json(path, processes.count)
            return
        if before != processes.count:
            raise FusechatError(
                f"{self.work}: was begun by {before} processes, this run has {processes.count}; "
                f"start as many, or delete {self.work} to begin anew"
            )

    def _last_checkpoint(self) -> str | None:
        """The newest complete checkpoint; what a stopped run left half written is removed."""
        for folder in _checkpoints(self.work):
            with contextlib.suppress(OSError, ValueError):
                # The trainer writes its state last.
                json.loads((folder / STATE).read_text("utf-8"))
                if _resumable({path.name for path in folder.iterdir()}):
                    return str(folder)
            shutil.rmtree(folder)
        return None

    def _train(self, processes: Processes, checkpoint: str | None) -> None:
        gc.collect()  # the model that scored last
        trainer = self._trainer(processes)
        trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        part = self.folder.with_name(f".{self.name}.part")
        processes.first(lambda: _empty(part))
        # TRL switches it off for training; a target generates as the pivot does.
        trainer.model.config.use_cache = getattr(self.inputs.pivot.files.config, "use_cache", True)
        trainer.save_model(str(part))
        processes.wait()
        processes.first(lambda: self._complete(part, trainer, metrics))

    def _trainer(self, processes: Processes) -> FusionTrainer:
        from transformers import TrainerCallback

        from fusechat_distill.trainer.trainer import FusionTrainer

        class Begin(TrainerCallback):
            """Saves the number of steps before the first checkpoint does."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    path = Path(args.output_dir, STATE)
                    path.unlink(missing_ok=True)  # it may be a link to elsewhere
                    state.save_to_json(str(path))

        recipe = self.inputs.recipe
        arguments = fusion_config(recipe, self.work, trust_remote_code=self._trust_remote_code)
        arguments.disable_tqdm = arguments.disable_tqdm or not sys.stderr.isatty()
        train, evaluation = processes.in_turn(self._datasets)
        return FusionTrainer(
            model=_path(self.inputs.pivot.files),
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=self.inputs.pivot.files.tokenizer,
            peft_config=lora_config(recipe),
            callbacks=[Begin()],
        )

    def _datasets(self) -> tuple[Dataset, Dataset | None]:
        """The training rows and the held-out rows, on disk."""
        from datasets import Dataset

        shards = Shards(self.fused.folder, self.fused.manifest())
        rows = Dataset.from_parquet(
            [str(shards.path(samples)) for samples in shards.manifest.ranges()],
            cache_dir=str(self.work / "data"),
        )
        chosen = rows["held_out"][:]
        rows = rows.remove_columns(["key", "row", "held_out"])
        train, evaluation = (
            rows.select([i for i, out in enumerate(chosen) if out == wanted])
            for wanted in (False, True)
        )
        return train, evaluation if len(evaluation) else None

    def _complete(self, part: Path, trainer: FusionTrainer, metrics: dict[str, float]) -> None:
        """Add tokenizer, card and manifest to the weights, then rename the folder."""
        if not any(part.glob("*.safetensors")):  # transformers says nothing then
            raise FusechatError(
                f"target {self.name}: its weights lie in pieces over the processes and were not "
                "put together; set fsdp_state_dict_type: FULL_STATE_DICT (FSDP) or "
                "zero3_save_16bit_model: true (DeepSpeed) in the launcher's configuration, and "
                "start it again: it goes on from the last checkpoint"
            )
        copy_tokenizer(self.inputs.pivot.files, part)
        (part / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine
        trainer.state.best_model_checkpoint = publishable(trainer.state.best_model_checkpoint)
        trainer.state.save_to_json(str(part / STATE))
        runs = self.work / "runs"  # what `report_to` wrote, with paths of this machine
        if runs.exists():
            kept_runs = self.inputs.recipe.output_folder / "report" / "runs" / self.name
            shutil.copytree(runs, kept_runs, dirs_exist_ok=True)
        made_of = self.made_of(metrics)
        write_json(part / "fusechat_distill.json", publishable(made_of))
        files = sorted(path.name for path in part.glob("*") if path.is_file())
        (part / "README.md").write_text(model_card(made_of), encoding="utf-8")
        write_json(part / "manifest.json", self.manifest().as_json() | {"files": files})
        for path in part.rglob("*"):
            sync_path(path)
        os.replace(part, self.folder)
        sync_path(self.folder.parent)
        shutil.rmtree(self.work)

    def made_of(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What the target was made from, and how; JSON values."""
        recipe = self.inputs.recipe
        decisions = Decisions.read(self.fused.folder)
        packages = PACKAGES if recipe.training.lora is None else (*PACKAGES, "peft")
        return {
            "target": self.name,
            "strategy": recipe.fusion.strategy,
            "pivot": recipe.pivot.model,
            "sources": {s.title: s.model for s in recipe.sources if s.title in self.fused.sources},
            "dataset": recipe.dataset.model_dump(exclude_none=True),
            "max_length": recipe.max_length,
            "alignment": recipe.alignment.model_dump(),
            "fusion": recipe.fusion.model_dump(),
            "training": recipe.training.sft | determining(recipe),
            "decisions": decisions.model_dump(exclude={"format"}, exclude_none=True),
            "metrics": {
                key: value
                for key, value in sorted(metrics.items())
                if key.endswith(("loss", "share", "entropy"))
            },
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }


def copy_tokenizer(files: ModelFiles, folder: Path) -> None:
    """Copy a model's tokenizer and processor byte for byte, over what transformers wrote.

    Tokenizers that transformers 5 has written are refused by some servers.
    """
    from transformers.utils import cached_file

    own = getattr(files.tokenizer, "vocab_files_names", None) or {}
    absent_is_none = {"_raise_exceptions_for_missing_entries": False}
    for name in sorted({*TOKENIZER_FILES, *PROCESSOR_FILES, *own.values()}):
        (folder / name).unlink(missing_ok=True)
        model, revision = files.spec.model, files.spec.revision
        if path := cached_file(model, name, revision=revision, **absent_is_none):
            shutil.copyfile(path, folder / name)


def incomplete(target: Path) -> str | None:
    """Why an existing folder is not a complete target, or None."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        manifest = json.loads((target / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return "holds no manifest.json that can be read; move it away or delete it to train anew"
    lost = [name for name in manifest.get("files", ()) if not (target / name).exists()]
    if lost:
        return f"lacks {', '.join(lost)}; copy them back, or delete it to train anew"
    return None


def _resumable(names: Collection[str]) -> bool:
    """Whether a checkpoint has every file whose absence the trainer would not report."""
    if any(name.startswith("global_step") for name in names):
        return True  # DeepSpeed's, which looks itself

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in names)

    state = {has("optimizer"), has("scheduler"), has("rng_state")}  # none with `save_only_model`
    return len(state) == 1 and has("model", "adapter_model", "pytorch_model")


def train_status(name: str, target: Path, work: Path) -> StageStatus[Losses]:
    """Steps done and in total, from the target or from its last checkpoint."""
    if (target / "manifest.json").exists() and not incomplete(target):
        folders = [target]
    else:
        folders = [*_checkpoints(work), work]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / STATE).read_text("utf-8"))
            return StageStatus(
                stage="train",
                name=name,
                done=state["global_step"],
                # Training may end before the last step (`max_steps` of a callback, early stopping).
                total=state["global_step" if folder is target else "max_steps"],
                bytes=_size(folder),
                details=Losses.last_of(state),
                unit="steps",
            )
    return StageStatus(stage="train", name=name, done=0, total=None, details=Losses(), unit="steps")


def _path(files: ModelFiles) -> str:
    """The hub name or absolute path, which PEFT writes into an adapter."""
    folder = Path(files.spec.model)
    return str(folder.resolve()) if folder.is_dir() else files.spec.model


def _checkpoints(work: Path) -> list[Path]:
    """TRL's, newest first."""
    return sorted(work.glob("checkpoint-*"), key=_step, reverse=True)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def train_stages(
    inputs: Inputs, names: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> list[TrainStage]:
    """The train stages of the recipe's targets, or of those made from the sources named."""
    return [
        TrainStage(inputs, fused, trust_remote_code=trust_remote_code)
        for fused in fuse_stages(inputs, names)
    ]
