"""The fusion term of the training loss, as a sparse correction to TRL's tiled log-probabilities.

For a fused distribution p over k tokens whose missing mass lies on the label y, and logits z of
the student,

    λ·NLL + (1 − λ)·CE(p, q) = NLL + (1 − λ)·gap,        gap = Σ_j p_j (z_y − z_j),

because log Σ exp z cancels between the two terms. The gap needs k + 1 logits a position, each one
dot product of the hidden state with a row of the output embedding: no [tokens, vocabulary] tensor
beyond the tile that TRL computes its log-probabilities in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

Tensor = torch.Tensor

# Maximum of fp32 elements of gathered embedding rows in memory: on the CPU as many as fit into a
# second-level cache beside the weights, elsewhere enough to keep the device busy.
_CPU_BLOCK = 2**19
_BLOCK = 2**24


class FusionLogProbFunction(torch.autograd.Function):
    """TRL's `ChunkedLogProbFunction`, with the gap of a fused distribution as an additional output.

    Takes its nine arguments, then `ids` ([N, k] integers below V) and `probs` ([N, k] float32,
    used as given), and returns its five outputs, then `gap` ([N] float32). Rows are gathered,
    multiplied and, in the backward pass, accumulated in float32 for any dtype of the weights. The
    head's gradient is added to the buffer of TRL's own, so no second buffer is needed.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        *kernel_args, ids, probs = args
        outputs = ChunkedLogProbFunction.forward(ctx, *kernel_args)
        hidden, weight, bias, targets = kernel_args[:4]
        ctx.entries, ctx.coefficients = _entries(targets, ids, probs)
        gap = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for part, _, z, _ in _logits(ctx, hidden, weight, bias):
            gap[part] = (ctx.coefficients[part] * z).sum(-1)
        return *outputs, gap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *kernel_grads, grad_gap = grads
        hidden, weight, bias, *_ = ctx.saved_tensors
        # ZeRO-3 partitions the head again after the forward pass; TRL's backward needs it gathered.
        with maybe_gather_lm_head_ctx(weight, bias):
            if grad_gap is None:
                return *ChunkedLogProbFunction.backward(ctx, *kernel_grads), None, None
            own = ChunkedLogProbFunction.backward(_Unrounded(ctx), *kernel_grads)
            grad_hidden, grad_weight, grad_bias = own[:3]
            for part, rows, _, slope in _logits(ctx, hidden, weight, bias):
                grad_z = grad_gap[part].float().unsqueeze(-1) * ctx.coefficients[part] * slope
                entries = ctx.entries[part].reshape(-1)
                if grad_hidden is not None:
                    grad_hidden[part] += torch.bmm(grad_z.unsqueeze(1), rows).squeeze(1)
                if grad_weight is not None:
                    outer = grad_z.unsqueeze(-1) * hidden[part].float().unsqueeze(1)
                    grad_weight.index_add_(0, entries, outer.flatten(0, 1))
                if grad_bias is not None:
                    grad_bias.index_add_(0, entries, grad_z.reshape(-1))
        sums = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        return *(g if g is None else g.to(x.dtype) for g, x in sums), *own[3:], None, None


class _Unrounded:
    """A context with which TRL's backward returns its float32 sums without rounding them."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        hidden, weight, bias, *rest = ctx.saved_tensors
        wide = (x if x is None else _Wide(x) for x in (hidden, weight, bias))
        self.saved_tensors = (*wide, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Wide:
    """A tensor that reports float32 as its dtype, because TRL casts a gradient to that dtype."""

    dtype = torch.float32

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def __getitem__(self, part: Any) -> Tensor:
        return self._tensor[part]


def _entries(targets: Tensor, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """The k + 1 tokens whose logits a row of the gap needs, and the coefficient of each."""
    entries = torch.cat([targets.unsqueeze(-1), ids.to(targets.dtype)], dim=-1)
    return entries, torch.cat([probs.sum(-1, keepdim=True), -probs], dim=-1)


def _logits(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | float]]:
    """Blocks of n positions: their slice, embedding rows [n, k + 1, H] in float32, logits z
    [n, k + 1] and the slope dz / d(rows · hidden), a number or [n, k + 1]."""
    scale = ctx.kernel_args["logit_scale"]
    inverse_temperature = ctx.kernel_args["inv_t"]
    softcap = ctx.kernel_args["softcap"] if ctx.kernel_args["HAS_SOFTCAP"] else None
    positions, width = ctx.entries.shape
    limit = _CPU_BLOCK if hidden.device.type == "cpu" else _BLOCK
    step = max(1, limit // (width * hidden.shape[-1]))
    # Under autocast, `bmm` would round its fp32 inputs to bf16.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, positions, step):
            part = slice(start, start + step)
            entries = ctx.entries[part]
            rows = weight.index_select(0, entries.reshape(-1)).float()
            rows = rows.view(*entries.shape, hidden.shape[-1])
            z = torch.bmm(rows, hidden[part].float().unsqueeze(-1)).squeeze(-1)
            if bias is not None:
                z = z + bias[entries].float()
            z = z * scale
            slope: Tensor | float = scale * inverse_temperature
            if softcap is not None:
                t = torch.tanh(z / softcap)
                z, slope = softcap * t, slope * (1 - t * t)
            yield part, rows, z * inverse_temperature, slope
