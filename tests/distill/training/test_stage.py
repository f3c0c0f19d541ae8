"""The train stage: what a target is, what it was trained on, resuming, and what is refused."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.alignment.stage import align_stages
from fusechat_distill.inputs.open import Inputs, open_inputs
from fusechat_distill.inputs.trl_settings import determining, fusion_config
from fusechat_distill.recipe.schema import Training, load_recipe
from fusechat_distill.scoring.stage import score_stages
from fusechat_distill.storage.processes import Processes
from fusechat_distill.storage.shards import Shards
from fusechat_distill.trainer.trainer import FusionTrainer
from fusechat_distill.training.card import model_card
from fusechat_distill.training.stage import TrainStage, train_stages
from tests.support import chain
from tests.support.chain import Silent, read_json


@pytest.fixture(scope="module")
def fused(tmp_path_factory, models) -> Inputs:
    """Scored, aligned and fused."""
    path = chain.recipe(tmp_path_factory.mktemp("train"), models, count=60)
    inputs = open_inputs(path)
    before = [*score_stages(inputs), *align_stages(inputs)]
    for stage in [*before, *(stage.fused for stage in train_stages(inputs))]:
        stage.run(Processes("cpu"), Silent())
    return inputs


@pytest.fixture
def make(fused, tmp_path):
    """A train stage in folders of its own, with `training:` keys of its own."""

    def made(name: str = "out", strategy: str = "pairwise", **training: Any) -> TrainStage:
        given = {"lambda": fused.recipe.training.clm_weight} | fused.recipe.training.sft
        fusion = fused.recipe.fusion.model_copy(update={"strategy": strategy})
        sections = {"training": Training(**given | training), "fusion": fusion}
        recipe = fused.recipe.model_copy(update=sections)
        (stage,) = train_stages(replace(fused, recipe=recipe))
        stage.folder = tmp_path / name / "targets" / stage.name
        stage.work = tmp_path / name / "training" / stage.name
        return stage

    return made


def made_of(stage: TrainStage) -> dict:
    return read_json(stage.folder / "fusechat_distill.json")


def refused(stage: TrainStage, message: str, kind: type = RequestError, count: int = 1) -> None:
    """The stage does not run, in this many processes, and says why."""
    processes = Processes("cpu")
    processes.count = count
    with pytest.raises(kind, match=message):
        stage.run(processes, Silent())


def run(stage: TrainStage) -> dict[str, torch.Tensor]:
    status = stage.run(Processes("cpu"), Silent())
    assert status.complete
    assert not stage.work.exists()
    assert [path.name for path in stage.folder.parent.iterdir()] == [stage.name]
    (file,) = stage.folder.glob("*.safetensors")
    return load_file(file)


def assert_publishable(folder: Path, but: str = "") -> None:
    """No file holds a path of this machine."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name != but:
            assert str(Path(tempfile.gettempdir())).encode() + b"/" not in path.read_bytes(), path


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_target_is_an_ordinary_checkpoint(make, models):
    stage = make()
    weights = run(stage)
    pivot = load_file(models / "pivot" / "model.safetensors")
    assert weights.keys() == pivot.keys()
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all(not torch.equal(weights[name], pivot[name]) for name in weights)

    tokenizer = AutoTokenizer.from_pretrained(stage.folder)
    chat = [{"role": "user", "content": "Say 1"}]
    original = AutoTokenizer.from_pretrained(models / "pivot")
    assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (stage.folder / name).read_bytes() == (models / "pivot" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(stage.folder)
    assert model.config.use_cache
    assert model.config.eos_token_id == 0
    assert not list(stage.folder.glob("*.bin"))

    card = (stage.folder / "README.md").read_text("utf-8")
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(metadata), "the hub knows no folder"
    assert "# neox\n" in text
    assert "`pivot`" in text
    assert "with λ = 0.5" in text
    made = made_of(stage)
    assert made["sources"] == {"neox": "neox"}
    assert_publishable(stage.folder)
    assert made["decisions"]["won"].keys() == {"pivot", "neox"}
    assert made["metrics"]["eval_loss"] == pytest.approx(
        (made["metrics"]["eval_clm_loss"] + made["metrics"]["eval_fusion_loss"]) / 2, abs=1e-4
    )
    status = stage.status()
    assert (status.done, status.total, status.unit) == (4, 4, "steps")
    assert status.details.fusion_loss > 0


def test_lambda_weighs_what_is_learnt(make):
    """The less λ, the closer to the distributions and the further from the labels."""
    plain = make("one", **{"lambda": 1.0})
    half, none = make("half", **{"lambda": 0.5}), make("none", **{"lambda": 0.0})
    weights = [run(stage) for stage in (plain, half, none)]
    losses = [made_of(s)["metrics"] for s in (plain, half, none)]
    fusion = [entry["eval_fusion_loss"] for entry in losses]
    assert fusion == sorted(fusion, reverse=True)
    assert fusion[2] < fusion[0] - 1e-3
    clm = [entry["eval_clm_loss"] for entry in losses]
    assert clm == sorted(clm)
    assert not torch.equal(weights[0]["lm_head.weight"], weights[1]["lm_head.weight"])


def test_the_baseline_is_the_pivot_trained_at_lambda_one(fused, make):
    one = run(make("one", **{"lambda": 1.0}))
    stage = make("sft", strategy="sft", **{"lambda": 0.3})
    assert stage.fused.run(Processes("cpu"), Silent()).complete
    assert_same(run(stage), one)
    made = made_of(stage)
    assert made["training"]["lambda"] == 1.0
    assert "the baseline" in (stage.folder / "README.md").read_text("utf-8")


def test_held_out_conversations_are_not_learnt_from(make, fused):
    stage = make()
    train, evaluation = stage._datasets()
    keys = fused.conversations.keys
    assert 0 < len(evaluation) == stage.fused.held_out() < 20
    assert len(train) + len(evaluation) == len(keys)
    assert set(train.column_names) == {"input_ids", "labels", "fusion_ids", "fusion_probs"}


def test_an_adapter_stays_one(make, models):
    stage = make(lora={"r": 4, "target_modules": "all-linear", "init_lora_weights": False})
    adapter = run(stage)
    assert all("lora_" in name for name in adapter)
    base = AutoModelForCausalLM.from_pretrained(models / "pivot")
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    merged = PeftModel.from_pretrained(base, stage.folder).merge_and_unload()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    delta = adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"] * (8 / 4)
    after = merged.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(after, before + delta)
    config = read_json(stage.folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(models / "pivot")
    assert_publishable(stage.folder, but="adapter_config.json")  # PEFT loads the base from there
    assert config["task_type"] == "CAUSAL_LM"
    card = (stage.folder / "README.md").read_text("utf-8")
    assert "library_name: peft" in card
    assert AutoTokenizer.from_pretrained(stage.folder).get_chat_template() == chain.CHATML


class StopError(Exception):
    pass


def stopped(stage: TrainStage, step: int, monkeypatch) -> None:
    """Run the stage, and break it at the end of a step."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise StopError

    original = stage._trainer

    def trainer(processes):
        made = original(processes)
        made.add_callback(Break())
        return made

    monkeypatch.setattr(stage, "_trainer", trainer)
    with pytest.raises(StopError):
        stage.run(Processes("cpu"), Silent())
    monkeypatch.undo()
    assert not stage.folder.exists()


@pytest.mark.parametrize("training", [{}, {"lora": {"r": 2, "target_modules": "all-linear"}}])
def test_a_stopped_training_goes_on_to_the_same_weights(make, monkeypatch, training):
    whole = run(make("whole", **training))
    stage = make("stopped", **training)
    assert stage.status().total is None
    stopped(stage, 1, monkeypatch)
    assert (stage.status().done, stage.status().total) == (0, 4)
    stopped(stage, 3, monkeypatch)
    assert (stage.status().done, stage.status().total) == (2, 4)
    # A checkpoint that a kill left half written is removed, not gone on from.
    torn = stage.work / "checkpoint-3"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert stage._last_checkpoint() == str(stage.work / "checkpoint-2")
    assert not torn.exists()
    assert_same(run(stage), whole)
    times = {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()}
    stage.run(Processes("cpu"), Silent())
    assert times == {path: path.stat().st_mtime_ns for path in stage.folder.iterdir()}


def test_what_decides_about_the_weights_is_not_changed_silently(make, monkeypatch):
    stage = make()
    stopped(stage, 3, monkeypatch)
    other = make(learning_rate=1e-3, logging_steps=1)
    (problem,) = other.problems()
    assert problem.startswith(
        f"training of target neox: {stage.work} was made with other settings or inputs "
    )
    assert "training.learning_rate was 0.01, is 0.001" in problem
    assert "logging" not in problem
    refused(other, "was made with other settings or inputs")
    assert make(logging_steps=1, report_to="none").problems() == []
    run(make(logging_steps=1))
    (problem,) = other.problems()
    assert problem.startswith(
        f"target neox: {stage.folder} was made with other settings or inputs "
    )
    refused(other, "was made with other settings or inputs")


@pytest.mark.parametrize("lost", ["optimizer.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_that_lost_a_file_is_not_gone_on_from(make, monkeypatch, lost):
    stage = make()
    stopped(stage, 3, monkeypatch)
    checkpoint = stage.work / "checkpoint-2"
    (checkpoint / lost).unlink()
    (checkpoint / "global_step2").mkdir()  # where DeepSpeed has it, which looks itself
    assert stage._last_checkpoint() == str(checkpoint)
    (checkpoint / "global_step2").rmdir()
    assert stage._last_checkpoint() is None


def test_a_target_that_lost_files_is_not_taken_for_one(make):
    stage = make()
    run(stage)
    (stage.folder / "README.md").unlink()  # people write their own
    assert stage.problems() == []
    (stage.folder / "model.safetensors").unlink()
    (stage.folder / "config.json").unlink()
    remedy = "lacks config.json, model.safetensors; copy them back, or delete it to train anew"
    assert stage.problems() == [f"target neox: {stage.folder} {remedy}"]
    assert not stage.status().complete
    refused(stage, "lacks config.json, model.safetensors")
    (stage.folder / "manifest.json").unlink()
    (problem,) = stage.problems()
    assert problem.startswith(f"target neox: {stage.folder} holds no manifest.json")
    refused(stage, "holds no manifest.json")


def test_a_training_that_never_began_is_begun_anew_otherwise(make, monkeypatch):
    stage = make()
    stopped(stage, 0, monkeypatch)
    assert stage.work.exists()
    other = make(learning_rate=1e-3)
    assert other.problems() == []
    with Shards.open(stage.work).exclusive(), pytest.raises(RequestError, match="another run"):
        other.run(Processes("cpu"), Silent())
    run(other)


def test_as_many_processes_go_on_as_began(make, monkeypatch):
    stage = make()
    stopped(stage, 3, monkeypatch)
    refused(stage, "was begun by 1 processes, this run has 2; start as", FusechatError, count=2)


def test_a_target_without_weights_is_none(make, monkeypatch):
    """As transformers leaves it under FSDP with SHARDED_STATE_DICT: no file, no word."""
    stage = make()
    save = FusionTrainer.save_model
    monkeypatch.setattr(
        FusionTrainer,
        "save_model",
        lambda self, folder, _internal_call=False: _internal_call and save(self, folder, True),
    )
    refused(stage, "set fsdp_state_dict_type: FULL_STATE_DICT", FusechatError)
    assert not stage.folder.exists()
    monkeypatch.undo()
    run(stage)


def test_nothing_is_trained_on_half_a_dataset(make, fused, tmp_path):
    stage = make()
    stage.fused.folder = tmp_path / "copy"
    shutil.copytree(fused.recipe.fused_folder / "neox", stage.fused.folder)
    next(stage.fused.folder.glob("*.parquet")).unlink()
    refused(stage, "fused neox: is not complete", FusechatError)
    assert not stage.work.exists()


def test_settings_are_trls_own_but_for_what_the_recipe_owns(tmp_path, models):
    def settings(training: dict[str, Any], **sections: Any):
        path = chain.recipe(tmp_path, models, training=training, **sections)
        return fusion_config(load_recipe(path), tmp_path / "work")

    config = settings(
        {"weight_decay": 0.25, "packing": True, "model_init_kwargs": {"dtype": "auto"}},
        pivot={"model": str(models / "pivot"), "revision": "v1", "dtype": "float16"},
    )
    assert (config.weight_decay, config.packing, config.max_length) == (0.25, True, 64)
    assert (config.clm_weight, config.output_dir) == (0.5, str(tmp_path / "work"))
    assert config.model_init_kwargs["dtype"] == "auto"
    assert config.model_init_kwargs["revision"] == "v1"
    assert config.model_init_kwargs["use_safetensors"] is True
    assert config.use_cpu, "scoring.device: cpu"
    assert not config.bf16
    plain = settings({})
    assert plain.model_init_kwargs["dtype"] == "float32"
    assert plain.save_total_limit == 1
    assert settings({"padding_free": True}).max_length is None
    half = settings({"fp16": True})
    assert (half.fp16, half.bf16) == (True, False)
    assert settings({"save_strategy": False}).save_strategy == "no", "an unquoted no"


def test_what_decides(tmp_path, models):
    training = {"logging_steps": 7, "save_steps": 3, "eval_strategy": "steps", "seed": 3}
    best = training | {"load_best_model_at_end": True}
    plain, with_best = (
        set(determining(load_recipe(chain.recipe(tmp_path, models, training=keys))))
        for keys in (training, best)
    )
    assert {"seed"} == plain & set(training)
    assert {"save_steps", "eval_strategy"} <= with_best


def test_all_that_training_would_refuse_is_said_before_anything_is_scored(tmp_path, models):
    path = chain.recipe(
        tmp_path,
        models,
        training={
            "label_smoothing_factor": 0.1,
            "loss_type": "dft",
            "lora": {"target_modules": ["q_proj", "lm_head"]},
        },
        merge={"merge_method": "varmm", "parameters": {}, "dtype": "int4"},
    )
    with pytest.raises(RequestError) as caught:
        open_inputs(path)
    starts = [problem.split(";")[0][:60] for problem in caught.value.problems]
    assert [start.split(" ")[0] for start in starts] == [
        "training:",
        "training:",
        "training.lora:",
        "merge.dtype:",
        "merge.merge_method:",
    ]
    assert "did you mean `varm`" in caught.value.problems[-1]
    assert not (tmp_path / "out").exists()


LORA_TARGETS = "training.lora: target_modules: no module of the model is called q_prj"
GRANULARITY = (
    "merge.parameters.granularity: should be 'matrix', 'module', 'layer', 'model' or 'element', "
    "found 'matrx'"
)
FILTERED = [{"filter": "mlp", "value": [0.5, "x"]}, 1]
LAYERS = {"target_modules": "all-linear", "layers_to_transform": [0]}


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("lora", {"target_modules": ["q_prj"]}, "training.lora: Target modules"),
        ("lora", {"target_modules": ".*("}, "training.lora: missing )"),
        ("lora", {"target_modules": ["q_proj", "q_prj"]}, LORA_TARGETS),
        ("lora", {"modules_to_save": ["embed"]}, "modules_to_save: no module of the model is call"),
        ("lora", LAYERS, "`layers_to_transform` cannot be used when `target_modules` is a str"),
        ("training", {"learning_rat": 1.0}, "did you mean `learning_rate`"),
        ("training", {"optim": "adamx"}, "is not a valid OptimizerNames"),
        ("training", {"trust_remote_code": True}, "training.trust_remote_code: remove it"),
        ("training", {"save_only_model": True}, "training.save_only_model: remove it"),
        ("training", {"max_steps": "three"}, "should be a valid integer, found 'three'"),
        ("training", {"learning_rate": "small"}, "learning_rate: should be a valid number"),
        ("training", {"learning_rate": -1.0}, "learning_rate: should be a finite number, 0 or"),
        ("training", {"num_train_epochs": None}, "num_train_epochs: should be a valid number"),
        ("training", {"num_train_epochs": 0}, "num_train_epochs: should be greater than 0"),
        ("training", {"per_device_train_batch_size": -4}, "size: should be greater than 0"),
        ("training", {"report_to": "wandbb"}, "training.report_to: wandbb is not supported"),
        ("training", {"report_to": "codecarbon"}, "training.report_to: CodeCarbonCallback req"),
        ("training", {"optim": "galore_adamw"}, "training.optim: You need to install `galore"),
        ("training", {"fsdp": "full_shrad"}, "training: Unknown `fsdp` option: full_shrad"),
        ("model_init_kwargs", {"dtype": "zz"}, "training.model_init_kwargs: "),
        ("model_init_kwargs", {"attn_implementation": "flash_9"}, "training.model_init_kwargs: "),
        ("merge", {"parameters": {"granularty": "layer"}}, "did you mean `granularity`"),
        ("merge", {"parameters": {"granularity": "matrx"}}, GRANULARITY),
        ("merge", {"parameters": {"lambda": FILTERED}}, "parameters.lambda: should be a valid num"),
        ("merge", {"parameters": {"granularity": [{"valu": 1}]}}, "merge: 10 validation errors"),
        ("merge", {"merge_method": "slerp"}, "merge.parameters: slerp needs `t`"),
        ("pivot", {"training": {"seed": 1}}, "pivot (./none): there is no such folder"),
    ],
)
def test_settings_that_no_training_can_begin_with(tmp_path, models, section, keys, message):
    """`lora` and `model_init_kwargs` stand below `training`; `pivot` names no folder."""
    sections = {"training": {section: keys}}
    if section in ("training", "merge"):
        sections = {section: keys}
    elif section == "pivot":
        sections = {"pivot": "./none"} | keys
    with pytest.raises(RequestError) as caught:
        open_inputs(chain.recipe(tmp_path, models, **sections))
    assert any(message in problem for problem in caught.value.problems)


def test_too_little_disk_for_a_checkpoint_is_found_first(tmp_path, models, monkeypatch):
    (stage,) = train_stages(open_inputs(chain.recipe(tmp_path, models)))
    parameters = sum(w.numel() for w in load_file(models / "pivot" / "model.safetensors").values())
    # The target, and two checkpoints of weights and both moments, in float32.
    needed = 4 * parameters * (1 + 2 * 3)
    for free, found in ((needed, 0), (needed - 1, 1)):
        usage = shutil._ntuple_diskusage(10 * needed, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        problems = stage.problems()
        assert len(problems) == found
    assert problems[0].startswith("target neox: its weights and checkpoints will take about ")
    lora = chain.recipe(tmp_path, models, training={"lora": {"target_modules": "all-linear"}})
    (stage,) = train_stages(open_inputs(lora))
    assert stage.problems() == []


def test_there_must_be_something_to_learn_from_and_to_evaluate_on(tmp_path, models):
    def stage(share: float) -> TrainStage:
        dataset = {"path": str(tmp_path / "chats.jsonl"), "eval_fraction": share}
        training = {"eval_strategy": "epoch"}
        path = chain.recipe(tmp_path, models, count=3, dataset=dataset, training=training)
        return train_stages(open_inputs(path))[0]

    assert stage(0.0).problems() == [
        "training.eval_strategy: no conversation is held out to evaluate on; raise "
        "dataset.eval_fraction"
    ]
    all_held_out = stage(0.999999)
    assert all_held_out.fused.problems() == [
        "dataset.eval_fraction: holds out all 3 conversations; lower it, or add some"
    ]
    assert np.isfinite(all_held_out.fused.width)


def test_what_lies_under_a_targets_name_is_left_alone(make, tmp_path):
    stage = make()
    stage.folder.mkdir(parents=True)
    assert stage.problems() == [], "an empty folder is in nobody's way"
    (stage.folder / "model.safetensors").write_text("mine")
    (problem,) = stage.problems()
    assert "holds no manifest.json that can be read; move it away" in problem


def test_a_link_to_elsewhere_is_not_written_through(make, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    stage = make(metric_for_best_model="eval_loss", **evaluated)
    stage.work.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (stage.work / "trainer_state.json").symlink_to(victim)
    (stage.work / "runs" / "today").mkdir(parents=True)
    (stage.work / "runs" / "today" / "events").write_text("what `report_to` wrote")
    run(stage)
    assert victim.read_text() == "mine"
    state = read_json(stage.folder / "trainer_state.json")
    assert state["best_model_checkpoint"].startswith("checkpoint-")
    assert not (stage.folder / "runs").exists()
    runs = stage.inputs.recipe.output_folder / "report" / "runs" / stage.name
    assert (runs / "today" / "events").read_text() == "what `report_to` wrote"


def test_the_card_of_a_target_of_models_on_the_hub(make):
    made_of = make().made_of({})
    dataset = made_of["dataset"] | {"path": "org/chats"}
    training = made_of["training"] | {"deepspeed": "~/me/zero.json", "hub_url": "https://hub/me/x"}
    card = model_card(made_of | {"pivot": "org/pivot", "dataset": dataset, "training": training})
    assert "deepspeed: zero.json" in card
    assert "hub_url: https://hub/me/x" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("org/pivot", ["org/chats"])
    assert "`org/pivot`, fine-tuned on" in card
    assert "held-out" not in card
