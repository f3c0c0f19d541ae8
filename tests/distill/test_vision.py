"""Vision-language models as pivots and sources for text: scored, trained and saved whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fusechat_distill.inputs.models import auto_class, open_model
from fusechat_distill.recipe.schema import Model
from fusechat_distill.scoring.engine import Request
from fusechat_distill.scoring.transformers_engine import TransformersScorer
from tests.support import chain
from tests.support.families import FAMILIES, Family

MODELS = [
    "LLaVA", "Qwen2.5-VL", "Qwen3-VL", "Gemma 3 with vision", "Qwen3.5", "Qwen3.5-MoE", "Kimi K2.5",
    "Mistral 3", "GLM-4.5V",
]  # fmt: skip
SPECIALS = ["<|im_end|>", "<|im_start|>", "<image>", "<video>", "<begin>", "<end>"]
IDS = {"image_token_id": 2, "image_token_index": 2, "video_token_id": 3,
       "vision_start_token_id": 4, "vision_end_token_id": 5}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """A pico model of a family, with a tokenizer of its vocabulary."""
    tokenizer = chain.tokenizer(300, SPECIALS, chain.CHATML)
    made = FAMILIES[name]
    text = made.settings["text_config"] | {"vocab_size": len(tokenizer), "eos_token_id": 0}
    ids = {key: value for key, value in IDS.items() if key in made.settings}
    torch.manual_seed(0)
    model = Family(made.model, made.config, made.settings | ids | {"text_config": text}).build()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor"}'
    )
    return folder


@pytest.fixture(autouse=True)
def without_mistral_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests have it for its data alone, without the packages that it imports."""
    module = transformers.models.auto.tokenization_auto
    monkeypatch.setattr(module, "is_mistral_common_available", lambda: False)
    monkeypatch.setattr(module, "_use_mistral_format", lambda *args, **kwargs: False)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_models_own(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    files = open_model(Model(model=str(folder)))
    scorer = TransformersScorer.load(str(folder), files.token_ids, top_k=5)
    assert type(scorer.model).__name__ == FAMILIES[name].model
    ids = np.arange(10, 22)
    request = Request(ids, np.arange(3, 11))
    (scores,) = scorer.score([request])
    with torch.no_grad():
        logits = scorer.model(input_ids=torch.from_numpy(ids)[None]).logits[0, 3:11]
    expected = logits[:, : len(files.token_ids)].double().log_softmax(-1)
    top = expected.topk(5)
    assert (scores.ids == top.indices.numpy()).all()
    assert np.allclose(scores.logprobs, top.values.numpy(), atol=1e-4)
    assert np.allclose(scores.gold_logprobs, expected[range(8), ids[4:12]].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "lora", [None, {"r": 2, "target_modules": "all-linear"}], ids=["whole", "lora"]
)
@pytest.mark.parametrize("name", MODELS)
def test_targets_are_whole_models_with_the_pivots_tower(
    name: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    chain.save_models(models)
    pivot, source = save(name, models / "vlm"), models / "neox"
    training = {"lora": lora} | ({"router_aux_loss_coef": 0.0} if name == "GLM-4.5V" else {})
    sections = {"pivot": str(pivot), "sources": [str(source)], "training": training}
    chain.printed("run", chain.recipe(tmp_path, models, count=40, **sections))
    target = tmp_path / "out" / "targets" / "neox"
    before = load_file(pivot / "model.safetensors")
    outside = [n for n in before if any(part in n for part in ("vis", "projector", "merger"))]
    assert outside
    if lora:
        trained = load_file(target / "adapter_model.safetensors")
        assert trained
        assert not any("vis" in key or "projector" in key for key in trained)
        return
    after = load_file(target / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in outside)
    assert not all(torch.equal(after[n], before[n]) for n in before)
    assert (target / "preprocessor_config.json").read_bytes() == (
        pivot / "preprocessor_config.json"
    ).read_bytes()
    load = getattr(transformers, FAMILIES[name].model).from_pretrained
    _, report = load(target, output_loading_info=True)
    assert not any(report.values()), report


def test_a_vision_language_source_and_its_processors_template(tmp_path: Path) -> None:
    models = tmp_path / "models"
    chain.save_models(models)
    source = save("Qwen3-VL", models / "vlm")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": chain.CHATML}))
    recipe = chain.recipe(tmp_path, models, count=40, sources=[str(source)])
    chain.printed("run", recipe)
    assert (tmp_path / "out" / "targets" / "vlm" / "model.safetensors").is_file()
    assert auto_class(open_model(Model(model=str(source))).config) is (
        transformers.AutoModelForImageTextToText
    )


def test_a_class_that_cannot_be_trained_is_refused_before_any_work(tmp_path: Path) -> None:
    models = tmp_path / "models"
    chain.save_models(models)
    pivot = save("Llama 4", models / "vlm")
    told = chain.refused("validate", chain.recipe(tmp_path, models, pivot=str(pivot)))
    assert "Llama4ForConditionalGeneration has no backbone that TRL's loss can call" in told
    pivot = save("GLM-4.5V", models / "glm")
    told = chain.refused("validate", chain.recipe(tmp_path, models, pivot=str(pivot)))
    assert "TRL can't balance the experts of a glm4v_moe model; set it to 0.0" in told
