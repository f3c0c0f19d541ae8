"""The fusion gap against logits written out in float64, and against TRL's own accuracy."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels import ChunkedLogProbFunction

from fusechat_distill.trainer import loss as loss_module
from fusechat_distill.trainer.loss import FusionLogProbFunction

POSITIONS, WIDTH, HIDDEN, VOCABULARY = 37, 5, 24, 83


Given = dict[str, torch.Tensor | None]
Result = tuple[torch.Tensor, list[torch.Tensor]]


def problem(dtype: torch.dtype, with_bias: bool, spread: float = 1.0) -> Given:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    probs = torch.rand(POSITIONS, WIDTH, generator=generator)
    probs = probs / probs.sum(-1, keepdim=True)
    probs[::3] *= 0.4  # a tail, on the label
    probs[1::5] = 0.0  # no target
    probs[2::7, 1:] = 0.0  # one entry
    probs[2::7, 0] = 1.0
    ids = torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:WIDTH] for _ in range(POSITIONS)]
    )
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    ids[::4, 2] = targets[::4]  # the label among the entries
    ids[5] = ids[5, 0]  # the same token in every entry
    return {
        "hidden": (spread * normal(POSITIONS, HIDDEN)).to(dtype),
        "weight": normal(VOCABULARY, HIDDEN).to(dtype) / 2,
        "bias": normal(VOCABULARY).to(dtype) if with_bias else None,
        "targets": targets,
        "ids": ids,
        "probs": probs,
    }


def reference(
    given: Given,
    clm_weight: float,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
) -> Result:
    """λ·Σ NLL + (1 − λ)·Σ CE and its gradients, in float64 with full [N, V] tensors."""
    leaves = {
        name: given[name].double().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if given[name] is not None
    }
    logits = leaves["hidden"] @ leaves["weight"].T
    if "bias" in leaves:
        logits = logits + leaves["bias"]
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    log_q = (logits / temperature).log_softmax(-1)
    full = torch.zeros_like(log_q)
    for n in range(POSITIONS):
        for j in range(WIDTH):
            full[n, given["ids"][n, j]] += given["probs"][n, j].double()
        full[n, given["targets"][n]] += 1 - given["probs"][n].double().sum()
    nll = -log_q[torch.arange(POSITIONS), given["targets"]]
    objective = clm_weight * nll - (1 - clm_weight) * (full * log_q).sum(-1)
    objective.sum().backward()
    return objective.detach(), [leaf.grad for leaf in leaves.values()]


def apply(
    given: Given,
    scale: float = 1.0,
    cap: float | None = None,
    temperature: float = 1.0,
    tile: int = 32,  # several vocabulary tiles
    outputs: tuple[str, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels, and the gap."""
    leaves = (given["hidden"], given["weight"], given.get("bias"), given["targets"])
    log_probs, *_, gap = FusionLogProbFunction.apply(
        *leaves, temperature, tile, cap, scale, outputs, given["ids"], given["probs"]
    )
    return log_probs, gap


def with_gradients(given: Given) -> tuple[Given, list[torch.Tensor]]:
    """Copies that gradients can be taken of, and which these are."""
    names = [name for name in ("hidden", "weight", "bias") if given[name] is not None]
    leaves = [given[name].clone().requires_grad_() for name in names]
    return given | dict(zip(names, leaves, strict=True)), leaves


def fused(given: Given, clm_weight: float, *choices: float | None) -> Result:
    given, leaves = with_gradients(given)
    log_probs, gap = apply(given, *choices, outputs=("entropy",))
    objective = -log_probs + (1 - clm_weight) * gap
    objective.sum().backward()
    return objective.detach(), [leaf.grad for leaf in leaves]


def plain(given: Given) -> Result:
    """TRL's own negative log-likelihood on the same tensors."""
    given, leaves = with_gradients(given)
    log_probs, *_ = ChunkedLogProbFunction.apply(*leaves, None, given["targets"], 1.0, 32)
    (-log_probs).sum().backward()
    return -log_probs.detach(), [leaf.grad for leaf in leaves]


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return (ours.double() - exact).norm().item()


@pytest.mark.parametrize("clm_weight", [0.0, 0.37, 1.0])
@pytest.mark.parametrize(
    ("with_bias", "scale", "cap"),
    [
        pytest.param(False, 1.0, None, id="plain"),
        pytest.param(True, 1.0, None, id="bias"),
        pytest.param(False, 0.0625, None, id="scale"),
        pytest.param(True, 1.7, 2.0, id="bias-scale-cap"),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradients_equal_the_dense_reference(
    clm_weight, with_bias, scale, cap, temperature
):
    given = problem(torch.float32, with_bias)
    value, gradients = fused(given, clm_weight, scale, cap, temperature)
    exact, exact_gradients = reference(given, clm_weight, scale, cap, temperature)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=2e-5)
    assert len(gradients) == len(exact_gradients)
    for ours, wanted in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=2e-5)


def test_blocks_do_not_change_the_result(monkeypatch):
    given = problem(torch.float32, True)
    whole = fused(given, 0.3, 1.0, 2.0)
    monkeypatch.setattr(loss_module, "_CPU_BLOCK", 4 * (WIDTH + 1) * HIDDEN)
    pieces = fused(given, 0.3, 1.0, 2.0)
    torch.testing.assert_close(pieces[0], whole[0])
    torch.testing.assert_close(pieces[1], whole[1])


def test_in_bfloat16_it_is_as_exact_as_trls_own_loss():
    # λ = 0.9, the papers'; a bf16 sum of the head's gradient would be off by percents.
    given = problem(torch.bfloat16, False, spread=2.0)
    value, gradients = fused(given, 0.9)
    exact, exact_gradients = reference(given, 0.9)
    trl_value, trl_gradients = plain(given)
    trl_exact, trl_exact_gradients = reference(given, 1.0)
    # 1 %: the two round different numbers.
    assert distance(value, exact) <= 1.01 * distance(trl_value, trl_exact)
    for ours, wanted, theirs, trl_wanted in zip(
        gradients, exact_gradients, trl_gradients, trl_exact_gradients, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, wanted) <= 1.01 * distance(theirs, trl_wanted)


def test_the_head_gradient_is_summed_in_float32():
    # One token in every row: 4,096 equal contributions, of which a bf16 sum keeps at most 256.
    count = 4096
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    given = {
        "hidden": torch.full((count, 4), 0.5, dtype=torch.bfloat16),
        "weight": weight,
        "targets": torch.zeros(count, dtype=torch.int64),
        "ids": torch.full((count, 1), 3),
        "probs": torch.ones(count, 1),
    }
    apply(given, tile=8)[1].sum().backward()
    expected = torch.zeros(8, 4)
    expected[0], expected[3] = 0.5 * count, -0.5 * count
    torch.testing.assert_close(weight.grad.float(), expected)


def test_without_a_gap_gradient_the_backward_is_trls():
    given, leaves = with_gradients(problem(torch.float32, False))
    (-apply(given)[0]).sum().backward()
    _, theirs = plain(problem(torch.float32, False))
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, theirs, strict=True))


def test_a_frozen_head_gets_no_gradient():
    given = problem(torch.float32, True)
    hidden = given["hidden"].clone().requires_grad_()
    log_probs, gap = apply(given | {"hidden": hidden})
    (gap - log_probs).sum().backward()
    _, exact = reference(given, 0.0)
    torch.testing.assert_close(hidden.grad.double(), exact[0], rtol=1e-4, atol=2e-5)
    assert given["weight"].grad is None


class Sizes(TorchDispatchMode):
    """How many elements the largest tensor has that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary_is_made(monkeypatch):
    count, hidden_size, vocabulary, tile = 512, 4, 4096, 64
    monkeypatch.setattr(loss_module, "_CPU_BLOCK", 2**12)
    ids = torch.randint(vocabulary, (count, 31))  # at once their rows would be the largest
    given = {
        "hidden": torch.randn(count, hidden_size, requires_grad=True),
        "weight": torch.randn(vocabulary, hidden_size, requires_grad=True),
        "targets": ids[:, 0].contiguous(),
        "ids": ids,
        "probs": torch.full((count, 31), 0.03),
    }
    with Sizes() as sizes:
        log_probs, gap = apply(given, tile=tile, outputs=("entropy", "is_top1"))
        (gap - log_probs).sum().backward()
    assert sizes.largest == count * tile  # TRL's own, twice the head's gradient


def test_autocast_does_not_round_the_gap():
    given = problem(torch.float32, False)
    _, exact = apply(given)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = apply(given)
    torch.testing.assert_close(cast, exact)
