"""What a recipe will cost: disk, device memory and time of each stage, computed by formulas.

docs/scaling.md ("What the estimate says") has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fusechat_distill.fusion.fuse import target_models
from fusechat_distill.inputs.trl_settings import moments, stored_bytes
from fusechat_distill.recipe.schema import PIVOT
from fusechat_distill.storage.shards import score_bytes

if TYPE_CHECKING:
    from fusechat_distill.recipe.schema import Model, Recipe

GPU = "A100 (312 TFLOP/s in bfloat16) at 40 %"
FLOPS = 312e12 * 0.4

ALIGN_TOKENS_PER_SECOND = {"bytes": 700_000, "dtw": 9_500}
"""Pivot tokens on one core, measured by benchmarks/bench_align.py."""

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

HEAD_BYTES = 2 * 2**25 * 4
"""Two tiles of logits, see `scoring.head`."""


@dataclass(frozen=True)
class Shape:
    """What a model's configuration says about its size."""

    parameters: int
    active: int
    """Parameters that multiply each token: of experts those chosen, no embedding that is only
    looked up, no vision tower."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP; of the chosen experts together."""
    dtype: str = "bfloat16"
    """Of the weights on disk."""


@dataclass(frozen=True)
class Text:
    """The dataset in the pivot's tokens."""

    conversations: int
    tokens: float
    """A conversation."""
    response_tokens: float
    """Of these, in answers."""


@dataclass(frozen=True)
class Cost:
    """One stage's; None is not known, 0 nothing."""

    stage: Literal["download", "score", "align", "fuse", "train", "merge"]
    name: str
    disk_bytes: float | None
    """What stays."""
    memory_bytes: float | None
    """Device memory at its peak."""
    gpu_hours: float | None
    cpu_hours: float | None = 0.0
    """Of one core, where that is what a stage runs on."""
    temporary_bytes: float | None = 0.0
    """Disk that is taken while the stage runs, and free again after it."""


def estimate(
    recipe: Recipe,
    shapes: Mapping[str, Shape | None],
    text: Text,
    *,
    adapter: int | None = None,
    local: frozenset[str] = frozenset(),
) -> list[Cost]:
    """The cost of every stage.

    Args:
        shapes: of the recipe's models by name; None where a configuration is out of reach.
        adapter: parameters that LoRA trains, if the recipe asks for it and they are known.
        local: names of the models that need no download.
    """
    baseline = recipe.fusion.strategy == "sft"
    models = {PIVOT: recipe.pivot} if baseline else recipe.models
    costs = [
        Cost("download", name, _weight_bytes(shapes.get(name)), 0, 0)
        for name in models
        if name not in local
    ]
    if not baseline:
        costs += [_score(recipe, n, m, shapes.get(n), text) for n, m in models.items()]
        costs += [_align(recipe, source.title, text) for source in recipe.sources]
    targets = target_models(recipe.fusion.strategy, [s.title for s in recipe.sources])
    widths = {target: _width(recipe, len(sources)) for target, sources in targets.items()}
    for target, width in widths.items():
        disk = (2 * text.tokens + (4 + 4 * width) * text.response_tokens) * text.conversations
        costs.append(Cost("fuse", target, disk, 0, 0, None))
    pivot = shapes.get(PIVOT)
    costs += [_train(recipe, t, pivot, text, width, adapter) for t, width in widths.items()]
    if recipe.fusion.strategy == "pairwise":
        size = _weight_bytes(pivot, recipe.merge.dtype)
        costs.append(Cost("merge", recipe.merge.merge_method, size, 0, 0, None))
    return costs


def total(costs: list[Cost]) -> Cost:
    """All stages in turn: what stays and the times add up, of the rest the largest counts."""

    def known(name: str) -> list[float]:
        return [value for cost in costs if (value := getattr(cost, name)) is not None]

    return Cost(
        "merge",
        "total",
        sum(known("disk_bytes")),
        max(known("memory_bytes"), default=0),
        sum(known("gpu_hours")),
        sum(known("cpu_hours")),
        max(known("temporary_bytes"), default=0),
    )


def _weight_bytes(shape: Shape | None, dtype: str | None = None) -> float | None:
    """On disk, in `dtype` or in the model's own."""
    return None if shape is None else shape.parameters * DTYPE_BYTES.get(dtype or shape.dtype, 4)


def _score(recipe: Recipe, name: str, model: Model, shape: Shape | None, text: Text) -> Cost:
    scoring = recipe.scoring
    disk = score_bytes(scoring.top_k) * text.response_tokens * text.conversations
    if shape is None:
        return Cost("score", name, disk, None, None)
    dtype = model.dtype or scoring.dtype
    size = DTYPE_BYTES[shape.dtype if dtype == "auto" else dtype]
    widest = scoring.batch_tokens * (4 * shape.hidden + 3 * shape.intermediate)
    memory = size * (shape.parameters + widest) + HEAD_BYTES
    flops = 2 * shape.active * text.tokens * text.conversations
    return Cost("score", name, disk, memory, flops / FLOPS / 3600)


def _align(recipe: Recipe, name: str, text: Text) -> Cost:
    positions = text.response_tokens * text.conversations
    seconds = positions / ALIGN_TOKENS_PER_SECOND[recipe.alignment.positions]
    disk = (2 + 3 * recipe.scoring.top_k) * positions
    return Cost("align", name, disk, 0, 0, seconds / 3600)


def _width(recipe: Recipe, sources: int) -> int:
    """Entries of a fused distribution, as `FuseStage.width` has it."""
    several = recipe.fusion.function == "avg_ce"
    return recipe.scoring.top_k * ((1 + sources if several else 1) if sources else 0)


def _train(
    recipe: Recipe, target: str, shape: Shape | None, text: Text, width: int, adapter: int | None
) -> Cost:
    settings = recipe.training.sft
    lora = recipe.training.lora is not None
    rows = text.tokens * text.conversations * (8 + 8 * width)  # Arrow, until the target is there
    if shape is None or (lora and adapter is None):
        return Cost("train", target, None, None, None, temporary_bytes=None)
    older = settings.get("gradient_checkpointing", True)  # TRL's default
    checkpointed = settings.get("activation_checkpointing", older)
    trained = adapter if lora and adapter is not None else shape.parameters
    per_token = (4 if lora else 6) + (2 if checkpointed else 0)
    flops = per_token * shape.active * _trained_tokens(recipe, text)

    dtype = (settings.get("model_init_kwargs") or {}).get("dtype", "float32")
    weights = DTYPE_BYTES.get(dtype, 4) * shape.parameters
    # Under autocast there is a bfloat16 copy of each weight that is trained.
    states = trained * (4 + 4 * moments(recipe) + 2)
    batch = settings.get("per_device_train_batch_size", 8) * recipe.max_length
    layer = batch * (10 * shape.hidden + 5 * shape.intermediate) * 2
    # With checkpointing each layer's input is kept, and one layer is computed again at a time.
    checkpoints = batch * shape.hidden * 2 * shape.layers + layer
    activations = checkpoints if checkpointed else layer * shape.layers
    return Cost(
        "train",
        target,
        4 * trained,
        weights + states + activations,
        flops / FLOPS / 3600,
        temporary_bytes=stored_bytes(recipe, trained) - 4 * trained + rows,
    )


def _trained_tokens(recipe: Recipe, text: Text) -> float:
    """Over all epochs; `max_steps` counts for one process."""
    settings = recipe.training.sft
    steps = settings.get("max_steps", -1)
    if steps > 0:
        batch = settings.get("per_device_train_batch_size", 8)
        return float(steps * batch * settings.get("gradient_accumulation_steps", 1) * text.tokens)
    share = 1 - recipe.dataset.eval_fraction
    return float(settings.get("num_train_epochs", 3) * share * text.tokens * text.conversations)
