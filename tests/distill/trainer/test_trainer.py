"""FusionTrainer against losses written out densely, and against TRL's SFTTrainer."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fusechat_common.errors import RequestError
from fusechat_distill.trainer import trainer as trainer_module
from fusechat_distill.trainer.trainer import DataCollatorForFusion, FusionConfig, FusionTrainer
from tests.support import pico_training as pico

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 20},
    "checkpointed": {"gradient_checkpointing": True},
}


def train(
    folder: Any, net: Any = None, dataset: Any = None, *, resume: Any = None, **options: Any
) -> tuple[Any, pico.Recorder]:
    """The trained trainer of `pico.trainer`, and what was recorded."""
    recorder = pico.Recorder()
    trainer = pico.trainer(folder, net, dataset, **options)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def logged(recorder: pico.Recorder, key: str) -> list[float]:
    return [log[key] for log in recorder.logs if key in log]


def assert_terms_add_up(log: dict[str, float], clm_weight: float, tolerance: float = 1e-6) -> None:
    terms = clm_weight * log["clm_loss"] + (1 - clm_weight) * log["fusion_loss"]
    assert log["loss"] == pytest.approx(terms, rel=tolerance)


def assert_same_gradients(
    ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 5e-6
) -> None:
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        size = wanted[name].norm()
        assert size > 0 or gradient.norm() == 0, name
        assert (gradient - wanted[name]).norm() <= tolerance * size + 1e-9, name


def same_weights(ours: Any, theirs: Any) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# ---------------------------------------------------------------- the loss and its gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", pico.CONFIGS)
def test_every_gradient_equals_the_dense_reference(tmp_path, kind, layout):
    net, dataset = pico.model(kind), pico.rows()
    wanted = pico.dense_gradients(copy.deepcopy(net), dataset, clm_weight=0.6)
    with torch.no_grad():
        clm, fusion, count = pico.dense_losses(net, dataset)
    _, recorder = train(tmp_path, net, dataset, clm_weight=0.6, **LAYOUTS[layout])
    assert_same_gradients(recorder.gradients[0], wanted)
    log = recorder.logs[0]
    assert log["clm_loss"] == pytest.approx(clm.item() / count, rel=1e-5)
    assert log["fusion_loss"] == pytest.approx(fusion.item() / count, rel=1e-5)
    assert_terms_add_up(log, 0.6)


@pytest.mark.parametrize("how", ["labelled positions only", "prepared by the user"])
def test_the_same_is_learnt(tmp_path, monkeypatch, how):
    """As TRL scores positions where Triton runs; here its kernel's stand-in takes them without it.
    And where the user has prepared the dataset."""
    changes: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    if how == "labelled positions only":
        monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
        changes = {}
    _, recorder = train(tmp_path, clm_weight=0.4, **changes)
    wanted = pico.dense_gradients(pico.model(), pico.rows(), clm_weight=0.4)
    assert_same_gradients(recorder.gradients[0], wanted)
    assert_terms_add_up(recorder.logs[0], 0.4)


WRAPPED = {"packing": True, "packing_strategy": "wrapped", "max_length": 10}


@pytest.mark.parametrize("clm_weight", [0.0, 0.9])
def test_wrapped_packing_equals_the_dense_reference_on_its_own_rows(tmp_path, clm_weight):
    # Without a prompt the first label of every document counts once it stands inside a row, and
    # has no distribution: what its row holds belongs to no prediction.
    trainer, recorder = train(tmp_path, None, pico.rows(prompt=0), clm_weight=clm_weight, **WRAPPED)
    own = []
    for row in trainer.train_dataset:
        shape = (len(row["input_ids"]), -1)
        nested = {name: row[name].reshape(shape).tolist() for name in TARGETS}
        own.append({"input_ids": row["input_ids"], "labels": row["labels"]} | nested)
    assert [len(row["input_ids"]) for row in own] == [10, 10, 10, 3]
    wanted = pico.dense_gradients(pico.model(), own, clm_weight)
    assert_same_gradients(recorder.gradients[0], wanted)
    for start in (9, 14, 26):
        assert not any(own[start // 10]["fusion_probs"][start % 10])


@pytest.mark.parametrize("layout", ["padded", "bfd"])
@pytest.mark.parametrize(
    ("modules", "saved"),
    [
        pytest.param(["q_proj", "down_proj"], None, id="frozen head"),
        pytest.param(["q_proj", "down_proj"], ["lm_head"], id="trained head"),
        pytest.param(["embed_tokens"], None, id="untied embeddings"),
    ],
)
def test_lora_gradients_equal_the_dense_reference(tmp_path, layout, modules, saved):
    config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False, modules_to_save=saved)
    torch.manual_seed(0)
    net, dataset = get_peft_model(pico.model(), config).eval(), pico.rows()
    wanted = pico.dense_gradients(copy.deepcopy(net), dataset, clm_weight=0.3)
    assert any("lm_head" in name for name in wanted) == bool(saved)
    _, recorder = train(tmp_path, net, dataset, clm_weight=0.3, **LAYOUTS[layout])
    assert_same_gradients(recorder.gradients[0], wanted)


def test_a_peft_config_trains_only_the_adapter(tmp_path):
    net = pico.model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    given = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer, recorder = train(tmp_path, net, clm_weight=0.5, max_steps=2, given=given)
    assert all("lora" in name for name in recorder.gradients[0])
    base = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        stored = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(stored, value), name
    # At the start B is zero and takes all of the gradient; one step later A has its own.
    assert all(g.norm() > 0 for g in recorder.gradients[1].values())


@pytest.mark.parametrize("layout", [*LAYOUTS, "wrapped"])
def test_at_weight_one_it_is_trls_trainer_step_for_step(tmp_path, layout):
    changes = LAYOUTS.get(layout, WRAPPED)
    changes = changes | {"max_steps": 3, "max_grad_norm": 1.0, "num_train_epochs": 3}
    dataset = pico.rows((9, 5, 12, 7, 11, 8, 3))
    plain = dataset.select_columns(PLAIN)
    theirs = pico.model()
    _, sft = train(tmp_path, theirs, plain, kind=SFTTrainer, **changes)
    for data in (plain, dataset):
        net = pico.model()
        _, recorder = train(tmp_path, net, data, clm_weight=1.0, **changes)
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert logged(recorder, key) == logged(sft, key)
        assert same_weights(net, theirs)


def test_bf16_autocast_trains_float32_weights(tmp_path):
    wanted = pico.dense_gradients(pico.model(), pico.rows(), clm_weight=0.5)
    _, recorder = train(tmp_path, clm_weight=0.5, bf16=True)
    assert all(gradient.dtype == torch.float32 for gradient in recorder.gradients[0].values())
    assert_same_gradients(recorder.gradients[0], wanted, tolerance=0.05)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **pico._SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        router_aux_loss_coef=0.5,
    )
    _, recorder = train(tmp_path, AutoModelForCausalLM.from_config(config), clm_weight=0.25)
    log = recorder.logs[0]
    terms = 0.25 * log["clm_loss"] + 0.75 * log["fusion_loss"]
    assert log["aux_loss"] > 0
    assert log["loss"] == pytest.approx(terms + 0.5 * log["aux_loss"], rel=1e-5)


# ---------------------------------------------------------------- metrics and evaluation


@pytest.mark.parametrize("layout", ["padded", "accumulated"])
def test_metrics_describe_the_targets(tmp_path, layout):
    entropies, tokens = [], 0
    for row in pico.rows():
        full = pico.dense_targets(row)
        for t in range(1, len(row["labels"])):
            if row["labels"][t] == -100:
                continue
            tokens += 1
            if sum(row["fusion_probs"][t]) > 0:
                entropies.append(torch.special.entr(full[t].clamp(min=0)).sum().item())
    _, recorder = train(tmp_path, **LAYOUTS[layout])
    log = recorder.logs[0]
    assert log["target_share"] == pytest.approx(len(entropies) / tokens)
    assert log["target_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_logged_terms_are_means_over_the_steps_they_stand_for(tmp_path):
    dataset = pico.rows((9, 5, 12, 7, 11, 8))
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3}
    _, each = train(tmp_path, None, dataset, **changes)
    _, once = train(tmp_path, None, dataset, **changes, logging_strategy="epoch")
    for key in ("loss", "clm_loss", "fusion_loss"):
        values = logged(each, key)
        assert len(values) == 3
        assert once.logs[0][key] == pytest.approx(sum(values) / 3, rel=1e-6)


@pytest.mark.parametrize("by", ["process", "micro-batch"])
def test_logged_terms_add_up_to_the_logged_loss(tmp_path, by):
    """However `Trainer` divides it: by the tokens of this process alone, or, for models that don't
    take their number, by those of each micro-batch."""
    trainer = pico.trainer(
        tmp_path,
        clm_weight=0.3,
        average_tokens_across_devices=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    trainer.model_accepts_loss_kwargs = by == "process"
    trainer.train()
    assert_terms_add_up(trainer.state.log_history[0], 0.3, tolerance=1e-4)


def test_evaluation_reports_the_objective_and_the_plain_loss(tmp_path):
    held_out = pico.rows((8, 10, 4, 6, 9), seed=3)
    plain = held_out.select_columns(PLAIN)
    size = {"per_device_eval_batch_size": 2}  # the last batch is short
    sft = pico.trainer(
        tmp_path,
        None,
        pico.rows().select_columns(PLAIN),
        kind=SFTTrainer,
        given={"eval_dataset": plain},
        **size,
    )
    wanted = pytest.approx(sft.evaluate()["eval_loss"], rel=1e-6)
    given = {"eval_dataset": {"fused": held_out, "plain": plain}}
    trainer = pico.trainer(tmp_path, clm_weight=0.25, given=given, **size)
    both = trainer.evaluate()
    for key in ("eval_plain_loss", "eval_plain_clm_loss", "eval_fused_clm_loss"):
        assert both[key] == wanted
    objective = 0.25 * both["eval_fused_clm_loss"] + 0.75 * both["eval_fused_fusion_loss"]
    assert both["eval_fused_loss"] == pytest.approx(objective, rel=1e-6)
    assert both["eval_fused_fusion_loss"] != pytest.approx(both["eval_plain_loss"], rel=1e-3)
    assert "eval_plain_fusion_loss" not in both
    # A dataset that comes with the call is prepared like one that came with the trainer.
    single = trainer.evaluate(held_out)
    assert single["eval_loss"] == pytest.approx(both["eval_fused_loss"], rel=1e-6)
    assert single["eval_clm_loss"] == wanted


def test_evaluation_during_training_does_not_disturb_it(tmp_path):
    changes = {"clm_weight": 0.5, "max_steps": 3}
    plain_net, net = pico.model(), pico.model()
    _, plain = train(tmp_path, plain_net, **changes)
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    given = {"eval_dataset": pico.rows(seed=5)}
    _, recorder = train(tmp_path, net, given=given, **evaluating, **changes)
    for key in ("loss", "clm_loss", "fusion_loss", "target_share"):
        assert logged(recorder, key) == logged(plain, key)
    assert len(logged(recorder, "eval_clm_loss")) == 3
    assert same_weights(net, plain_net)


def test_resuming_from_a_checkpoint_gives_the_same_weights(tmp_path):
    dataset = pico.rows((9, 5, 12, 7, 11, 8, 6, 10))
    changes = {"clm_weight": 0.5, "max_steps": 4, "per_device_train_batch_size": 2}
    straight = pico.model()
    train(tmp_path / "straight", straight, dataset, **changes)
    saving = {**changes, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path / "broken", pico.model(), dataset, **saving)
    resumed = pico.model(seed=1)
    checkpoint = str(tmp_path / "broken" / "checkpoint-2")
    train(tmp_path / "broken", resumed, dataset, resume=checkpoint, **saving)
    assert same_weights(resumed, straight)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "broken" / "checkpoint-4")
    assert same_weights(reloaded, straight)


# ---------------------------------------------------------------- columns


PLAIN = ["input_ids", "labels"]
TARGETS = ["fusion_ids", "fusion_probs"]


def marked(lengths: list[int], width: int = 2) -> Dataset:
    """Rows whose targets repeat their label, so that a shift shows."""
    rows, counter = [], 0
    for length in lengths:
        ids = [3 + (counter + i) % (pico.VOCABULARY - 3) for i in range(length)]
        counter += length
        labels = [-100, *ids[1:]]
        targets = [[token] * width for token in ids], [[1 / width] * width for _ in ids]
        rows.append(dict(zip((*PLAIN, *TARGETS), (ids, labels, *targets), strict=True)))
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 7},
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"packing": True, "max_length": 16},
        {"packing": True, "max_length": 16, "packing_strategy": "bfd_split"},
        {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
        {"packing": True, "max_length": 16, "shuffle_dataset": True},
    ],
    ids=str,
)
def test_all_columns_are_cut_and_packed_as_trl_cuts_and_packs(tmp_path, changes):
    # More rows than the blocks that datasets are processed in.
    dataset = marked([1 + (7 * i) % 23 for i in range(1300)])
    ours = pico.trainer(tmp_path, None, dataset, **changes).train_dataset
    plain = dataset.select_columns(PLAIN)
    theirs = pico.trainer(tmp_path, None, plain, kind=SFTTrainer, **changes).train_dataset
    assert len(ours) == len(theirs)
    for own, row in zip(ours, theirs, strict=True):
        for column, values in row.items():
            assert own[column] == values
        entries = own["fusion_ids"].reshape(len(own["labels"]), 2)
        mass = own["fusion_probs"].reshape(len(own["labels"]), 2).sum(-1)
        for t, label in enumerate(own["labels"]):
            assert mass[t] == (label != -100)
            assert label == -100 or (entries[t] == label).all()


def test_the_collator_pads_and_joins():
    assert doctest.testmod(trainer_module).failed == 0
    examples = [
        {
            "input_ids": list(range(n)),
            "labels": list(range(n)),
            "fusion_ids": [[t, t + 1] for t in range(n)],
            "fusion_probs": [t / 10 for t in range(n) for _ in range(2)],  # flat
        }
        for n in (3, 2)
    ]
    padded = DataCollatorForFusion(pad_token_id=0, pad_to_multiple_of=4)(examples)
    assert padded["fusion_ids"].dtype == torch.int32
    assert padded["fusion_probs"].dtype == torch.float32
    assert padded["input_ids"].shape == (2, 4)
    assert padded["fusion_ids"].tolist() == [
        [[0, 1], [1, 2], [2, 3], [0, 0]],
        [[0, 1], [1, 2], [0, 0], [0, 0]],
    ]
    joined = DataCollatorForFusion(pad_token_id=0, padding_free=True)(examples)
    assert joined["input_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert joined["fusion_ids"].tolist() == [[[0, 1], [1, 2], [2, 3], [0, 1], [1, 2]]]
    plain = [{"input_ids": [1, 2], "labels": [1, 2]}]
    assert "fusion_ids" not in DataCollatorForFusion(pad_token_id=0)(plain)


def test_flat_targets_are_cut_as_nested_ones(tmp_path):
    def prepared(dataset: Dataset, **changes: Any) -> Any:
        return pico.trainer(tmp_path, None, dataset, **{"max_length": 6} | changes).train_dataset

    nested = pico.rows()
    columns = nested.to_dict()
    for column in TARGETS:
        columns[column] = [[x for entries in row for x in entries] for row in columns[column]]
    once = prepared(nested)
    # Rows that were prepared before, as `evaluate(trainer.eval_dataset)` hands them in, stay.
    for again in (prepared(Dataset.from_dict(columns)), prepared(once)):
        assert again.with_format(None).to_dict() == once.with_format(None).to_dict()
    assert len(once[0]["fusion_ids"]) == 18
    packing = {"packing": True, "max_length": 20}
    packed = prepared(nested, **packing)
    assert prepared(packed, **packing) is packed
    columns["fusion_ids"][1].pop()
    with pytest.raises(ValueError, match="has 14 entries but `input_ids` has 5, for which 15 are"):
        prepared(Dataset.from_dict(columns))


def test_a_collator_of_ones_own_is_kept(tmp_path):
    class Counting(DataCollatorForFusion):
        calls = 0

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            Counting.calls += 1
            return super().__call__(*arguments, **options)

    train(tmp_path, given={"data_collator": Counting(pad_token_id=0)})
    assert Counting.calls


def test_without_arguments_the_output_is_called_after_the_model(tmp_path, monkeypatch):
    class OnCpu(FusionConfig):
        def __init__(self, folder: str) -> None:
            super().__init__(folder, use_cpu=True, bf16=False)  # the defaults need a GPU

    monkeypatch.setattr(trainer_module, "FusionConfig", OnCpu)
    monkeypatch.chdir(tmp_path)
    pico.model().save_pretrained(tmp_path / "pico")
    given = {"train_dataset": pico.rows(), "processing_class": pico.tokenizer()}
    trainer = FusionTrainer(str(tmp_path / "pico"), **given)
    assert trainer.args.output_dir == "pico-Fusion"
    assert trainer.args.clm_weight == 0.9


def test_probabilities_survive_a_cast_of_the_inputs(tmp_path):
    # DeepSpeed and FSDP cast floating-point inputs of the forward to bf16.
    trainer = pico.trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    sent = trainer._prepare_inputs(batch)["fusion_probs"]
    assert not sent.is_floating_point()
    assert torch.equal(trainer_module._floats(sent), batch["fusion_probs"])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("fusion_probs", [0.5, math.nan, 0.1], "row 2, token 4: a probability is negative or not"),
        ("fusion_probs", [0.5, -0.25, 0.1], "row 2, token 4: a probability is negative or not"),
        ("fusion_probs", [0.5, 0.5, 0.1], "row 2, token 4: the probabilities add up to more"),
        ("fusion_ids", [1, 61, 3], "outside the model's vocabulary of 61"),
        ("fusion_ids", [1, -1, 3], "outside the model's vocabulary of 61"),
        ("fusion_ids", [1, 2], "every token needs the same number, 3"),
        ("fusion_probs", None, "row 2: `fusion_probs` has 11 entries but `input_ids` has 12"),
    ],
)
def test_a_bad_row_is_named(tmp_path, column, value, message):
    columns = pico.rows().to_dict()
    columns["fusion_probs"][2][4] = [0.2, 0.2, 0.2]
    columns[column][2][4:5] = [] if value is None else [value]
    with pytest.raises(ValueError, match=message):
        train(tmp_path, None, Dataset.from_dict(columns))


# ---------------------------------------------------------------- refusals


def refused(tmp_path: Any, **options: Any) -> str:
    """What the trainer says that can't be made with these options of `pico.trainer`."""
    with pytest.raises(RequestError) as caught:
        pico.trainer(tmp_path, **options)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def smoothed(outputs: Any, labels: Any, **kwargs: Any) -> int:
    return 0


PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor` computes"]),
        ({"loss_type": "dft"}, ["`loss_type='dft'` re-weights"]),
        (
            {"label_smoothing_factor": 0.1, "loss_type": "dft", "drop": "fusion_probs"},
            ["has 3 problems"],
        ),
        (
            {"given": {"compute_loss_func": smoothed}},
            ["`compute_loss_func` replaces the loss"],
        ),
        (
            {"given": {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)}},
            ["derive it from `DataCollatorForFusion`"],
        ),
        ({"drop": TARGETS}, ["`clm_weight` is 0.9, but the train dataset has no"]),
        *(({"drop": name}, [f"no `{name}`"]) for name in (*PLAIN, *TARGETS)),
        *(({"drop_eval": name}, [f"no `{name}`", "the eval dataset has"])
          for name in (*PLAIN, *TARGETS)),
        ({"given": {"peft_config": PROMPT_TUNING}}, ["prompt learning puts virtual tokens"]),
    ],
)  # fmt: skip
def test_what_the_loss_can_not_be_computed_with_is_refused(tmp_path, options, messages):
    dataset = pico.rows()
    if "drop" in options:
        options = options | {"dataset": dataset.remove_columns(options["drop"])}
    if "drop_eval" in options:
        eval_dataset = dataset.remove_columns(options["drop_eval"])
        options = options | {"given": {"eval_dataset": eval_dataset}}
    options = {key: value for key, value in options.items() if not key.startswith("drop")}
    found = refused(tmp_path, **options)
    assert all(message in found for message in messages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.to_iterable_dataset(), "is an `IterableDataset`"),
        (lambda rows: rows.with_transform(lambda batch: batch), "uses `with_transform()`"),
        (lambda rows: rows.add_column("image", [0] * 4), "has images"),
    ],
)
def test_a_dataset_of_another_kind_is_refused(tmp_path, change, message):
    dataset = change(pico.rows())
    found = refused(tmp_path, dataset=dataset)
    assert "the train dataset" in found
    assert message in found
    several = {"eval_dataset": {"a": pico.rows(), "b": dataset}}
    assert "the b dataset" in refused(tmp_path, given=several)


def test_a_dataset_is_required(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        FusionTrainer(pico.model(), FusionConfig(**pico.arguments(tmp_path)))


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [({"cp_size": 2}, "context parallelism"), ({"sp_size": 2}, "sequence parallelism")],
)
def test_sequences_split_between_processes_are_refused(tmp_path, sizes, kind):
    args = FusionConfig(**pico.arguments(tmp_path))
    args.parallelism_config = ParallelismConfig(**sizes)
    assert kind in refused(tmp_path, args=args)


def test_prompt_learning_is_refused(tmp_path):
    wrapped = get_peft_model(pico.model(), PROMPT_TUNING)
    assert "prompt learning puts virtual tokens" in refused(tmp_path, net=wrapped)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("untied", "lm_head", "an adapter on the output head"),
        ("tied", "lm_head", "an adapter on the output head"),
        ("tied", "embed_tokens", "an adapter on tied embeddings"),
    ],
)
def test_an_adapter_beside_the_heads_weight_is_refused(tmp_path, kind, target, message):
    config = LoraConfig(r=2, target_modules=["q_proj", target])
    given = {"peft_config": config}
    assert message in refused(tmp_path, net=pico.model(kind), given=given)
    assert message in refused(tmp_path, net=get_peft_model(pico.model(kind), config))
    if target == "embed_tokens":  # seen in a model that the trainer itself loads, too
        pico.model(kind).save_pretrained(tmp_path / "model")
        assert message in refused(tmp_path, net=str(tmp_path / "model"), given=given)


def test_packing_without_a_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_length` can't be `None`"):
        train(tmp_path, packing=True, max_length=None)


def test_plain_trl_settings_are_refused(tmp_path):
    message = refused(tmp_path, args=SFTConfig(**pico.arguments(tmp_path)))
    assert "pass a `FusionConfig`" in message


@pytest.mark.parametrize("weight", [-0.1, 1.5, math.nan])
def test_a_weight_outside_zero_and_one_is_refused(tmp_path, weight):
    with pytest.raises(ValueError, match="a share of the loss lies between 0 and 1"):
        FusionConfig(**pico.arguments(tmp_path, clm_weight=weight))


def test_a_kernel_that_trl_no_longer_calls_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_KERNEL", "add_fused_lm_head")
    with pytest.raises(RuntimeError, match=r"install trl>=1\.16,<1\.17"):
        train(tmp_path)
