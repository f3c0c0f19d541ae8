"""Scorers against a dense float64 reference: the full softmax, then a sort."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    PhiConfig,
    Qwen3Config,
)

from fusechat_common.errors import FusechatError
from fusechat_distill.scoring.engine import Request, Scores, checked_scores
from fusechat_distill.scoring.head import Head, set_logprobs, topk_logprobs
from fusechat_distill.scoring.transformers_engine import TransformersScorer
from fusechat_distill.scoring.vllm_engine import scores_from_prompt_logprobs

ROWS = 515
"""Rows of the models' heads; the last are padding."""
ABSENT = 17
"""An id inside the vocabulary that no token has."""
TOKENS = [i for i in range(509) if i != ABSENT]

SMALL = {
    "vocab_size": ROWS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0}
COHERE = {"logit_scale": 0.25, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MPT = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": ROWS, "logit_scale": 0.3}
ARCHITECTURES = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3, tied": Qwen3Config(**GROUPED, head_dim=12, tie_word_embeddings=True),
    "gemma2, soft cap": Gemma2Config(**GROUPED, **GEMMA),
    "mixtral, experts": MixtralConfig(**GROUPED, num_local_experts=4),
    "cohere, scale": CohereConfig(**GROUPED, **COHERE),
    "granite, divisor": GraniteConfig(**GROUPED, logits_scaling=8.0),
    "phi, bias": PhiConfig(**GROUPED),
    "mpt, a scale it ignores": MptConfig(**MPT),
    "gpt_neox, absolute": GPTNeoXConfig(**SMALL),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)  # sharper than at initialisation: caps and scales matter
        elif not parameter.any():
            parameter.data.normal_(std=0.5)  # biases start at zero
    return model


def requests(rng: np.random.Generator, lengths=(5, 30, 17, 60, 2, 17)) -> list[Request]:
    made = []
    for length in lengths:
        ids = rng.choice(TOKENS, length)
        scored = np.sort(rng.choice(length - 1, max(1, length // 2), replace=False))
        made.append(Request(ids, scored))
    return made


def reference(model, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Dense: [R, V] float64 log-probabilities over the tokens that exist, and gold's [R]."""
    with torch.no_grad():
        logits = model(torch.tensor(request.input_ids)[None], use_cache=False).logits[0]
    logits = logits.double().numpy()[request.positions]
    dead = np.setdiff1d(np.arange(logits.shape[1]), TOKENS)
    logits[:, dead] = -np.inf
    highest = logits.max(1, keepdims=True)
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
    gold = [request.input_ids[p + 1] for p in request.positions]
    return logprobs, logprobs[np.arange(len(gold)), gold]


def assert_scores(scores: Scores, logprobs: np.ndarray, gold: np.ndarray, tolerance: float) -> None:
    k = scores.ids.shape[1]
    assert scores.ids.dtype == np.uint32
    assert scores.logprobs.dtype == scores.gold_logprobs.dtype == np.float32
    np.testing.assert_allclose(scores.gold_logprobs, gold, atol=tolerance)
    np.testing.assert_allclose(scores.logprobs, -np.sort(-logprobs, 1)[:, :k], atol=tolerance)
    named = np.take_along_axis(logprobs, scores.ids.astype(np.int64), 1)
    np.testing.assert_allclose(scores.logprobs, named, atol=tolerance)
    assert all(len(set(row)) == k for row in scores.ids.tolist())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_the_dense_reference(name):
    model = build(name)
    scorer = TransformersScorer(model, TOKENS, top_k=7, batch_tokens=70)
    wanted = requests(np.random.default_rng(1))
    results = list(scorer.score(wanted))
    assert len(results) == len(wanted)
    for request, scores in zip(wanted, results, strict=True):
        assert_scores(scores, *reference(model, request), tolerance=5e-6)
        assert scores.finite


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap", "phi, bias"])
def test_what_tokens_have_together(name):
    model = build(name)
    rng = np.random.default_rng(3)

    def with_sets(request: Request) -> Request:
        rows = rng.integers(len(request.positions), size=3).tolist()
        sets = [np.sort(rng.choice(TOKENS, size, replace=False)) for size in (1, 40, 0)]
        return dataclasses.replace(request, sets=tuple(zip(rows, sets, strict=True)))

    wanted = [with_sets(request) for request in requests(rng)]
    plain = TransformersScorer(model, TOKENS, top_k=1, batch_tokens=70)
    for request, scores in zip(wanted, plain.score(wanted), strict=True):
        logprobs, _ = reference(model, request)
        for (row, ids), found in zip(request.sets, scores.set_logprobs, strict=True):
            expected = np.log(np.exp(logprobs[row, ids]).sum()) if len(ids) else -np.inf
            assert found == pytest.approx(expected, abs=5e-6)
    with torch.inference_mode(), plain._head() as head:
        hidden = torch.randn(9, 48)
        sets = [torch.tensor(TOKENS)[:5]] * 9
        whole = set_logprobs(hidden, head, sets)
        cut = set_logprobs(hidden, head, sets, tile_elements=2 * ROWS)
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2, soft cap"])
def test_bfloat16_heads_accumulate_in_float32(name):
    model = build(name, torch.bfloat16)
    scorer = TransformersScorer(model, TOKENS, top_k=7, batch_tokens=1)
    exact = build(name, torch.bfloat16)
    head = exact.get_output_embeddings()
    hidden: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda module, args: hidden.append(args[0][0].double()))
    for request, scores in zip(
        wanted := requests(np.random.default_rng(2)), scorer.score(wanted), strict=True
    ):
        hidden.clear()
        with torch.no_grad():
            exact(torch.tensor(request.input_ids)[None], use_cache=False)
            logits = hidden[0][torch.tensor(request.positions)] @ head.weight.double().T
        if "cap" in name:
            logits = 2.0 * torch.tanh(logits / 2.0)
        logits[:, [ABSENT, *range(509, ROWS)]] = -torch.inf
        logprobs = logits.log_softmax(-1).numpy()
        gold = logprobs[np.arange(len(request.positions)), request.gold]
        assert_scores(scores, logprobs, gold, tolerance=2e-5)


def test_batching_and_order_change_nothing():
    model = build("llama")
    wanted = requests(np.random.default_rng(3), lengths=(9, 40, 3, 40, 21, 8, 8, 60))
    alone = [
        next(TransformersScorer(model, TOKENS, top_k=5, batch_tokens=1).score([request]))
        for request in wanted
    ]
    together = TransformersScorer(model, TOKENS, top_k=5, batch_tokens=10_000).score(wanted)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-6)
        np.testing.assert_array_equal(one.ids, other.ids)
    assert list(TransformersScorer(model, TOKENS, top_k=5).score([])) == []


def test_batches_hold_to_their_budget_and_share_a_length():
    model = build("llama")
    scorer = TransformersScorer(model, TOKENS, top_k=5, batch_tokens=64)
    shapes, sizes = [], []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    wanted = requests(np.random.default_rng(4), lengths=(10, 33, 64, 100, 31, 9, 8, 33))
    list(scorer.score(wanted))
    assert shapes == [(1, 100), (1, 64), (1, 33), (1, 33), (2, 31), (2, 9)]
    # The model's own logits are never more than those of one state.
    assert set(sizes) == {ROWS}


def test_out_of_memory_halves_the_batch_and_goes_on(caplog):
    model = build("llama")
    scorer = TransformersScorer(model, TOKENS, top_k=5, batch_tokens=400)
    limit = 90

    def allocate(module, args, kwargs):
        if kwargs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.model.register_forward_pre_hook(allocate, with_kwargs=True)
    wanted = requests(np.random.default_rng(6), lengths=(40, 39, 38, 37, 36, 35, 20, 20))
    for request, scores in zip(wanted, scorer.score(wanted), strict=True):
        assert_scores(scores, *reference(model, request), tolerance=5e-6)
    assert scorer.batch_tokens == 80
    assert caplog.messages == [
        "out of memory: continuing with batch_tokens: 160",
        "out of memory: continuing with batch_tokens: 80",
    ]
    limit = 30
    with pytest.raises(FusechatError) as caught:
        list(scorer.score(wanted))
    assert str(caught.value).endswith(
        ": one sample of 40 tokens does not fit into memory; lower max_length, or give the model "
        "more devices (`load: {device_map: auto}`)"
    )


def test_errors_other_than_memory_are_not_swallowed():
    scorer = TransformersScorer(build("llama"), TOKENS, top_k=5)
    with pytest.raises(IndexError):
        list(scorer.score([Request(np.array([1, 99_999]), np.array([0]))]))


def test_nan_is_seen_in_its_own_sample_only():
    model = build("llama")
    scorer = TransformersScorer(model, TOKENS, top_k=5, batch_tokens=1000)
    model.model.embed_tokens.weight.data[3] = float("nan")
    wanted = requests(np.random.default_rng(7))
    for request in wanted:
        request.input_ids[request.input_ids == 3] = 4
    wanted[2].input_ids[0] = 3
    finite = [scores.finite for scores in scorer.score(wanted)]
    assert finite == [i != 2 for i in range(len(wanted))]


def other_logits(model) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out.abs())


def infinite(model) -> None:
    model.model.norm.weight.data[0] = float("inf")


def quantised(model) -> None:
    weight = model.lm_head.weight.to(torch.int8)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("damage", "tokens", "message"),
    [
        (other_logits, TOKENS, "a llama model's logits are not its output head's"),
        (infinite, TOKENS, "gives NaN or Inf for the simplest input"),
        (quantised, TOKENS, "its output head is Linear without a plain weight"),
        (None, [1, 5], r"has 2 tokens; set scoring\.top_k to at most that"),
    ],
)
def test_a_model_that_can_not_be_scored_is_refused(damage, tokens, message):
    model = build("llama")
    if damage is not None:
        damage(model)
    with pytest.raises(FusechatError, match=message):
        TransformersScorer(model, tokens, top_k=3)


def test_loads_from_safetensors_only(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "safe")
    loaded = TransformersScorer.load(
        str(tmp_path / "safe"), TOKENS, dtype="float32", top_k=5, batch_tokens=200
    )
    wanted = requests(np.random.default_rng(8))
    for request, scores in zip(wanted, loaded.score(wanted), strict=True):
        assert_scores(scores, *reference(model, request), tolerance=5e-6)
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TransformersScorer.load(str(tmp_path / "pickled"), TOKENS)


# The head by itself.


def dense(hidden, head: Head, gold, k):
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits += head.bias.double()
    logits *= head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    logits = logits[:, : head.vocabulary_size]
    if head.absent is not None:
        logits[:, head.absent] = -torch.inf
    logprobs = logits.log_softmax(-1)
    return logprobs, logprobs[torch.arange(len(gold)), gold]


@pytest.mark.parametrize("tile_elements", [64, 1000, 4096, None])
@pytest.mark.parametrize("size", [63, 64, 65, 300, 1000])
@pytest.mark.parametrize("k", [1, 10, 63])
def test_head_tiles_of_every_shape(tile_elements, size, k):
    rng = torch.Generator().manual_seed(size * k)
    rows = size + 5
    head = Head(
        weight=torch.randn(rows, 16, generator=rng),
        vocabulary_size=size,
        bias=torch.randn(rows, generator=rng),
        scale=0.7,
        soft_cap=8.0,
    )
    hidden = torch.randn(37, 16, generator=rng)
    gold = torch.randint(0, size, (37,), generator=rng)
    ids, logprobs, gold_logprobs = topk_logprobs(hidden, head, gold, k, tile_elements=tile_elements)
    expected, expected_gold = dense(hidden, head, gold, k)
    torch.testing.assert_close(logprobs.double(), expected.topk(k).values, atol=5e-6, rtol=0)
    torch.testing.assert_close(gold_logprobs.double(), expected_gold, atol=5e-6, rtol=0)
    torch.testing.assert_close(logprobs.double(), expected.gather(1, ids), atol=5e-6, rtol=0)


@pytest.mark.parametrize("absent", [None, torch.arange(0, 130)])  # whole tiles
def test_head_in_float64_is_exact(absent):
    rng = torch.Generator().manual_seed(0)
    head = Head(torch.randn(500, 16, generator=rng).double() * 20, 500, absent=absent)
    hidden = torch.randn(9, 16, generator=rng, dtype=torch.float64)
    gold = torch.arange(200, 209)
    ids, logprobs, gold_logprobs = topk_logprobs(hidden, head, gold, 5, tile_elements=9 * 64)
    expected, expected_gold = dense(hidden, head, gold, 5)
    assert absent is None or (ids >= 130).all()
    torch.testing.assert_close(logprobs, expected.topk(5).values, atol=1e-11, rtol=0)
    torch.testing.assert_close(gold_logprobs, expected_gold, atol=1e-11, rtol=0)


def test_head_ties_go_in_id_order_and_zeros_are_uniform():
    head, gold = Head(torch.zeros(200, 4), 200), torch.tensor([0, 5, 199])
    ids, logprobs, golds = topk_logprobs(torch.zeros(3, 4), head, gold, 6, tile_elements=200)
    assert (ids.diff(dim=1) > 0).all()
    torch.testing.assert_close(logprobs, torch.full((3, 6), -math.log(200)))
    torch.testing.assert_close(golds, torch.full((3,), -math.log(200)))


def test_head_takes_large_logits_and_no_rows():
    head = Head(torch.tensor([[1e4], [-1e4], [9999.0]]), 3)
    ids, logprobs, gold = topk_logprobs(torch.ones(1, 1), head, torch.tensor([1]), 3)
    assert ids.tolist() == [[0, 2, 1]]
    torch.testing.assert_close(logprobs, torch.tensor([[-0.3132617, -1.3132617, -20000.3132617]]))
    torch.testing.assert_close(gold, torch.tensor([-20000.3132617]))
    shapes = [t.shape for t in topk_logprobs(torch.ones(0, 1), head, torch.zeros(0).long(), 2)]
    assert shapes == [(0, 2), (0, 2), (0,)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_head_turns_what_is_not_finite_into_nan_for_that_row_only(bad):
    head = Head(torch.randn(300, 4, generator=torch.Generator().manual_seed(1)), 300)
    hidden = torch.ones(3, 4)
    hidden[1, 2] = bad
    _, logprobs, gold = topk_logprobs(hidden, head, torch.arange(3), 5, tile_elements=300)
    assert torch.isfinite(logprobs).all(1).tolist() == [True, False, True]
    assert torch.isfinite(gold).tolist() == [True, False, True]


# vLLM: what it answers, in its documented form, without it.


def test_prompt_logprobs_are_shifted_filtered_and_sorted():
    request = Request(np.array([5, 6, 7, 8]), np.array([0, 2]))
    known = frozenset(range(10))
    rows = [
        row and {token: SimpleNamespace(logprob=logprob) for token, logprob in row.items()}
        for row in (
            None,
            {6: -9.0, 1: -1.0, 99: -0.5, 3: -1.0, 2: -3.0},
            {7: -0.1},
            {8: -0.2, 4: -2.0, 2: -4.0},
        )
    ]
    scores = scores_from_prompt_logprobs(rows, request, known, 3)
    assert scores.ids.tolist() == [[1, 3, 2], [8, 4, 2]]
    np.testing.assert_allclose(scores.logprobs, [[-1, -1, -3], [-0.2, -2, -4]], rtol=1e-6)
    np.testing.assert_allclose(scores.gold_logprobs, [-9, -0.2], rtol=1e-6)
    last = Request(request.input_ids, np.array([2]))
    with pytest.raises(
        FusechatError, match="hold 3 tokens of the tokenizer's, fewer than top_k: 4"
    ):
        scores_from_prompt_logprobs(rows, last, known, 4)
    with pytest.raises(FusechatError, match="vLLM gave no log-probabilities for token 1"):
        scores_from_prompt_logprobs([None, None], request, known, 3)


LOGPROBS = np.log(np.array([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1]], dtype=np.float32))
IDS = np.array([[4, 2, 9], [1, 3, 5]], dtype=np.uint32)


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([Scores(IDS, LOGPROBS, LOGPROBS[:, 0])], None),
        ([Scores(IDS, LOGPROBS * np.nan, LOGPROBS[:, 0])], None),  # the caller leaves it out
        ([], "gave 0 scores for 1 requests"),
        ([Scores(IDS[:, :2], LOGPROBS[:, :2], LOGPROBS[:, 0])], "gave scores of shapes"),
        ([Scores(IDS[1:], LOGPROBS[1:], LOGPROBS[1:, 0])], "gave scores of shapes"),
        ([Scores(IDS, LOGPROBS, LOGPROBS)], "gave scores of shapes"),
        ([Scores(IDS[:, ::-1], LOGPROBS[:, ::-1], LOGPROBS[:, 0])], "no natural log-prob"),
        ([Scores(IDS, np.exp(LOGPROBS), LOGPROBS[:, 0])], "no natural log-prob"),
        ([Scores(IDS, LOGPROBS / np.log(np.float32(10)), LOGPROBS[:, 0])], "no natural log-prob"),
    ],
)
def test_what_an_engine_gives_is_checked_before_it_is_kept(scores, problem):
    class Engine:
        def score(self, requests):
            yield from scores

    request = Request(np.arange(5), np.array([1, 3]))
    if problem is None:
        assert checked_scores(Engine(), [request], 3) == scores
    else:
        with pytest.raises(FusechatError, match=f"^Engine: .*{problem}"):
            checked_scores(Engine(), [request], 3)
