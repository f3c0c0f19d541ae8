"""A FusionTrainer step against TRL's SFTTrainer step on the same batches: time and peak memory.

    python benchmarks/bench_train.py

Steps alternate in one process and are compared in pairs; peak memory is measured in a process each.
Dense targets are the bf16 tensor [batch, length, vocabulary] that is usually used to train on fused
distributions; what else such a loss needs is not counted. Exit status 1 if a goal is
missed. On a GPU it measures larger models; that has not been run yet.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOP_K = 10
TIME_GOAL = 1.10
MEMORY_GOAL = 1.10
DENSE_GOAL = 0.2


@dataclass(frozen=True)
class Setting:
    """A model and a batch; the vocabulary is as large in proportion as in a real model."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    batch: int
    length: int


CPU = [
    Setting("151,936 tokens", 151_936, 128, 2, 2, 160),
    Setting("32,000 tokens", 32_000, 256, 4, 2, 256),
]
GPU = [
    Setting("151,936 tokens", 151_936, 1536, 16, 4, 2048),
    Setting("32,000 tokens", 32_000, 2048, 16, 4, 2048),
]


def rows(setting: Setting, count: int) -> Any:
    """Random tokens whose first quarter is a prompt, and a random target for each of the others."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    generator = np.random.default_rng(0)
    ids = generator.integers(10, setting.vocabulary, (count, setting.length))
    labels = ids.copy()
    labels[:, : setting.length // 4] = -100
    targets = (count * setting.length, TOP_K)
    entries = generator.integers(0, setting.vocabulary, targets).astype(np.int32)
    probs = generator.dirichlet(np.ones(TOP_K), targets[0]).astype(np.float32)

    def lists(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(
            np.arange(count + 1, dtype=np.int32) * setting.length, values
        )

    def fixed(values: Any) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(values.reshape(-1), TOP_K)

    return Dataset(
        pa.table(
            {
                "input_ids": lists(ids.reshape(-1)),
                "labels": lists(labels.reshape(-1)),
                "fusion_ids": lists(fixed(entries)),
                "fusion_probs": lists(fixed(probs)),
            }
        )
    )


def words(setting: Setting) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def trainer_for(setting: Setting, kind: str, steps: int, device: str, folder: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from fusechat_distill import FusionConfig, FusionTrainer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.hidden,
            intermediate_size=3 * setting.hidden,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.hidden // 64,
            max_position_embeddings=setting.length,
            tie_word_embeddings=False,
        )
    )
    kinds = {"sft": (SFTTrainer, SFTConfig), "fusion": (FusionTrainer, FusionConfig)}
    trainer_class, config_class = kinds[kind]
    dataset = rows(setting, setting.batch * steps)
    if kind == "sft":
        dataset = dataset.select_columns(["input_ids", "labels"])
    config = config_class(
        output_dir=folder,
        per_device_train_batch_size=setting.batch,
        max_steps=steps,
        max_length=setting.length,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
    )
    return trainer_class(model, config, train_dataset=dataset, processing_class=words(setting))


def measure_time(setting: Setting, pairs: int, device: str) -> list[list[float]]:
    """Seconds of steps of both trainers, [SFT, fusion] in turns in one process.

    A step is what the training loop does: the next batch, forward, backward, clipping, optimizer.
    On CPU its seconds are those of all cores together, which other work disturbs least.
    """
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time

    def steps(trainer: Any) -> Iterator[float]:
        trainer.create_optimizer()
        accelerator = trainer.accelerator
        model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1
        batches = iter(trainer.get_train_dataloader())
        while True:
            begin = clock()
            batch, items = trainer.get_batch_samples(batches, 1, trainer.args.device)
            trainer.training_step(model, batch[0], items)
            accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            yield clock() - begin

    with tempfile.TemporaryDirectory() as folder:
        turns = [
            steps(trainer_for(setting, kind, pairs + 1, device, folder))
            for kind in ("sft", "fusion")
        ]
        for turn in turns:
            next(turn)  # warm-up
        return [[next(turn) for turn in turns] for _ in range(pairs)]


def measure_memory(setting: Setting, kind: str, steps: int, device: str) -> dict[str, int]:
    """Bytes at the peak of a few steps: of the whole process, and of its tensors alone.

    The first is the resident set on CPU, where the allocator and other libraries blur it by some
    ten MB; the second is exact. On a GPU both are what torch's allocator had given out.
    """
    import torch
    from transformers import TrainerCallback

    class FromHere(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            reset_peak(device)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(setting, kind, steps, device, folder)
        trainer.add_callback(FromHere())
        if device == "cuda":
            trainer.train()
            return dict.fromkeys(("process", "tensors"), torch.cuda.max_memory_allocated())
        weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            trainer.train()
    with open("/proc/self/status") as file:
        process = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = itertools.accumulate(event.nbytes() for event in events)
    return {"process": process * 1024, "tensors": weights + max(held)}


def reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory freed after preparing the dataset
        with open("/proc/self/clear_refs", "w") as file:  # Linux: resets VmHWM
            file.write("5")


def apart(*what: str) -> Any:
    """Run one of the measurements in a separate process."""
    command = [sys.executable, __file__, "--measure", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(setting: Setting, pairs: int, device: str) -> bool:
    times = apart("time", setting.name, str(pairs), device)
    sft, fusion = (apart("memory", setting.name, kind, device) for kind in ("sft", "fusion"))
    added = fusion["tensors"] - sft["tensors"]
    dense = setting.batch * setting.length * setting.vocabulary * 2
    figures = [
        ("step time, fusion / SFT", statistics.median(b / a for a, b in times), TIME_GOAL),
        ("peak memory, fusion / SFT", fusion["process"] / sft["process"], MEMORY_GOAL),
        ("memory that fusion adds / dense bf16 targets", added / dense, DENSE_GOAL),
    ]
    second = statistics.median(a for a, _ in times)
    print(
        f"{setting.name} on {device}: {setting.batch} x {setting.length} tokens, "
        f"SFT {second:.2f} s and {sft['process'] / 2**20:.0f} MiB a step; "
        f"fusion adds {added / 2**20:.2f} MiB of tensors, dense targets would {dense / 2**20:.0f}"
    )
    for name, ratio, goal in figures:
        print(f"  {name:44} {ratio:6.3f}  (at most {goal:.2f})")
    return all(ratio <= goal for _, ratio, goal in figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="steps of each trainer that are timed")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, name, which, device = options.measure
        setting = next(s for s in (GPU if device == "cuda" else CPU) if s.name == name)
        result = (
            measure_time(setting, int(which), device)
            if what == "time"
            else measure_memory(setting, which, 3, device)
        )
        print(json.dumps(result))
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = GPU if device == "cuda" else CPU
    met = [compare(setting, options.pairs, device) for setting in chosen]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
