"""mergekit's table of a model's tensors, made from the names in the files.

mergekit has tables for some classes; for others it takes the names that transformers' class has in
memory: experts are stacked there whatever the files say, all layers have to be alike, and what the
class doesn't hold (layers for multi-token prediction, say) is left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.architecture import (
    ModelArchitecture,
    ModuleArchitecture,
    ModuleDefinition,
    WeightInfo,
)

from fusechat_merge.inputs.checkpoint import Checkpoint
from fusechat_merge.inputs.stored import Stored
from fusechat_merge.methods.units import layer_of

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VOCABULARY = re.compile(r"embed|wte|head|^output")
_TOWER = re.compile(r"vision|visual|audio|image")

Tensors = Mapping[str, Stored]


class FilesModule(ModuleArchitecture):
    """The tensors of all models, under the names in the first one's files.

    Args:
        models: the base first; all with the base's names.
        config: the base's configuration.
    """

    def __init__(self, models: Sequence[Checkpoint], config: Any) -> None:
        base = models[0].tensors
        absent = frozenset().union(*(model.absent for model in models))
        self._key, number = _layers_key(config)
        stacks: dict[str, set[int]] = defaultdict(set)
        for name in base:
            if index := _place(name):
                stacks[index[0]].add(index[1])
        # The language model's layers: as many as the configuration counts, or the longest stack.
        self._stack = max(
            stacks,
            key=lambda stack: (
                not _TOWER.search(stack),
                number is not None and number - 1 in stacks[stack],
                len(stacks[stack]),
            ),
            default="",
        )
        found = len(stacks.get(self._stack, ()))
        self._number = found if number is None else min(number, found)
        self._layers: dict[int, list[WeightInfo]] = defaultdict(list)
        self._outside: list[WeightInfo] = []
        head, embedding = _tied_head(models, config)
        for name in base if head is None or head in base else [*base, head]:
            weight = WeightInfo(
                name=name,
                vocabulary_axis=0 if _of_vocabulary(name, base.get(name), config) else None,
                optional=name == head,
                tied_names=(embedding,) if name == head else None,
            )
            place = _place(name)
            if place is not None and place[0] == self._stack and place[1] < self._number:
                self._layers[place[1]].append(weight)
            elif name not in absent:
                self._outside.append(weight)
        # Layers that only deeper models have.
        for model in models[1:]:
            deeper: dict[int, list[WeightInfo]] = defaultdict(list)
            for name in model.tensors:
                place = _place(name)
                if place and place[0] == self._stack and place[1] not in self._layers:
                    deeper[place[1]].append(WeightInfo(name=name))
            self._layers |= deeper

    def num_layers_config_key(self) -> str | None:
        return self._key

    def num_layers(self, config: Any) -> int:
        _, number = _layers_key(config)  # a language model's own has it elsewhere than the base's
        return self._number if number is None else number

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        return self._outside

    def post_weights(self, config: Any) -> list[WeightInfo]:
        return []

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        return self._layers.get(index, [])

    def renumbered(self, weight: WeightInfo, index: int) -> WeightInfo:
        """The same weight of another layer."""
        layer = layer_of(weight.name)
        name = f"{self._stack}.{index}{weight.name[len(layer) :]}"
        return weight if name == weight.name else weight.model_copy(update={"name": name})


def files_architecture(models: Sequence[Checkpoint], config: Any) -> ModelArchitecture:
    """The table for merging these models; see `FilesModule`."""
    vocabulary = "vocab_size"
    if getattr(config, "text_config", None) is not None:
        vocabulary = f"text_config.{vocabulary}"
    return ModelArchitecture(
        modules={"default": ModuleDefinition(architecture=FilesModule(models, config))},
        architectures=list(config.architectures or ()),
        model_type=config.model_type,
        vocab_size_config_key=vocabulary,
    )


def fits(table: ModelArchitecture, config: Any, tensors: Tensors) -> bool:
    """Whether mergekit's table has the names that are in a model's files."""
    try:
        weights = table.all_weights(config=config)
    except RuntimeError:  # the configuration lacks a key, as newer ones of Qwen2-VL do
        return False
    return all(weight.name in tensors or weight.optional for weight in weights)


def _place(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor belongs to, and its layer's number."""
    layer = layer_of(name)
    if layer == name:
        return None
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def _layers_key(config: Any) -> tuple[str | None, int | None]:
    """Where the configuration of the language model has its number of layers, and that number."""
    nested = config.get_text_config()
    for key in _LAYERS:
        value = getattr(nested, key, None)
        if isinstance(value, int):
            where = next((k for k in config.sub_configs if getattr(config, k, None) is nested), "")
            return (f"{where}.{key}" if where else key), value
    return None, None


def _of_vocabulary(name: str, at: Stored | None, config: Any) -> bool:
    """Whether a tensor has a row for each token."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    parts = name.split(".")[-3:-1]
    named = any(_VOCABULARY.search(part) for part in parts)
    return named and (at is None or at.shape[:1] == (size,))


def _tied_head(models: Sequence[Checkpoint], config: Any) -> tuple[str | None, str]:
    """The output head that some models have and others tie to the embeddings; and these."""
    import transformers

    kind = getattr(transformers, (config.architectures or [""])[0], None)
    tied = getattr(kind, "_tied_weights_keys", None)
    pairs = tied if isinstance(tied, dict) else {"lm_head.weight": "embed_tokens.weight"}
    everything = dict.fromkeys(name for model in models for name in model.tensors)
    for head, embedding in pairs.items():
        heads = [name for name in everything if _ends_alike(name, head)]
        embeddings = [name for name in models[0].tensors if _ends_alike(name, embedding)]
        if heads and embeddings and not all(heads[0] in model.tensors for model in models):
            return heads[0], embeddings[0]
    return None, ""


def _ends_alike(name: str, other: str) -> bool:
    """Whether both have the same last two components, and `name` is outside of layers."""
    return name.split(".")[-2:] == other.split(".")[-2:] and layer_of(name) == name
