"""The settings of TRL and PEFT that follow from a recipe, and their problems."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from fusechat_distill.inputs.models import empty_model
from fusechat_distill.recipe.schema import Recipe, unexpected

if TYPE_CHECKING:
    from peft import LoraConfig

    from fusechat_distill.trainer.trainer import FusionConfig

WITHOUT_EFFECT = (
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("dataloader_prefetch_factor", "disable_tqdm", "eval_", "log_", "logging_"),
    *("per_device_eval_", "project", "report_to", "run_name", "save_", "trackio_"),
)
"""Prefixes of the SFTConfig fields that do not change the trained weights."""

ABOVE_ZERO = (
    *("gradient_accumulation_steps", "num_train_epochs"),
    *("per_device_eval_batch_size", "per_device_train_batch_size"),
)
"""SFTConfig fields that have to be greater than 0."""


def clm_weight(recipe: Recipe) -> float:
    """λ; 1 for the baseline without sources, whose loss is the language-modelling term only."""
    return 1.0 if recipe.fusion.strategy == "sft" else recipe.training.clm_weight


def fusion_config(recipe: Recipe, folder: Path, *, trust_remote_code: bool = False) -> FusionConfig:
    """TRL's settings: those of the recipe, otherwise TRL's own defaults.

    Two defaults differ: weights are float32 (`pivot.dtype` is for scoring), under autocast to
    bfloat16 where the hardware supports it; one checkpoint is kept.
    """
    from transformers.utils import is_torch_bf16_gpu_available

    from fusechat_distill.trainer.trainer import FusionConfig

    sft = recipe.training.sft
    cpu = sft.get("use_cpu", recipe.scoring.device == "cpu")
    fields: dict[str, Any] = {"use_cpu": cpu, "save_total_limit": 1}
    if not sft.get("fp16"):
        fields["bf16"] = not cpu and is_torch_bf16_gpu_available()
    load = {"dtype": "float32", "use_safetensors": True, "revision": recipe.pivot.revision}
    # Rows are already cut to the pivot's `max_length`; TRL can't cut padding-free rows.
    uncut = sft.get("padding_free") and not sft.get("packing")
    own = {
        "output_dir": str(folder),
        "clm_weight": clm_weight(recipe),
        "max_length": None if uncut else recipe.max_length,
        "trust_remote_code": trust_remote_code,
        "model_init_kwargs": load | (sft.get("model_init_kwargs") or {}),
    }
    return FusionConfig(**fields | sft | own)


def lora_config(recipe: Recipe) -> LoraConfig | None:
    """PEFT's settings, or None if all weights are trained."""
    if recipe.training.lora is None:
        return None
    from peft import LoraConfig

    fields = {"task_type": "CAUSAL_LM", "revision": recipe.pivot.revision}
    return LoraConfig(**fields | recipe.training.lora)


def determining(recipe: Recipe) -> dict[str, Any]:
    """The settings in `training:` that affect the trained weights."""
    sft = recipe.training.sft
    if not sft.get("load_best_model_at_end"):
        sft = {k: v for k, v in sft.items() if not k.startswith(WITHOUT_EFFECT)}
    return sft | {"lambda": clm_weight(recipe), "lora": recipe.training.lora}


def checkpoint_bytes(recipe: Recipe, config: Any, *, trust_remote_code: bool = False) -> int:
    """Approximate disk usage in bytes of one target while it is trained; 0 for an adapter."""
    if recipe.training.lora is not None:
        return 0
    model = empty_model(config, trust_remote_code=trust_remote_code)
    return stored_bytes(recipe, sum(parameter.numel() for parameter in model.parameters()))


def stored_bytes(recipe: Recipe, parameters: int) -> int:
    """Disk usage in bytes of a target, or of an adapter, with that many trained parameters.

    Float32 weights, once for the target and once for each checkpoint, and AdamW's moments.
    """
    sft = recipe.training.sft
    # The new checkpoint is written before the oldest one is removed.
    saves = sft.get("save_strategy", "steps") != "no"
    checkpoints = (sft.get("save_total_limit") or 1) + 1 if saves else 0
    return 4 * parameters * (1 + checkpoints * (1 + moments(recipe)))


def moments(recipe: Recipe) -> int:
    """Float32 numbers that the optimizer keeps for each parameter.

    Other optimizers than AdamW may keep fewer, so none is counted for them.
    """
    optimizer = str(recipe.training.sft.get("optim", "adamw_torch"))
    return 2 if optimizer.startswith("adamw_torch") else 0


def settings_problems(
    recipe: Recipe, config: Any = None, *, trust_remote_code: bool = False
) -> list[str]:
    """What TRL, PEFT and `FusionTrainer` would refuse, as far as it is known without weights.

    With the pivot's configuration, LoRA is tried on a model without memory.
    """
    problems = [f"training.{problem}" for problem in _value_problems(recipe.training.sft)]
    arguments = lora = None
    try:
        if not problems:
            folder = recipe.output_folder
            arguments = fusion_config(recipe, folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # TRL, transformers and accelerate each raise their own
        problems.append(f"training: {_reason(error)}")
    try:
        lora = lora_config(recipe)
    except Exception as error:
        problems.append(f"training.lora: {_reason(error)}")
    if arguments is not None:
        from fusechat_distill.trainer.trainer import argument_problems

        problems += [f"training: {problem}" for problem in argument_problems(arguments)]
        own = _trainer_problems(arguments, config, trust_remote_code)
        problems += [f"training.{problem}" for problem in own]
    if config is not None:
        problems += _class_problems(recipe, config, trust_remote_code)
    if lora is not None and config is not None:
        own = _lora_problems(lora, config, trust_remote_code)
        problems += [f"training.lora: {problem}" for problem in own]
    return problems


def _class_problems(recipe: Recipe, config: Any, trust_remote_code: bool) -> Iterator[str]:
    """What keeps the pivot's class from being trained, as Llama 4's with vision."""
    # TRL 1.16's loss that balances experts asks for a key that GLM-4.5V names otherwise.
    balanced = recipe.training.sft.get("router_aux_loss_coef") != 0.0
    if config.model_type == "glm4v_moe" and balanced:
        yield (
            "training.router_aux_loss_coef: TRL can't balance the experts of a glm4v_moe model;"
            " set it to 0.0"
        )
    try:
        model = empty_model(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except Exception:  # what the class or its code raises; loading reports it
        return
    if model.base_model is model:
        yield (
            f"pivot: {type(model).__name__} has no backbone that TRL's loss can call by itself;"
            " take its language model alone as the pivot, or name it as a source"
        )


def _value_problems(sft: dict[str, Any]) -> Iterator[str]:
    """Values of SFTConfig fields that have the wrong type or are out of range.

    SFTConfig does not check them, so the trainer would fail hours later.
    """
    from pydantic import TypeAdapter, ValidationError

    from fusechat_distill.trainer.trainer import FusionConfig

    hints = get_type_hints(FusionConfig)
    for key, value in sft.items():
        if key == "fsdp":  # accepts more types than its annotation says
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            yield f"{key}: {unexpected(error.errors(include_url=False), value)}"
            continue
        if key in ABOVE_ZERO and not value > 0:
            yield f"{key}: should be greater than 0, found {value!r}"
        if key == "learning_rate" and not 0 <= value < math.inf:
            yield f"{key}: should be a finite number, 0 or above, found {value!r}"


def _trainer_problems(
    arguments: FusionConfig, config: Any, trust_remote_code: bool
) -> Iterator[str]:
    """Missing packages, and settings with which the pivot can't be loaded or optimised."""
    from transformers import Trainer
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except Exception as error:  # each integration raises its own class
        yield f"report_to: {_reason(error)}"
    if config is None:
        return
    load = arguments.model_init_kwargs or {}
    tried = {key: load[key] for key in ("dtype", "attn_implementation") if key in load}
    own = copy.deepcopy(config)  # `from_config` changes the configuration that it is given
    try:
        model = empty_model(own, trust_remote_code=trust_remote_code, **tried)
    except Exception as error:
        yield f"model_init_kwargs: {_reason(error)}"
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except Exception as error:
        yield f"optim: {_reason(error)}"


def _lora_problems(lora: LoraConfig, config: Any, trust_remote_code: bool) -> Iterator[str]:
    import torch
    from peft import get_peft_model

    from fusechat_distill.trainer.trainer import adapter_problems

    model = empty_model(config, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        try:
            problems = list(adapter_problems(model, lora))
            if not problems:
                get_peft_model(model, lora)
        except Exception as error:  # PEFT's own, and those of a pattern or of a wrong type
            problems = [_reason(error)]
    yield from problems
    yield from _unmatched_names(model, lora)


def _unmatched_names(model: Any, lora: LoraConfig) -> Iterator[str]:
    """Listed names that match the end of no module's name; PEFT ignores them silently."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    for key in ("target_modules", "modules_to_save"):
        names = getattr(lora, key)
        if not isinstance(names, (list, set, tuple)):
            continue
        known = [name for name in names if any(m.endswith(f".{name}") for m in modules)]
        unmatched = sorted(str(name) for name in names if name not in known)
        # If no target module matches at all, PEFT itself reports it.
        if unmatched and (key == "modules_to_save" or len(unmatched) < len(names)):
            yield f"{key}: no module of the model is called {', '.join(unmatched)}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
