"""What is compared: recipes that differ in one factor, merge methods, and scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusechat_merge.methods.units import GRANULARITIES

DOMAINS = ("documentation", "code")
"""Domains of the text; sources that are trained here are named after their domain."""

MODELS = ("pivot", *DOMAINS)

DEFAULT = "default"


@dataclass(frozen=True)
class Variant:
    """A recipe, by its differences from the default."""

    name: str
    factor: str
    """The setting that it varies; variants of a factor are compared with the default."""
    level: str
    default_level: str = ""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: str = "native"

    @property
    def top_k(self) -> int:
        return int(self.sections.get("scoring", {}).get("top_k", TOP_K))

    @property
    def strategy(self) -> str:
        return str(self.sections.get("fusion", {}).get("strategy", "pairwise"))


TOP_K = 64
LAMBDA = 0.5

BASELINES = (
    Variant("sft", "strategy", "sft", "pairwise", {"fusion": {"strategy": "sft"}}),
    Variant("multi", "strategy", "multi", "pairwise", {"fusion": {"strategy": "multi"}}),
)

CORE = (Variant(DEFAULT, "", ""), *BASELINES)
"""The ladder itself; these are trained with more seeds."""

Sections = dict[str, dict[str, Any]]
_K10: Sections = {"scoring": {"top_k": 10}}
_GOLD: Sections = {"fusion": {"tail": "gold"}}
_L9: Sections = {"training": {"lambda": 0.9}}

FACTORS = (
    Variant("lambda-0.9", "λ", "0.9", "0.5", _L9),
    Variant("k-10", "k", "10", "64", _K10),
    Variant("lambda-0.9-k-10", "λ and k", "0.9 and 10 (the papers')", "0.5 and 64", _K10 | _L9),
    Variant("gold", "tail", "gold", "renormalize", _GOLD),
    Variant("gold-k-10", "tail and k", "gold and 10", "renormalize and 64", _GOLD | _K10),
    Variant("mined", "vocabulary", "mined", "ms", {"alignment": {"vocabulary": "mined"}}),
    Variant("em", "vocabulary", "em", "ms", {"alignment": {"vocabulary": "em"}}),
    Variant("bytes", "vocabulary", "bytes", "ms", {"alignment": {"vocabulary": "bytes"}}),
    Variant("dtw", "positions", "dtw", "bytes", {"alignment": {"positions": "dtw"}}),
    Variant("pivot-template", "template", "pivot", "native", template="pivot"),
)

VARIANTS = CORE + FACTORS


@dataclass(frozen=True)
class Merge:
    """A way to merge two checkpoints, in mergekit's terms."""

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of each model."""
    paper: float | None = None
    """MT-Bench average in FusionChat, if published."""

    def configuration(self, pivot: str, models: tuple[str, str]) -> dict[str, Any]:
        # SLERP goes from one of the two to the other, and linear has no base.
        base = {"slerp": models[0], "linear": ""}.get(self.method, pivot)
        own = {"parameters": dict(self.each)} if self.each else {}
        return {
            "merge_method": self.method,
            **({"base_model": base} if base else {}),
            "models": [{"model": model} | own for model in models],
            **({"parameters": dict(self.parameters)} if self.parameters else {}),
            "dtype": "float32",  # so that methods are compared, not their rounding
        }


VARM = "varm matrix"

_VARM = {"matrix": 8.22, "layer": 8.15, "model": 8.10, "element": 1.00}

LINEAR = Merge("linear", "linear", each={"weight": 0.5}, paper=8.05)

MERGES = (
    LINEAR,
    Merge("slerp", "slerp", {"t": 0.5}, paper=8.19),
    Merge("task arithmetic", "task_arithmetic", each={"weight": 0.7}, paper=8.20),
    Merge("ties", "ties", each={"weight": 1.0, "density": 0.5}, paper=8.18),
    Merge("dare", "dare_linear", {"normalize": True}, {"weight": 1.0, "density": 0.5}, 8.14),
    Merge("sce (mergekit)", "sce", {"select_topk": 1.0}),
    Merge("sce", "fusechat_sce", {"select_topk": 1.0}),
    Merge("sce 0.1", "fusechat_sce", {"select_topk": 0.1}),
    *(
        Merge(
            f"varm {granularity}",
            "varm",
            {"granularity": granularity},
            paper=_VARM.get(granularity),
        )
        for granularity in GRANULARITIES
    ),
)

CONTROL = "two sft seeds"
"""A linear merge of two SFT checkpoints: the gain from averaging alone."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    seeds: int
    """Training seeds of the ladder itself."""
    factor_seeds: int
    """Training seeds of the single factors."""
    corpus: Mapping[str, int]
    """Bytes of answers, as the quickstart's `corpus.split` takes them."""
    training: Mapping[str, Any]
    chats: int | None = None
    """How many of the quickstart's chats are used; None: all."""
    models: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(MODELS, ""))
    """The pivot and two sources of other families: hub names, or "" for those of the quickstart,
    trained on the spot."""
    designs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Differences from the quickstart's designs, by model."""
    factor_sources: tuple[str, ...] = ()
    """Sources whose targets show the single factors; empty: all sources and their merges."""
    processes: int = 2
    eval_fraction: float = 0.5
    max_length: int = 512
    variants: tuple[Variant, ...] = VARIANTS
    merges: tuple[Merge, ...] = MERGES
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in self.models if name != "pivot")

    def sources_of(self, variant: Variant) -> tuple[str, ...]:
        return self.sources if variant in CORE else self.factor_sources or self.sources

    def targets(self, variant: Variant) -> tuple[str, ...]:
        """One for each source, or the one that the strategy has."""
        pairwise = variant.strategy == "pairwise"
        return self.sources_of(variant) if pairwise else (variant.strategy,)

    def seeds_of(self, variant: Variant) -> int:
        return self.seeds if variant in CORE else self.factor_seeds


_TRAINING = {
    "lambda": LAMBDA,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 2,
    "train_sampling_strategy": "group_by_length",  # faster than packing on a CPU
    "activation_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 50,
    "report_to": "none",
    "dataloader_pin_memory": False,
}

_PIVOT_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
_CODE_CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_DESIGNS: Mapping[str, Mapping[str, Any]] = {
    "pivot": {"template": _PIVOT_CHAT, "specials": ("</s>", "<unk>", "<s>")},
    "documentation": {"hidden": 160},
    "code": {"template": _CODE_CHAT},
}
"""1.0M, 1.9M and 1.7M parameters. In the pivot's chat, as in OpenChat's, an answer begins inside a
token: `[/INST]` + `▁Hello`."""

SCALES = {
    # 90 KB of answers to learn from and 130 KB held out; the pivot has 1.0M parameters.
    "cpu": Scale(
        seeds=4,
        factor_seeds=3,
        corpus={"target_bytes": 220_000, "pivot_bytes": 300_000, "source_bytes": 1_500_000},
        designs=_DESIGNS,
        training=_TRAINING | {"num_train_epochs": 5},
        eval_fraction=0.6,
        # The one whose kind of tokenizer, byte-level BPE, is not the pivot's.
        factor_sources=("documentation",),
    ),
    # Not yet run. Models of 250M to 500M parameters with Mistral's, Qwen's and SmolLM's tokenizers,
    # from the hub, on all the text there is; an hour or a few on one GPU of 24 GB.
    "gpu": Scale(
        seeds=3,
        factor_seeds=3,
        corpus={"target_bytes": 3_000_000, "pivot_bytes": 10_000, "source_bytes": 10_000},
        models={
            "pivot": "Felladrin/TinyMistral-248M-Chat-v3",
            "qwen": "Qwen/Qwen2.5-0.5B-Instruct",
            "smollm": "HuggingFaceTB/SmolLM2-360M-Instruct",
        },
        training=_TRAINING | {"num_train_epochs": 3, "learning_rate": 2e-5, "bf16": True},
        max_length=1024,
        processes=1,
        device="auto",
        dtype="bfloat16",
    ),
    # For the tests only: the whole ladder in half a minute, with meaningless results.
    "pico": Scale(
        seeds=2,
        factor_seeds=1,
        corpus={"target_bytes": 16_000, "pivot_bytes": 16_000, "source_bytes": 16_000},
        chats=600,
        designs={
            name: {"vocabulary": 768, "hidden": 32, "layers": 1, "heads": 2, "epochs": 1}
            for name in MODELS
        },
        training=_TRAINING | {"max_steps": 2},
        variants=(*CORE, FACTORS[-1]),
    ),
}
