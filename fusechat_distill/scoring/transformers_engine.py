"""The default engine: any causal LM of transformers, with its output head applied in tiles."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusechat_common.errors import FusechatError
from fusechat_distill.inputs.models import ADAPTER_CONFIG, auto_class
from fusechat_distill.scoring.engine import Request, Scores
from fusechat_distill.scoring.head import Head, set_logprobs, topk_logprobs

log = logging.getLogger(__name__)


class TransformersScorer:
    """Scores with a loaded causal LM.

    The scale and soft cap of the model's logits are taken from its configuration and confirmed by
    one forward over eight tokens; a model with other logits is refused.

    Args:
        model: the result of `from_pretrained`: a causal or a vision-language model.
        token_ids: the ids that the tokenizer has; the head's other rows are padding, get no
            probability, and never appear.
        top_k: entries per position; at most the number of `token_ids`.
        batch_tokens: padded tokens in one forward. A longer request is a batch by itself.

    Raises:
        FusechatError: the head can't be applied in tiles.
    """

    def __init__(
        self, model: Any, token_ids: Iterable[int], *, top_k: int = 10, batch_tokens: int = 16384
    ):
        self.model = model.eval()
        self.top_k = top_k
        self.batch_tokens = batch_tokens
        self.head_module = model.get_output_embeddings()
        weight = getattr(self.head_module, "weight", None)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            kind = type(self.head_module).__name__
            raise FusechatError(
                f"{model.config.name_or_path}: its output head is {kind} without a plain weight "
                "matrix; exclude it from quantisation, or set scoring.engine: vllm"
            )
        rows = weight.shape[0]
        ids = np.unique(np.fromiter((i for i in token_ids if i < rows), dtype=np.int64))
        if len(ids) < top_k:
            name = model.config.name_or_path
            raise FusechatError(f"{name}: has {len(ids)} tokens; set scoring.top_k to at most that")
        self.vocabulary_size = int(ids[-1]) + 1
        absent = np.setdiff1d(np.arange(self.vocabulary_size), ids)
        self.absent = torch.from_numpy(absent) if len(absent) else None
        self.scale: float = 1.0
        self.soft_cap: float | None = None
        self.scale, self.soft_cap = self._logit_transform()

    @classmethod
    def load(
        cls,
        model: str,
        token_ids: Iterable[int],
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: Any = "cpu",
        trust_remote_code: bool = False,
        load: Mapping[str, Any] | None = None,
        top_k: int = 10,
        batch_tokens: int = 16384,
    ) -> TransformersScorer:
        """Load `model` from safetensors; `load` is passed to `from_pretrained` unchanged.

        `device` is a torch device, or "spread" for transformers' own `device_map="auto"`; a
        `device_map` in `load` takes precedence.
        """
        from transformers import AutoConfig

        options = dict(load or {})
        options.setdefault("device_map", "auto" if device == "spread" else {"": device})
        folder, described = Path(model), model
        if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            adapter = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
            described, revision = adapter["base_model_name_or_path"], None
        config = AutoConfig.from_pretrained(
            described, revision=revision, trust_remote_code=trust_remote_code
        )
        loaded = auto_class(config).from_pretrained(
            model,
            revision=revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )
        return cls(loaded, token_ids, top_k=top_k, batch_tokens=batch_tokens)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> Iterator[Scores]:
        """Scores in the requests' order.

        Requests of similar length share a forward. If memory runs out, the batch is halved, and
        `batch_tokens` with it for the batches that follow.

        Raises:
            FusechatError: one request alone does not fit into memory.
        """
        scores: list[Scores | None] = [None] * len(requests)
        todo = sorted(range(len(requests)), key=lambda i: -len(requests[i].input_ids))
        while todo:
            longest = len(requests[todo[0]].input_ids)
            count = max(1, min(len(todo), self.batch_tokens // max(1, longest)))
            results = self._forward_or_none([requests[i] for i in todo[:count]])
            if results is None:
                if count == 1:
                    raise FusechatError(
                        f"{self.model.config.name_or_path}: one sample of {longest} tokens does "
                        "not fit into memory; lower max_length, or give the model more devices "
                        "(`load: {device_map: auto}`)"
                    )
                self.batch_tokens = longest * (count // 2)
                log.warning("out of memory: continuing with batch_tokens: %d", self.batch_tokens)
                continue
            for i, result in zip(todo[:count], results, strict=True):
                scores[i] = result
            del todo[:count]
        return iter([score for score in scores if score is not None])

    def _forward_or_none(self, batch: Sequence[Request]) -> list[Scores] | None:
        """The batch's scores, or None if memory ran out.

        Returning frees the tensors in the failed forward's frames; inside an `except` they would
        stay alive.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        try:
            return self._forward(batch)
        except Exception as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        clear_device_cache(garbage_collection=True)
        return None

    def _forward(self, batch: Sequence[Request]) -> list[Scores]:
        longest = max(len(request.input_ids) for request in batch)
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        mask = np.zeros((len(batch), longest), dtype=np.int64)
        for row, request in enumerate(batch):
            ids[row, : len(request.input_ids)] = request.input_ids
            mask[row, : len(request.input_ids)] = 1
        # The hidden states of all requests' positions, from the flattened [B * L] batch.
        flat = np.concatenate([row * longest + r.positions for row, r in enumerate(batch)])
        hidden = self._hidden(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(flat))
        gold = torch.from_numpy(np.concatenate([r.gold for r in batch]).astype(np.int64))
        # Where each request begins among these, and its sets among all sets.
        begins = np.cumsum([0, *(len(r.positions) for r in batch[:-1])])
        set_begins = np.cumsum([0, *(len(r.sets) for r in batch[:-1])])
        rows = [begin + row for begin, r in zip(begins, batch, strict=True) for row, _ in r.sets]
        sets = [torch.from_numpy(ids.astype(np.int64)) for r in batch for _, ids in r.sets]
        with self._head() as head:
            tensors = topk_logprobs(hidden, head, gold, self.top_k)
            of_sets = set_logprobs(hidden[rows], head, sets)
        # Cut into the requests' parts.
        parts = [np.split(tensor.cpu().numpy(), begins[1:]) for tensor in tensors]
        parts.append(np.split(of_sets.cpu().numpy(), set_begins[1:]))
        return [
            Scores(token_ids.astype(np.uint32), *(values.astype(np.float32) for values in logprobs))
            for token_ids, *logprobs in zip(*parts, strict=True)
        ]

    def _hidden(self, ids: Tensor, mask: Tensor, flat: Tensor) -> Tensor:
        """The head's input at positions `flat` of the flattened batch, [N, H].

        The model's own head gets one state only, so that its logits stay small.
        """
        taken: list[Tensor] = []

        def take(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            taken.append(hidden.reshape(-1, hidden.shape[-1])[flat.to(hidden.device)])
            return (hidden[:1, :1], *args[1:])

        self._run(ids, mask, take)
        return taken[0].to(self._weight_dtype)

    def _run(self, ids: Tensor, mask: Tensor, before_head: Any) -> Any:
        hook = self.head_module.register_forward_pre_hook(before_head)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        try:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            hook.remove()

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.head_module.weight.dtype

    @contextmanager
    def _head(self) -> Iterator[Head]:
        """The head, with its weights on a device even if they are offloaded."""
        from accelerate.utils import align_module_device

        with align_module_device(self.head_module):
            weight = self.head_module.weight
            yield Head(
                weight=weight,
                vocabulary_size=self.vocabulary_size,
                bias=getattr(self.head_module, "bias", None),
                scale=self.scale,
                soft_cap=self.soft_cap,
                absent=None if self.absent is None else self.absent.to(weight.device),
            )

    @torch.inference_mode()
    def _logit_transform(self) -> tuple[float, float | None]:
        """The scale and soft cap that turn the head's output into the model's logits.

        Configurations name them differently, and some name one that their model applies elsewhere
        (MiniCPM3) or not at all (MPT). So the model is tried: its head gets states that make logits
        of up to ±40, and the first of the configured transforms that explains the model's output is
        the right one.
        """
        plain: list[Tensor] = []

        def amplify(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            with self._head() as head:
                hidden = args[0][:1, :8].to(head.weight.device)
                linear = torch.nn.functional.linear
                highest = linear(hidden, head.weight, head.bias).float().abs().amax()
                hidden = (hidden * (40.0 / highest.clamp_min(1e-30))).to(hidden.dtype)
                plain.append(linear(hidden, head.weight, head.bias).float())
            return (hidden, *args[1:])

        ids = torch.linspace(0, self.vocabulary_size - 1, 8).long().unsqueeze(0)
        logits = self._run(ids, torch.ones_like(ids), amplify).logits.float()
        raw = plain[0].to(logits.device)
        config = self.model.config.get_text_config()
        tolerance = 0.01 if self._weight_dtype in (torch.float32, torch.float64) else 1.0
        for scale, cap in _configured_transforms(config):
            expected = raw * scale
            if cap is not None:
                expected = torch.tanh(expected / cap) * cap
            error = (logits - expected).abs().amax()
            if math.isfinite(error) and error <= tolerance * max(1.0, scale):
                return scale, cap
        if not torch.isfinite(logits).all():
            raise FusechatError(
                f"{self.model.config.name_or_path}: gives NaN or Inf for the simplest input; its "
                "weights are damaged, or overflow in this dtype (set `dtype: float32`)"
            )
        raise FusechatError(
            f"{self.model.config.name_or_path}: a {config.model_type} model's logits are not its "
            "output head's times a known scale or under a known soft cap; set scoring.engine: vllm"
        )


def _configured_transforms(config: Any) -> list[tuple[float, float | None]]:
    """The scales and soft caps that a configuration may mean, both first, neither last."""
    scales = [
        getattr(config, "logit_scale", None),
        getattr(config, "lm_head_multiplier", None),
        1.0 / config.logits_scaling if getattr(config, "logits_scaling", None) else None,
    ]
    caps = [
        getattr(config, name, None)
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    ]
    return [
        (scale, cap)
        for cap in [*(float(c) for c in caps if c), None]
        for scale in [*(float(s) for s in scales if isinstance(s, (int, float)) and s), 1.0]
    ]
