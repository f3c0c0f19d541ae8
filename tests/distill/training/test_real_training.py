"""What fusion is for: a pivot that learns more of a stronger source than its data alone tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast

from fusechat_distill.alignment.positions import Responses, align
from fusechat_distill.alignment.vocabularies import VocabularyMap
from fusechat_distill.fusion.fuse import AlignedScores, fuse
from fusechat_distill.text.conversations import Response
from fusechat_distill.text.tokens import first_tokens, vocabulary
from fusechat_distill.trainer.trainer import FusionConfig, FusionTrainer
from tests.support import chain
from tests.support import pico_training as pico
from tests.support.scores import scored_response

TOP_K = 10
EOS, BOS = 0, 1


def sentences(count: int, seed: int) -> list[str]:
    """Text in which a word says which four may follow it, and how likely."""
    language = np.random.default_rng(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(language.choice(syllables, language.integers(1, 4))) for _ in range(80)]
    follow = [language.choice(80, 4, replace=False) for _ in words]
    chances = language.dirichlet(np.ones(4), len(words))
    generator = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        word, text = generator.integers(80), []
        for _ in range(8):
            text.append(words[word])
            word = generator.choice(follow[word], p=chances[word])
        texts.append(" ".join(text))
    return texts


def new_model(config: type, size: int, seed: int, hidden: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 96}
    return AutoModelForCausalLM.from_config(config(vocab_size=size, **sizes, **heads))


def new_source(size: int) -> Any:
    return new_model(GPTNeoXConfig, size, seed=1, hidden=96)


def new_pivot(size: int) -> Any:
    return new_model(LlamaConfig, size, seed=2, hidden=64)


def encode(text: PreTrainedTokenizerFast, lines: list[str]) -> list[list[int]]:
    return [[BOS, *ids, EOS] for ids in text(lines)["input_ids"]]


def pretrain(model: Any, rows: list[list[int]], steps: int) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = [rows[i] for i in torch.randint(len(rows), (24,), generator=generator).tolist()]
        width = max(map(len, batch))
        ids = torch.tensor([row + [EOS] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def scored(model: Any, text: PreTrainedTokenizerFast, rows: list[list[int]]) -> list[Any]:
    lengths = vocabulary(text).lengths
    responses = []
    for row in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        gold = torch.tensor(row[1:])
        top = logprobs.topk(TOP_K)
        ends = np.cumsum(lengths[row[1:]])
        ends[-1] = -1  # the stop stands for no text
        response = Response(0, 0, int(ends[-2]), 1, ends, b"", "special")
        of_gold = logprobs.gather(1, gold[:, None])[:, 0]
        responses.append(scored_response(response, gold, top.indices, top.values, of_gold))
    return responses


def dataset(
    rows: list[list[int]], models: list[AlignedScores], only_matched: bool, lengths: list[int]
) -> Dataset:
    """The rows with targets fused from `models`; the lengths are those of the responses."""
    offsets = np.cumsum([0, *lengths])
    fused = fuse(models, offsets, np.ones(offsets[-1]), tail="gold")
    none = np.zeros((1, fused.ids.shape[1]))
    columns: list[dict[str, Any]] = []
    for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
        labels = np.array([-100, *row[1:]])
        if only_matched:
            labels[1:][~models[0].matched[start:stop]] = -100
        ids, probs = (np.concatenate([none, x[start:stop]]) for x in (fused.ids, fused.probs))
        columns.append(
            {
                "input_ids": row,
                "labels": labels.tolist(),
                "fusion_ids": ids.astype(int).tolist(),
                "fusion_probs": probs.tolist(),
            }
        )
    return Dataset.from_list(columns)


@pytest.mark.timeout(240)
def test_a_fused_pivot_is_closer_to_its_source_than_sft_is(tmp_path: Path) -> None:
    corpus, data, held_out = sentences(800, 1), sentences(72, 2), sentences(32, 3)
    source_text, pivot_text = (
        chain.tokenizer(size, ["</s>", "<s>"], "", corpus) for size in (440, 350)
    )
    source = pretrain(new_source(len(source_text)), encode(source_text, corpus), steps=150)
    pivot = pretrain(new_pivot(len(pivot_text)), encode(pivot_text, corpus[:64]), steps=40)

    tables = vocabulary(pivot_text), vocabulary(source_text)
    mapping = VocabularyMap.from_bytes(
        *tables, first_tokens(pivot_text, tables[1].tokens), {BOS: BOS, EOS: EOS}
    )

    def scores(lines: list[str]) -> tuple[list[list[int]], list[int], AlignedScores, AlignedScores]:
        rows = encode(pivot_text, lines)
        own = scored(pivot, pivot_text, rows)
        others = scored(source, source_text, encode(source_text, lines))
        mine, theirs = [], []
        for a, b in zip(own, others, strict=True):
            aligned = align(Responses.of([a]), Responses.of([b]), mapping)
            every = np.arange(len(a.tokens))
            mine.append(AlignedScores.of(every, a.ids, a.logprobs, -a.gold_logprobs))
            theirs.append(
                AlignedScores.of(aligned.matches, aligned.ids, aligned.logprobs, -b.gold_logprobs)
            )
        lengths = [len(a.tokens) for a in own]
        return rows, lengths, AlignedScores.joined(mine), AlignedScores.joined(theirs)

    rows, lengths, mine, theirs = scores(data)
    targets = dataset(rows, [mine, theirs], False, lengths)
    assert 0.3 < theirs.matched.mean() < 0.9  # the tokenizers do differ
    rows, lengths, _, theirs = scores(held_out)
    distance = dataset(rows, [theirs], True, lengths)

    def trained(seed: int, clm_weight: float) -> float:
        """Cross-entropy, in nats, against the source's distributions on held-out text."""
        net = new_pivot(len(pivot_text))
        net.load_state_dict(pivot.state_dict())
        settings = pico.arguments(
            tmp_path / f"{seed}-{clm_weight}",
            clm_weight=clm_weight,
            seed=seed,
            per_device_train_batch_size=12,
            per_device_eval_batch_size=32,
            max_steps=24,
            logging_steps=100,
            learning_rate=2e-3,
        )
        trainer = FusionTrainer(
            net,
            FusionConfig(**settings),
            train_dataset=targets,
            eval_dataset=distance,
            processing_class=pivot_text,
        )
        trainer.train()
        return trainer.evaluate()["eval_fusion_loss"]

    gains = np.array([trained(seed, 1.0) - trained(seed, 0.5) for seed in range(4)])
    # A paired t interval over the seeds: three degrees of freedom, 95 %.
    half_width = 3.182 * gains.std(ddof=1) / np.sqrt(len(gains))
    print(f"closer by {gains.mean():.4f} nats, 95 % interval ± {half_width:.4f}")
    assert gains.mean() - half_width > 0.1
