"""FusionTrainer on your own dataset: four columns, a model and a tokenizer. Offline, on the CPU.

A small model learns sums in words from a sixth of them, once by supervised fine-tuning (λ = 1) and
once also with the distributions of a model that has seen all of them (λ = 0.5). Run it with
`python examples/fusion_trainer.py`; it takes less than a minute and leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusechat_distill import FusionConfig, FusionTrainer

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS += ["eleven", "twelve"]
TOP_K = 4


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "plus", "is", *NUMBERS]
    words += [f"{NUMBERS[12]}-{n}" for n in NUMBERS[1:]]  # thirteen to twenty-four
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sums(text: PreTrainedTokenizerFast) -> Dataset:
    """Rows with `input_ids` and `labels`; labels of the question are −100 (no loss)."""
    rows = []
    for a in range(13):
        for b in range(13):
            total = NUMBERS[a + b] if a + b < 13 else f"{NUMBERS[12]}-{NUMBERS[a + b - 12]}"
            question = text(f"<s> {NUMBERS[a]} plus {NUMBERS[b]} is")["input_ids"]
            answer = text(f"{total} </s>")["input_ids"]
            labels = [-100] * len(question) + answer
            rows.append({"input_ids": question + answer, "labels": labels})
    return Dataset.from_list(rows)


def with_targets(rows: Dataset, source: Any) -> Dataset:
    """`fusion_ids` and `fusion_probs`: row t is the distribution that `labels[t]` was drawn from.

    That is what the source predicts at position t − 1, so row 0 is never used. Each row has the
    top k; the mass missing from 1 belongs to the label. A row of zeros is not a target.
    """

    def add(row: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logits = source(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        top = logits.softmax(-1).topk(TOP_K)
        none = [[0] * TOP_K]
        return {
            "fusion_ids": none + top.indices[:-1].tolist(),
            "fusion_probs": [[0.0] * TOP_K, *top.values[:-1].tolist()],
        }

    return rows.map(add)


def fresh_model(text: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(text),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def train(
    text: PreTrainedTokenizerFast, rows: Dataset, held_out: Dataset, clm_weight: float, steps: int
) -> tuple[Any, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = FusionTrainer(
            fresh_model(text),
            FusionConfig(
                output_dir=folder,
                clm_weight=clm_weight,
                max_steps=steps,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                learning_rate=3e-3,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=steps,
            ),
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=text,
        )
        trainer.train()
        return trainer.model.eval(), trainer.evaluate()


def main() -> None:
    text = tokenizer()
    everything = sums(text).shuffle(seed=0)
    few, held_out = everything.select(range(28)), everything.select(range(28, len(everything)))
    source, _ = train(text, everything, held_out, clm_weight=1.0, steps=120)
    fused = with_targets(few, source)
    _, sft = train(text, few, held_out, clm_weight=1.0, steps=40)
    _, fusion = train(text, fused, held_out, clm_weight=0.5, steps=40)
    print(f"held-out loss of SFT:    {sft['eval_clm_loss']:.3f} nats a token")
    print(f"held-out loss of fusion: {fusion['eval_clm_loss']:.3f} nats a token")


if __name__ == "__main__":
    main()
