"""Open and check everything that a recipe names, as far as possible without weights."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import FusechatError, RequestError
from fusechat_common.files import can_be_made, existing
from fusechat_common.versions import require_supported
from fusechat_distill.inputs.models import PLACEMENT, Digests, ModelFiles, open_model
from fusechat_distill.inputs.renderings import Renderings
from fusechat_distill.recipe.schema import PIVOT, Merge, Model, Recipe, read_recipe
from fusechat_distill.storage.shards import Manifest, Shards, score_bytes, stale

if TYPE_CHECKING:
    from fusechat_distill.text.conversations import Conversation, Conversations, Renderer, Rendering

PROBED = 64
"""Conversations that are rendered to check a template and to estimate lengths."""


@dataclass(eq=False)
class OpenModel:
    """A model of the recipe, checked; only its weights are not loaded yet."""

    name: str
    files: ModelFiles
    renderer: Renderer
    probed: list[Rendering] = field(default_factory=list)
    """The first conversations as this model sees them."""

    @property
    def spec(self) -> Model:
        return self.files.spec

    @cached_property
    def renderings(self) -> Renderings:
        return Renderings(self.renderer)


@dataclass(eq=False)
class Inputs:
    """A checked recipe, its dataset and its models."""

    recipe: Recipe
    conversations: Conversations
    models: dict[str, OpenModel]
    digests: Digests

    @property
    def pivot(self) -> OpenModel:
        return self.models[PIVOT]

    def rendered(
        self, model: OpenModel, conversations: Sequence[Conversation]
    ) -> list[tuple[Rendering, bool]]:
        """The conversations rendered for `model`, and whether `max_length` cut each."""
        pivot, max_length = self.pivot.renderings, self.recipe.max_length
        if model is self.pivot:
            return [(r, cut is not None) for r, cut in pivot(conversations, max_length)]
        cuts = pivot.cuts(conversations, max_length)
        return [
            (rendering.cut_at(cut), cut is not None)
            for rendering, cut in zip(model.renderer(conversations), cuts, strict=True)
        ]

    def scores_folder(self, model: OpenModel) -> Path:
        return self.recipe.scores_folder / model.name

    def scores_manifest(self, model: OpenModel) -> Manifest:
        """The manifest of the model's scores: everything that determines them."""
        scoring = self.recipe.scoring
        load = {k: v for k, v in model.spec.load.items() if k not in PLACEMENT}
        return Manifest(
            kind="scores",
            samples=len(self.conversations),
            fingerprint={
                "model": self._identity(model),
                "load": load,
                "dtype": model.spec.dtype or scoring.dtype,
                "engine": scoring.engine,
                "top_k": scoring.top_k,
                "template": model.spec.template,
                "renderer": model.renderer.fingerprint,
                "conversations": self.conversations.fingerprint,
                "max_length": self.recipe.max_length,
                "pivot_renderer": self.pivot.renderer.fingerprint,
            },
        )

    def _identity(self, model: OpenModel) -> dict[str, Any]:
        """The model's identity; without weights, the one in its scores if the rest agrees."""
        own = model.files.identity(self.digests)
        if model.files.weights or "weights" not in own:
            return own
        try:
            stored = Shards.open(self.scores_folder(model)).manifest.fingerprint["model"]
        except (FusechatError, KeyError):
            return own
        return stored if stored.get("config", own["config"]) == own["config"] else own


def open_inputs(
    path: str | Path,
    *,
    only: Collection[str] | None = None,
    trust_remote_code: bool = False,
    more_problems: Callable[[Inputs], list[str]] = lambda inputs: [],
) -> Inputs:
    """Open everything that the recipe at `path` names, except weights.

    Args:
        only: names of the models to open; the pivot is always opened, for its tokenizer. None: all
            models.
        trust_remote_code: whether the models' own code may run.
        more_problems: called with the opened inputs; returns problems of the command itself.

    Raises:
        RequestError: something is wrong; it lists every problem found.
    """
    require_supported("accelerate", "mergekit", "peft", "torch", "transformers", "trl")
    recipe, problems = read_recipe(path)
    if recipe is None:
        raise RequestError(problems, path)
    conversations = _open_conversations(recipe, problems)
    asked = set(recipe.models if only is None else only)
    # If a key is misspelt, it may be `max_length`: then its default is not what the user meant.
    limited = not problems or "max_length" in recipe.model_fields_set
    models = _open_models(recipe, asked, problems, trust_remote_code, limited)
    problems += _output_problems(recipe) + _device_problems(recipe)
    problems += _section_problems(recipe, models.get(PIVOT), trust_remote_code)
    if conversations is not None and PIVOT in models:
        digests = Digests(recipe.output_folder / "digests.json")
        inputs = Inputs(recipe, conversations, models, digests)
        problems += rendering_problems(inputs)
        if len(models) == len({PIVOT, *asked} & set(recipe.models)):
            problems += _store_problems(inputs, asked) + more_problems(inputs)
        if not problems:
            return inputs
    raise RequestError(problems, path)


def _open_conversations(recipe: Recipe, problems: list[str]) -> Conversations | None:
    from fusechat_distill.text.conversations import open_conversations

    try:
        return open_conversations(**recipe.dataset.model_dump(exclude={"eval_fraction"}))
    except RequestError as error:
        problems += [f"{error.where}: {problem}" for problem in error.problems]
        return None


def _open_models(
    recipe: Recipe,
    asked: Collection[str],
    problems: list[str],
    trust_remote_code: bool,
    limited: bool,
) -> dict[str, OpenModel]:
    from fusechat_distill.text.conversations import Renderer

    models: dict[str, OpenModel] = {}
    for name, spec in recipe.models.items():
        if name != PIVOT and name not in asked:
            continue
        # A source with complete scores needs no weights; the pivot does, for training.
        scored = None if name == PIVOT else _shards_here(recipe.scores_folder / name)
        needed = name in asked and not (scored and scored[0] == scored[1])
        own: list[str] = []
        files = None
        try:
            files = open_model(spec, trust_remote_code=trust_remote_code, need_weights=needed)
            if limited:
                own += limits(recipe, files)
            borrows = spec.template == "pivot" and name != PIVOT
            if not borrows or PIVOT in models:  # else the pivot's problem is in the list already
                template = models[PIVOT].renderer.template if borrows else None
                renderer = Renderer(files.tokenizer, template, name=spec.model)
                models[name] = OpenModel(name, files, renderer)
        except RequestError as error:
            own += error.problems
            if scored and files is None:
                own.append(_without_weights(*scored))
        problems += [f"{name} ({spec.model}): {problem}" for problem in own]
    return models


def _shards_here(folder: Path) -> tuple[int, int] | None:
    """The number of existing shards of a model's scores, and of all; None without a store."""
    try:
        shards = Shards.open(folder)
    except FusechatError:
        return None
    return len(shards.present()), len(shards.manifest.ranges())


def _without_weights(here: int, shards: int) -> str:
    if here < shards:
        return f"{here} of its {shards} shards of scores are here; with all it needs no weights"
    return (
        "its scores are complete, so it needs no weights, only its config.json, tokenizer and chat "
        "template; copy these, and set `model` to their folder"
    )


def limits(recipe: Recipe, files: ModelFiles) -> list[str]:
    """Settings of the recipe that exceed the model's limits."""
    config = files.config.get_text_config()
    problems = []
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.max_length > longest:
        problems.append(
            f"takes {longest} tokens at most; set max_length to {longest} or less (it is "
            f"{recipe.max_length})"
        )
    tokens = min(len(files.token_ids), getattr(config, "vocab_size", len(files.token_ids)))
    if recipe.scoring.top_k > tokens:
        problems.append(f"has {tokens} tokens; set scoring.top_k to at most that")
    return problems


def _device_problems(recipe: Recipe) -> list[str]:
    if recipe.scoring.engine == "vllm":
        if importlib.util.find_spec("vllm"):
            return []  # pragma: no cover (vLLM)
        return [
            "scoring.engine: vllm is not installed; install it with `pip install "
            "'fusechat[vllm]'`, or set scoring.engine: transformers"
        ]
    device = recipe.scoring.device
    if device in ("auto", "cpu"):
        return []
    import torch

    kind, _, number = device.partition(":")
    backend: Any = getattr(torch, kind, None)
    count = backend.device_count() if backend is not None and backend.is_available() else 0
    if int(number or 0) >= count:
        return [
            f"scoring.device: {device} is not available ({count} {kind} devices); set it to auto"
        ]
    return []  # pragma: no cover (an accelerator)


def _section_problems(
    recipe: Recipe, pivot: OpenModel | None, trust_remote_code: bool
) -> list[str]:
    """The problems that TRL, PEFT and mergekit find, imported only if the recipe sets something."""
    problems = []
    if recipe.training.sft or recipe.training.lora is not None:
        from fusechat_distill.inputs.trl_settings import settings_problems

        config = pivot.files.config if pivot else None
        problems += settings_problems(recipe, config, trust_remote_code=trust_remote_code)
    if recipe.merge != Merge():
        from fusechat_distill.inputs.merge_yaml import merge_problems

        problems += merge_problems(recipe)
    return problems


def _output_problems(recipe: Recipe) -> list[str]:
    if recipe.output.startswith("~"):
        return [f"output: {recipe.output} would be a folder called ~; write the path in full"]
    for name, model in recipe.models.items():
        inside = Path(model.model)
        if inside.is_dir() and recipe.output_folder.resolve().is_relative_to(inside.resolve()):
            return [
                f"output: is inside the model {name} ({inside}); set `output` to another folder"
            ]
    folder = existing(recipe.output_folder)
    if not folder.is_dir():
        return [f"output: {folder} is a file; set `output` to a folder"]
    if not can_be_made(folder):
        return [f"output: {folder} is not writable; set `output` to another folder"]
    return []


def rendering_problems(inputs: Inputs) -> list[str]:
    """The problems in rendering the first conversations for every model."""
    problems = []
    part = inputs.conversations[:PROBED]
    for name, model in inputs.models.items():
        model.probed = [rendering for rendering, _ in inputs.rendered(model, part)]
        where = f"{name} ({model.spec.model})"
        if not any(rendering.responses for rendering in model.probed):
            nothing = f"nothing is left within {inputs.recipe.max_length} tokens"
            why = model.probed[0].why_nothing or nothing
            problems.append(
                f"{where}: of the first {len(part)} conversations none can be scored ({why}); "
                "check its template, or max_length"
            )
        rows = getattr(model.files.config.get_text_config(), "vocab_size", None)
        highest = max((int(r.input_ids.max()) for r in model.probed if len(r.input_ids)), default=0)
        if rows is not None and highest >= rows:
            problems.append(
                f"{where}: its tokenizer gives token {highest}, but it has {rows} embeddings; the "
                "tokenizer is another model's"
            )
    return problems


def expected_bytes(inputs: Inputs, model: OpenModel) -> int:
    """Approximate size of the model's scores, in bytes."""
    tokens = sum(len(response.ends) for r in model.probed for response in r.responses)
    per_token = score_bytes(inputs.recipe.scoring.top_k)
    return int(tokens * per_token * len(inputs.conversations) / max(1, len(model.probed)))


def _store_problems(inputs: Inputs, asked: Collection[str]) -> list[str]:
    problems = []
    needed = 0
    for name, model in inputs.models.items():
        if name not in asked:
            continue
        folder = inputs.scores_folder(model)
        there = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        needed += max(0, expected_bytes(inputs, model) - there)
        # The manifest hashes a local model's weights: only if there is one to compare with.
        found = (folder / "manifest.json").exists()
        if found and (problem := stale(folder, inputs.scores_manifest(model))):
            problems.append(f"scores of {name}: {folder} {problem}")
    remedy = "lower scoring.top_k"
    return problems + disk_problems(inputs.recipe, "output: the scores", needed, remedy)


def disk_problems(
    recipe: Recipe, what: str, size: int, remedy: str, *, there: int = 0
) -> list[str]:
    """The problem with a disk that has no room for `size` bytes, of which some are there."""
    free = shutil.disk_usage(existing(recipe.output_folder)).free
    if size - there <= free:
        return []
    return [
        f"{what} will take about {readable_size(size)}, but only {readable_size(free)} are free; "
        f"free some, {remedy}, or set `output` to another disk"
    ]


def readable_size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
