"""TRL's SFTTrainer with a second loss term: cross-entropy against stored fused distributions."""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import pad

from fusechat_common.errors import RequestError
from fusechat_common.versions import SUPPORTED, require_supported
from fusechat_distill.trainer.columns import TARGETS, TOKENS, prepare_dataset
from fusechat_distill.trainer.loss import FusionLogProbFunction

# The function in TRL's module that its fused forward calls with hidden states and head.
_KERNEL = "_ChunkedLogProbFunction"

_HEAD_SHARDED_SEPARATELY = (
    "FSDP2 shards the output head as a group of its own, where TRL's fused head keeps the gradient "
    "of one process and loses the others'; wrap the transformer layers alone "
    "(`fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP`)"
)


@dataclass
class FusionConfig(SFTConfig):
    """TRL's `SFTConfig` plus the weight of the two loss terms.

    Args:
        clm_weight: λ of L = λ·L_CLM + (1 − λ)·L_Fusion, between 0 and 1. At 1.0 every step is the
            same as `SFTTrainer`'s.
    """

    clm_weight: float = field(
        default=0.9,
        metadata={
            "help": "Weight of the language-modelling term; the fusion term gets the rest. "
            "Between 0 and 1."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.clm_weight <= 1.0:  # also refuses NaN
            raise ValueError(
                f"`clm_weight` is {self.clm_weight}, but a share of the loss lies between 0 and 1. "
                "1.0 is plain supervised fine-tuning, FuseChat's is 0.9."
            )


@dataclass
class DataCollatorForFusion(DataCollatorForLanguageModeling):
    """TRL's collator, which also pads (or, without padding, joins) the fused distributions.

    If the examples have `fusion_ids` and `fusion_probs` (k numbers per token, nested or flat), the
    batch has them as [batch, length, k] tensors, int32 and float32, zero in the padding.

    Examples:
    >>> from fusechat_distill import DataCollatorForFusion

    >>> long = {"input_ids": [1, 2], "labels": [-100, 2]}
    >>> long |= {"fusion_ids": [[0, 0], [2, 3]], "fusion_probs": [[0.0, 0.0], [0.75, 0.25]]}
    >>> short = {"input_ids": [5], "labels": [-100]}
    >>> short |= {"fusion_ids": [[0, 0]], "fusion_probs": [[0.0, 0.0]]}
    >>> batch = DataCollatorForFusion(pad_token_id=0)([long, short])
    >>> batch["fusion_ids"].shape, batch["fusion_probs"][0, 1]
    (torch.Size([2, 2, 2]), tensor([0.7500, 0.2500]))
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for name, dtype in zip(TARGETS, (np.int32, np.float32), strict=True):
            if name not in examples[0]:
                continue
            arrays = [(np.array(e[name], dtype), len(e["input_ids"])) for e in examples]
            rows = [torch.from_numpy(array.reshape(length, -1)) for array, length in arrays]
            if self.padding_free:
                rows = [torch.cat(rows)]
            batch[name] = pad(rows, padding_value=0, pad_to_multiple_of=self.pad_to_multiple_of)
        return batch


class _FusionHead:
    """Adds the fusion term to the forward of a model, and keeps its sums for the metrics.

    `sums` is None, or the detached sums of the last forward over response tokens, on the device:
    negative log-likelihood and number of tokens; with targets also the gap, the number of positions
    with a target, and the entropy of these targets.
    """

    def __init__(self, clm_weight: float) -> None:
        self.clm_weight = clm_weight
        self.sums: torch.Tensor | None = None

    def install(self, model: PreTrainedModel) -> None:
        """Let `model(..., fused_lm_head=True, fusion_ids=…, fusion_probs=…)` return the objective.

        `model` has to have TRL's fused head already. `log_probs` of its output then is minus the
        training objective of each token, so that everything TRL does with it (normalising, masking,
        the loss of mixtures of experts) applies to both terms.
        """
        fused_forward: Callable[..., Any] = model.forward

        # As in TRL: `generate` validates its arguments against the model's own signature.
        @functools.wraps(type(model).forward)
        def forward(
            _: PreTrainedModel,
            *args: Any,
            fusion_ids: torch.Tensor | None = None,
            fusion_probs: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if not kwargs.get("fused_lm_head"):
                return fused_forward(*args, **kwargs)
            if isinstance(model.get_output_embeddings(), FSDPModule):
                raise RequestError(_HEAD_SHARDED_SEPARATELY, "FusionTrainer")
            if fusion_ids is None or fusion_probs is None:
                outputs = fused_forward(*args, **kwargs)
                nll = -outputs.log_probs.detach().sum()
                self.sums = torch.stack([nll, outputs.label_mask.sum()])
                return outputs
            labels, probs = kwargs["labels"][:, 1:], _floats(fusion_probs[:, 1:])
            kernel = _FusionKernel(labels, fusion_ids[:, 1:], probs, self.clm_weight)
            with _trl_kernel(kernel):
                outputs = fused_forward(*args, **kwargs)
            self.sums = kernel.sums
            return outputs

        model.forward = types.MethodType(forward, model)


class _FusionKernel:
    """Replaces TRL's `ChunkedLogProbFunction` during one forward pass with targets."""

    def __init__(
        self, labels: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor, clm_weight: float
    ) -> None:
        self.mask = labels != -100
        ignored = ~self.mask.unsqueeze(-1)
        # Ignored rows may contain anything, and entries of probability 0 any id: set both to 0.
        self.probs = probs.masked_fill(ignored, 0.0)
        self.ids = ids.masked_fill(ignored | (self.probs == 0), 0)
        self.labels = labels
        self.clm_weight = clm_weight
        self.sums: torch.Tensor | None = None

    def apply(self, hidden: torch.Tensor, *args: Any) -> tuple[torch.Tensor | None, ...]:
        mask, labels, ids, probs = (
            x.to(hidden.device).flatten(0, 1)
            for x in (self.mask, self.labels, self.ids, self.probs)
        )
        # TRL computes either all positions or only those with a label.
        if hidden.shape[0] != mask.shape[0]:
            labels, ids, probs = labels[mask], ids[mask], probs[mask]
            mask = mask[mask]
        *outputs, gap = FusionLogProbFunction.apply(hidden, *args, ids, probs)
        log_probs = outputs[0]
        with torch.no_grad():
            self.sums = torch.stack(
                [
                    -log_probs.masked_fill(~mask, 0.0).sum(),
                    mask.sum(),
                    gap.sum(),
                    (probs.sum(-1) > 0).sum(),
                    _entropy(labels, ids, probs).sum(),
                ]
            )
        if self.clm_weight != 1.0:
            log_probs = log_probs - (1.0 - self.clm_weight) * gap
        return log_probs, *outputs[1:]


@contextmanager
def _trl_kernel(kernel: _FusionKernel) -> Iterator[None]:
    """Let TRL's fused forward call another kernel.

    How TRL obtains hidden states, head, soft cap and logit scale depends on the model, PEFT, FSDP
    and ZeRO-3. It passes all of them to one function; only that function is replaced here.
    """
    original = getattr(trl_utils, _KERNEL)
    setattr(trl_utils, _KERNEL, kernel)
    try:
        yield
    finally:
        setattr(trl_utils, _KERNEL, original)
    if kernel.sums is None:
        raise RuntimeError(
            f"TRL {trl.__version__}'s fused head didn't compute its log-probabilities where this "
            f"version of fusechat adds the fusion term; install trl{SUPPORTED['trl']}"
        )


def _entropy(labels: torch.Tensor, ids: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each row's distribution, [N]; 0 for a zero row, which is not a target."""
    on_label = ids == labels.unsqueeze(-1)
    rest = probs.masked_fill(on_label, 0.0)
    gold = (1.0 - rest.sum(-1)).clamp(0.0, 1.0)
    entropy = torch.special.entr(rest).sum(-1) + torch.special.entr(gold)
    return entropy.masked_fill(probs.sum(-1) == 0, 0.0)


def _floats(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as float32, from numbers or from the bits that `_prepare_inputs` makes."""
    return probs.float() if probs.is_floating_point() else probs.view(torch.float32)


def _losses_and_counts(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of a forward as ([CLM, fusion] losses, [tokens, targets, entropy]).

    Without targets ([CLM], [tokens]).
    """
    if len(sums) == 2:
        return sums[:1], sums[1:]
    nll, tokens, gap, targets, entropy = sums.unbind()
    return torch.stack([nll, nll + gap]), torch.stack([tokens, targets, entropy])


def argument_problems(
    args: Any, data_collator: Any = None, compute_loss_func: Callable[..., Any] | None = None
) -> Iterator[str]:
    """The arguments that `FusionTrainer` refuses, each with its reason and remedy."""
    if not isinstance(args, FusionConfig):
        yield (
            f"`args` is a `{type(args).__name__}`, which has no `clm_weight`; "
            "pass a `FusionConfig`, it takes the same fields"
        )
        return
    if args.loss_type != "nll":
        yield (
            f"`loss_type={args.loss_type!r}` re-weights each token by its own probability, which "
            "the fusion term has no counterpart of; use 'nll'"
        )
    if args.label_smoothing_factor:
        yield (
            "`label_smoothing_factor` computes the loss from full logits and would drop the "
            "fusion term; set it to 0"
        )
    if compute_loss_func is not None:
        yield (
            "`compute_loss_func` replaces the loss and would drop the fusion term; leave it out, "
            "or subclass `FusionTrainer` and override `compute_loss`"
        )
    if data_collator is not None and not isinstance(data_collator, DataCollatorForFusion):
        yield (
            f"`data_collator` is a `{type(data_collator).__name__}`, which drops the fused "
            "distributions; derive it from `DataCollatorForFusion`"
        )
    yield from _parallelism_problems(args.parallelism_config)


def _parallelism_problems(config: Any) -> Iterator[str]:
    if config is not None and (config.cp_enabled or config.sp_enabled):
        kind = "context parallelism" if config.cp_enabled else "sequence parallelism (Ulysses)"
        yield (
            f"{kind} splits sequences between processes, but not their fused distributions, so "
            "the fusion term would be dropped or shifted; set `cp_size` and `sp_size` to 1"
        )


def _dataset_problems(args: Any, train: Any, evaluation: Any) -> Iterator[str]:
    several = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
    for name, dataset in {"train": train, **several}.items():
        if isinstance(dataset, IterableDataset):
            yield (
                f"the {name} dataset is an `IterableDataset`, whose distributions can't be "
                "checked, cut and packed beforehand; load it without `streaming=True`, or write it "
                "to disk with `Dataset.from_generator`"
            )
        elif isinstance(dataset, Dataset):
            yield from _column_problems(name, dataset, args)


def _column_problems(name: str, dataset: Dataset, args: Any) -> Iterator[str]:
    columns = dataset.column_names
    present = [column for column in TARGETS if column in columns]
    if not present:
        if name == "train" and getattr(args, "clm_weight", 1.0) != 1.0:
            yield (
                f"`clm_weight` is {args.clm_weight}, but the train dataset has no `fusion_ids` and "
                "`fusion_probs`, so there is nothing to fuse; add the columns, or set "
                "`clm_weight=1.0`"
            )
        return
    missing = [column for column in (*TOKENS, *TARGETS) if column not in columns]
    if missing:
        yield (
            f"the {name} dataset has `{present[0]}` but no "
            + " and no ".join(f"`{column}`" for column in missing)
            + "; each of the four columns has one entry for every token"
        )
    if dataset.format["type"] == "custom":
        yield (
            f"the {name} dataset uses `with_transform()`, which would be baked into its columns; "
            "materialise it with `map()`"
        )
    if "image" in columns or "images" in columns:
        yield (
            f"the {name} dataset has images, whose tokens TRL makes on the fly, so that no "
            "distribution can belong to them; remove the images or the fusion columns"
        )


def adapter_problems(model: Any, peft_config: Any) -> Iterator[str]:
    """Adapters that change logits without changing the head's weight, which the loss reads."""
    wrapped = isinstance(model, torch.nn.Module) and is_peft_model(model)
    configs = [peft_config] if peft_config is not None else []
    if wrapped:
        configs += [model.peft_config[name] for name in model.active_adapters]
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        yield (
            "prompt learning puts virtual tokens before the sequence, which shifts every fused "
            "distribution; use LoRA"
        )
        return
    if not isinstance(model, PreTrainedModel) and not wrapped:
        return
    head = model.get_output_embeddings()
    if _has_adapter(model, head, peft_config):
        yield (
            "an adapter on the output head would not be trained, since the loss reads the head's "
            "weight directly; take it out of `target_modules`, or train the head whole with "
            "`modules_to_save`"
        )
    embeddings = model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and embeddings is not head and _has_adapter(model, embeddings, peft_config):
        yield (
            "an adapter on tied embeddings would act on the output head too once it is merged, but "
            "not in the loss; take it out of `target_modules`"
        )


def _has_adapter(model: Any, module: Any, peft_config: Any) -> bool:
    if peft_config is None:
        if not is_peft_model(model):
            return False
        from peft.tuners.tuners_utils import BaseTunerLayer

        return isinstance(module, BaseTunerLayer)
    from peft.tuners.tuners_utils import check_target_module_exists

    if getattr(peft_config, "target_modules", None) is None:
        return False
    names = [name for name, candidate in model.named_modules() if candidate is module]
    return any(check_target_module_exists(peft_config, name) for name in names)


def _config(model: Any, args: FusionConfig) -> Any:
    if not isinstance(model, str):
        return model.config
    load = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return AutoConfig.from_pretrained(
        model, revision=load.get("revision"), trust_remote_code=args.trust_remote_code
    )


def outside_language_model(model: Any) -> list[str]:
    """Names of a vision-language model's parameters that text has no use for; else none."""
    if not hasattr(model.config, "text_config"):
        return []
    parts = (model.get_decoder(), model.get_output_embeddings())
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]


def _towers(model: Any, config: Any) -> str | None:
    """A pattern of the modules that an adapter leaves alone: those outside the language model."""
    if not hasattr(config, "text_config"):
        return None
    if isinstance(model, str):
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(copy.deepcopy(config))
    names = outside_language_model(model)
    towers = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
    return rf"({'|'.join(map(re.escape, towers))})(\..*)?" if towers else None


class FusionTrainer(SFTTrainer):
    """Trains on λ·L_CLM + (1 − λ)·L_Fusion; everything else is TRL's `SFTTrainer`.

    Datasets have `input_ids` and `labels` (−100: no loss), and for the fusion term `fusion_ids` and
    `fusion_probs`, k numbers for every token, row t being the distribution that `labels[t]` was
    drawn from. Probabilities are used as given, and mass missing from 1 lies on `labels[t]`, so a
    zero row is the plain loss of that token. Row 0 and rows whose label is −100 are ignored. Both
    terms are cross-entropies in nats, averaged over the response tokens as in TRL.

    Logs `clm_loss` and `fusion_loss` (`loss` = λ·clm_loss + (1 − λ)·fusion_loss, plus what a
    mixture of experts adds), `target_share` (of the response tokens, those that have a target) and
    `target_entropy` (nats, of these targets). `eval_loss` is the same objective if the evaluation
    data have targets, else the plain loss; `eval_clm_loss` is always logged.

    Args:
        args: a `FusionConfig`; all other arguments are TRL's.

    Raises:
        RequestError: a setting would drop or distort the fusion term; problems that are known
            before the model is loaded are reported together.
    """

    _tag_names = [*SFTTrainer._tag_names, "fusechat"]  # noqa: RUF012
    _name = "Fusion"
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: FusionConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        require_supported("accelerate", "peft", "torch", "transformers", "trl")
        if args is None:
            name = model if isinstance(model, str) else trl_utils.get_config_model_id(model.config)
            args = FusionConfig(f"{name.split('/')[-1]}-Fusion")
        problems = [
            *argument_problems(args, data_collator, compute_loss_func),
            *_dataset_problems(args, train_dataset, eval_dataset),
            *adapter_problems(model, peft_config),
        ]
        if problems:
            raise RequestError(problems, "FusionTrainer")
        config = _config(model, args)
        self._vocab_size = config.get_text_config().vocab_size
        if peft_config is not None and getattr(peft_config, "exclude_modules", 0) is None:
            peft_config.exclude_modules = _towers(model, config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        plain = self.model.get_base_model() if is_peft_model(self.model) else self.model
        for name in outside_language_model(plain):
            plain.get_parameter(name).requires_grad_(False)
        # Problems that depend on the loaded model and the launcher's settings.
        parallelism = self.accelerator.parallelism_config
        problems = [*adapter_problems(self.model, None), *_parallelism_problems(parallelism)]
        if problems:
            raise RequestError(problems, "FusionTrainer")
        # TRL refuses a custom collator in its padding-free modes, so it is replaced afterwards.
        if data_collator is None:
            collator = self.data_collator
            settings = {f.name: getattr(collator, f.name) for f in fields(collator)}
            self.data_collator = DataCollatorForFusion(**settings)
        self._head = _FusionHead(args.clm_weight)
        self._head.install(plain)
        self._terms = {"train": _Terms(), "eval": _Terms()}

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Any:
        # TRL cuts only `input_ids` and `labels`, and drops other columns when it packs.
        if not isinstance(dataset, Dataset) or "fusion_ids" not in dataset.column_names:
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        with args.main_process_first(desc="preparing fused distributions"):
            return prepare_dataset(
                dataset, args, packing=packing, vocab_size=self._vocab_size, name=dataset_name
            )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or ()), *TARGETS]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # DeepSpeed and FSDP cast every floating-point input to the compute dtype; rounded to bf16,
        # probabilities would no longer add up. As integers, their bits stay unchanged.
        probs = inputs.get("fusion_probs")
        if probs is not None and probs.is_floating_point():
            inputs = {**inputs, "fusion_probs": probs.float().view(torch.int32)}
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        sums, self._head.sums = self._head.sums, None
        assert sums is not None
        losses, counts = _losses_and_counts(sums)
        gather = self.accelerator.gather
        if self.model.training:
            # Scaled like the loss itself, so that the logged terms add up to the logged loss.
            if num_items_in_batch is None:
                losses = losses / counts[0].clamp(min=1) / self.current_gradient_accumulation_steps
            else:
                losses = losses / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    losses = losses * (self.accelerator.num_processes // self.get_tp_size())
            losses = gather(losses.unsqueeze(0)).mean(0)
            weight = int(self.accelerator.sync_gradients)
        else:
            # `Trainer` counts a batch's loss once per sample; so do the terms.
            losses = losses / counts[0].clamp(min=1)
            losses = losses.repeat(self.args.eval_batch_size, 1)
            losses = self.accelerator.gather_for_metrics(losses)
            weight = losses.shape[0]
            losses = losses.sum(0)
        counts = gather(counts.unsqueeze(0)).sum(0)
        self._terms["train" if self.model.training else "eval"].add(losses, counts, weight)
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        # With several evaluation sets, the prefix of the metrics contains the set's name.
        prefixes = [key.removesuffix("runtime") for key in logs if key.endswith("_runtime")]
        prefix = "" if mode == "train" else (prefixes or ["eval_"])[0]
        logs.update({prefix + k: v for k, v in self._terms[mode].take().items()})
        super().log(logs, start_time)


class _Terms:
    """Sums for the logged metrics, kept on the device until they are logged."""

    def __init__(self) -> None:
        self.losses: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.weight = 0

    def add(self, losses: torch.Tensor, counts: torch.Tensor, weight: int) -> None:
        self.losses = losses if self.losses is None else self.losses + losses
        self.counts = counts if self.counts is None else self.counts + counts
        self.weight += weight

    def take(self) -> dict[str, float]:
        """The metrics since the last call, by name."""
        if self.losses is None or self.counts is None:
            return {}
        values = torch.cat([self.losses / max(self.weight, 1), self.counts]).tolist()
        self.losses, self.counts, self.weight = None, None, 0
        if len(values) == 2:
            return {"clm_loss": values[0]}
        clm, fusion, tokens, targets, entropy = values
        return {
            "clm_loss": clm,
            "fusion_loss": fusion,
            "target_share": targets / max(tokens, 1.0),
            "target_entropy": entropy / max(targets, 1.0),
        }
