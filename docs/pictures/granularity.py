"""Draws granularity.png: the merge weights that varm gives at each granularity, of a real merge.

python docs/pictures/granularity.py [PNG]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusechat_merge import merge, plan
from fusechat_merge.engine.analysis import analyze
from fusechat_merge.methods.units import GRANULARITIES
from fusechat_merge.results.report import place_of

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 24, 32, 40
PATCH = 24  # how many rows and columns of a tensor are drawn
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{at}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            found[f"{at}.mlp.{name}.weight"] = (INNER, HIDDEN)
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def moved(base: dict[str, Tensor], which: int) -> dict[str, Tensor]:
    """A target. Target 0 moves the early layers and attention more; no one moves the last norm."""
    random = torch.Generator().manual_seed(1 + which)
    result = {}
    for name, value in base.items():
        layer, kind = place_of(name)
        depth = 0.5 if layer is None else layer / (LAYERS - 1)
        scale = 0.6 + (1 - depth if which == 0 else depth)
        scale *= 1.5 if ("attn" in kind) == (which == 0) else 1.0
        scale *= float(torch.empty(()).uniform_(0.7, 1.4, generator=random))
        scale *= kind != "model.norm"
        noise = torch.empty_like(value).normal_(generator=random)
        result[name] = value + 1e-2 * scale * noise
    return result


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def patch(values: Tensor | float) -> np.ndarray[Any, Any]:
    """A tensor's first rows and columns, or one value all over; NaN is drawn grey."""
    if isinstance(values, Tensor) and values.ndim == 2:
        return values[:PATCH, :PATCH].numpy()
    if isinstance(values, Tensor):
        return np.repeat(values.numpy()[None, :PATCH], PATCH, 0)
    return np.full((PATCH, PATCH), values)


def measured(folder: Path) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """{granularity: {tensor: what is drawn of the first target's weights}}."""
    torch.manual_seed(0)
    base = {name: 0.1 * torch.randn(shape) for name, shape in shapes().items()}
    models = [base, moved(base, 0), moved(base, 1)]
    for name, tensors in zip(("pivot", "a", "b"), models, strict=True):
        save(folder / name, tensors)
    found = {}
    for granularity in GRANULARITIES:
        config = {
            "merge_method": "varm",
            "base_model": str(folder / "pivot"),
            "models": [{"model": str(folder / name)} for name in ("a", "b")],
            "parameters": {"granularity": granularity},
        }
        if granularity == "element":
            merge(config, folder / "merged")
            merged = load_file(folder / "merged" / "model.safetensors")
            drawn = {}
            for name, value in merged.items():
                pivot, a, b = (tensors[name] for tensors in models)
                # merged = pivot + W (a − pivot) + (1 − W) (b − pivot)
                drawn[name] = patch((value - b) / (a - b) if bool((a != pivot).any()) else np.nan)
            found[granularity] = drawn
            continue
        units = analyze(plan(config)).by_tensor()
        found[granularity] = {
            name: patch(unit.weights[0] if any(unit.weights) else np.nan)
            for name, unit in units.items()
        }
    return found


def draw(found: dict[str, dict[str, np.ndarray[Any, Any]]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(shapes())
    inside = list(dict.fromkeys(place_of(n)[1] for n in names if place_of(n)[0] is not None))
    outside = [n for n in names if place_of(n)[0] is None]
    rows = [[f"model.layers.{layer}.{kind}.weight" for kind in inside] for layer in range(LAYERS)]
    figure, axes = plt.subplots(
        2,
        len(found),
        figsize=(13, 4.6),
        layout="constrained",
        gridspec_kw={"height_ratios": [LAYERS, 1]},
    )
    image = None
    for column, (granularity, drawn) in enumerate(found.items()):
        grids = [
            np.block([[drawn[name] for name in row] for row in rows]),
            np.block([[drawn[name] for name in outside]]),
        ]
        for axis, grid, labels in zip(
            axes[:, column], grids, (inside, [place_of(n)[1] for n in outside]), strict=True
        ):
            image = axis.imshow(
                np.ma.masked_invalid(np.clip(grid, 0, 1)),
                vmin=0,
                vmax=1,
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
            )
            axis.set_facecolor("0.8")
            for edge in range(PATCH, grid.shape[1], PATCH):
                axis.axvline(edge - 0.5, color="white", linewidth=0.4)
            for edge in range(PATCH, grid.shape[0], PATCH):
                axis.axhline(edge - 0.5, color="white", linewidth=0.4)
            middles = [PATCH * i + PATCH / 2 for i in range(len(labels))]
            axis.set_xticks(
                middles, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=6.5
            )
            axis.tick_params(length=0)
            axis.set_yticks([])
        axes[0, column].set_title(granularity, fontsize=11)
    middles = [PATCH * i + PATCH / 2 for i in range(LAYERS)]
    axes[0, 0].set_yticks(middles, [str(n) for n in range(LAYERS)], fontsize=8)
    axes[0, 0].set_ylabel("layer")
    axes[1, 0].set_ylabel("outside\nlayers", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=axes, label="weight W of target A", shrink=0.8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    path = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_suffix(".png")
    with tempfile.TemporaryDirectory() as folder:
        draw(measured(Path(folder)), path)


if __name__ == "__main__":
    main()
