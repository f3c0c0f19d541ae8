"""What `validate --estimate` reads of models and dataset, as far as they can be reached."""

from __future__ import annotations

import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat_common.errors import RequestError, one_line
from fusechat_distill.estimate.formulas import GPU, Cost, Shape, Text, estimate, total
from fusechat_distill.inputs.models import empty_model
from fusechat_distill.inputs.open import readable_size
from fusechat_distill.inputs.trl_settings import lora_config

if TYPE_CHECKING:
    from fusechat_distill.recipe.schema import Model, Recipe
    from fusechat_distill.text.conversations import Conversations, Renderer

SAMPLED = 256
"""Conversations of a local dataset that are looked at, evenly spread."""

CONVERSATIONS = 100_000
TOKENS = 1_000
"""A conversation, of a dataset that isn't local; no more than `max_length`."""
RESPONSE_SHARE = 0.5

BYTES_PER_TOKEN = 4
"""UTF-8 bytes, where the pivot's tokenizer is out of reach."""


@dataclass(frozen=True)
class Estimate:
    costs: list[Cost]
    text: Text
    assumed: list[str]
    """Values used in place of unknown ones, each as `what isn't known: value`."""
    missing: list[str]
    """What couldn't be reached, and why."""

    def as_json(self) -> dict[str, Any]:
        return {
            "conversations": self.text.conversations,
            "tokens": self.text.tokens * self.text.conversations,
            "response_tokens": self.text.response_tokens * self.text.conversations,
            "gpu": GPU,
            "stages": [asdict(cost) for cost in self.costs],
            "assumed": self.assumed,
            "missing": self.missing,
        }

    def lines(self) -> list[str]:
        """A table for people, one line a stage and their total, and what it rests on."""
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, padding=0)
        table.add_column(no_wrap=True)
        widths = {"disk": 10, "for a while": 13, "memory": 10, "GPU time": 10, "CPU time": 10}
        for title, width in widths.items():
            table.add_column(title, justify="right", min_width=width, no_wrap=True)
        names = [f"{cost.stage} {cost.name}" for cost in self.costs] + ["total"]
        for name, cost in zip(names, [*self.costs, total(self.costs)], strict=True):
            sizes = (cost.disk_bytes, cost.temporary_bytes, cost.memory_bytes)
            table.add_row(name, *map(_size, sizes), _time(cost.gpu_hours), _time(cost.cpu_hours))
        # As plain text of any width: recipes end in it, and it may go into a file.
        console = Console(file=io.StringIO(), width=1000, record=True, markup=False, emoji=False)
        console.print(table)
        text = self.text
        notes = [
            f"{text.conversations:,} conversations, {text.tokens * text.conversations:.3g} tokens "
            f"in the pivot's, {text.response_tokens * text.conversations:.3g} of them in answers",
            f"GPU time of one {GPU}; CPU time of one core, ? not known",
            "memory of the device that scores, and of all devices together that train",
        ]
        notes += [f"assumed: {line}" for line in self.assumed]
        notes += [f"missing: {line}" for line in self.missing]
        if self.missing:
            notes.append("the total is of what is known")
        return [line.rstrip() for line in console.export_text().splitlines()] + notes


def estimate_recipe(recipe: Recipe, *, trust_remote_code: bool = False) -> Estimate:
    """Open what can be opened of what the recipe names; nothing is downloaded but configurations.

    What is out of reach is named instead of failing.
    """
    missing: list[str] = []
    with ThreadPoolExecutor(len(recipe.models)) as pool:  # an absent hub takes 20 s to give up
        read = list(pool.map(lambda m: read_config(m, trust_remote_code), recipe.models.values()))
    configs: dict[str, Any] = {}
    shapes: dict[str, Shape | None] = {}
    for (name, model), config in zip(recipe.models.items(), read, strict=True):
        shapes[name] = None
        if isinstance(config, str):
            missing.append(f"{name} ({model.model}): {config}")
            continue
        try:
            shapes[name] = shape(config, trust_remote_code=trust_remote_code)
            configs[name] = config
        except Exception as error:  # a model's own code raises what it likes
            missing.append(f"{name} ({model.model}): {one_line(error)}")
    adapter = None
    pivot = configs.get("pivot")
    if recipe.training.lora is not None and pivot is not None:
        try:
            adapter = adapter_parameters(recipe, pivot, trust_remote_code=trust_remote_code)
        except Exception as error:  # PEFT raises several
            missing.append(f"training.lora: {one_line(error)}")
    text, assumed = _text(recipe, missing, trust_remote_code)
    local = frozenset(name for name, m in recipe.models.items() if Path(m.model).is_dir())
    costs = estimate(recipe, shapes, text, adapter=adapter, local=local)
    return Estimate(costs, text, assumed, missing)


def shape(config: Any, *, trust_remote_code: bool = False) -> Shape:
    """The size of the model that a configuration describes, counted on it without its weights."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    chosen, experts = _chosen_experts(text)
    lookup = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    # Every parameter that multiplies a token: no vision tower, no embedding that is only looked up
    # (an untied head has weights of its own), of the experts the chosen ones.
    active = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(("model.vision", "vision", "model.multi_modal")):
            continue
        if parameter is lookup and head is not None and head.weight is not lookup:
            continue
        active += parameter.numel() * (chosen / experts if ".experts." in name else 1)
    width = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        active=round(active),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=width * chosen,
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
    )


def adapter_parameters(recipe: Recipe, config: Any, *, trust_remote_code: bool = False) -> int:
    """How many parameters the recipe's LoRA trains on the pivot."""
    import torch
    from peft import get_peft_model

    lora = lora_config(recipe)
    assert lora is not None
    model = empty_model(config, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _size(count: float | None) -> str:
    if count is None:
        return "?"
    return readable_size(count) if count else "-"


def _time(hours: float | None) -> str:
    if hours is None:
        return "?"
    if hours >= 1:
        return f"{hours:,.1f} h" if hours < 10 else f"{hours:,.0f} h"
    if hours * 60 >= 1:
        return f"{hours * 60:.0f} min"
    return f"{hours * 3600:.1f} s" if hours else "-"


def _chosen_experts(config: Any) -> tuple[int, int]:
    """Experts that each token passes through, and all of them; (1, 1) without experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            return getattr(config, "num_experts_per_tok", 1), count
    return 1, 1


def read_config(model: Model, trust_remote_code: bool) -> Any:
    """transformers' configuration, or why there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers and huggingface_hub raise many unrelated classes
        return f"its configuration can't be read: {one_line(error)}"


def _text(recipe: Recipe, missing: list[str], trust_remote_code: bool) -> tuple[Text, list[str]]:
    """The dataset's size, and what of it is assumed."""
    from fusechat_distill.text.conversations import open_conversations

    data = recipe.dataset
    if Path(data.path).exists():
        try:
            conversations = open_conversations(**data.model_dump(exclude={"eval_fraction"}))
        except RequestError as error:
            missing += [f"{error.where}: {problem}" for problem in error.problems]
        else:
            return _sampled(recipe, conversations, trust_remote_code)
    count = data.max_samples or CONVERSATIONS
    tokens = min(TOKENS, recipe.max_length)
    return Text(count, tokens, tokens * RESPONSE_SHARE), [
        f"the dataset isn't here: {count:,} conversations of {tokens:,} tokens, "
        f"{RESPONSE_SHARE:.0%} of them in answers"
    ]


def _sampled(
    recipe: Recipe, conversations: Conversations, trust_remote_code: bool
) -> tuple[Text, list[str]]:
    count = len(conversations)
    sample = [conversations[row] for row in range(0, count, max(1, count // SAMPLED))]
    if (renderer := _renderer(recipe, trust_remote_code)) is not None:
        renderings = [rendering.cut_to(recipe.max_length)[0] for rendering in renderer(sample)]
        tokens = sum(len(r.input_ids) for r in renderings)
        response = sum(len(part.ends) for r in renderings for part in r.responses)
        return Text(count, tokens / len(sample), response / len(sample)), []
    total_size = answers = 0.0
    for conversation in sample:
        size = Counter[str]()
        for message in conversation.messages:
            size[message.role] += len(message.content.encode())
        whole = (size["system"] + size["user"] + size["assistant"]) / BYTES_PER_TOKEN
        share = min(1.0, recipe.max_length / max(1.0, whole))
        total_size += share * whole
        answers += share * size["assistant"] / BYTES_PER_TOKEN
    return Text(count, total_size / len(sample), answers / len(sample)), [
        f"the pivot's tokenizer isn't here: {BYTES_PER_TOKEN} bytes a token"
    ]


def _renderer(recipe: Recipe, trust_remote_code: bool) -> Renderer | None:
    from transformers import AutoTokenizer

    from fusechat_distill.text.conversations import Renderer

    pivot = recipe.pivot
    options = {"revision": pivot.revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(pivot.model, **options)
        return Renderer(tokenizer, None, name=pivot.model)
    except Exception:  # no template; transformers and huggingface_hub raise what they like
        return None
