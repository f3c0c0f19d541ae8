"""What two processes do at once; the first one writes down what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from trl.trainer.utils import add_fused_lm_head

from fusechat_distill.trainer import trainer as trainer_module
from fusechat_distill.trainer.trainer import DataCollatorForFusion
from tests.support import pico_training as pico

SAMPLES_A_STEP = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"max_steps": 3},
    "padding_free": {"max_steps": 3, "padding_free": True, "max_length": None},
    "accumulated": {"max_steps": 2, "gradient_accumulation_steps": 2},
}


def train(folder: Path, layout: str, world: int) -> dict[str, Any]:
    """The same samples in every step, however many processes share them."""
    size = SAMPLES_A_STEP // world
    recorder, net = pico.Recorder(), pico.model("tied")
    trainer = pico.trainer(
        folder,
        net,
        pico.rows((9, 5, 12, 7, 11, 8, 3, 10)),
        given={"eval_dataset": pico.rows((8, 8, 8, 8), seed=3), "callbacks": [recorder]},
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        clm_weight=0.5,
        optim="sgd",
        learning_rate=0.1,
        **LAYOUTS[layout],
    )
    assert trainer.accelerator.num_processes == world
    trainer.train()
    trainer.evaluate()
    return {"logs": recorder.logs, "weights": net.state_dict()}


def sharded_gradients(
    kind: str, dtype: torch.dtype | None = None, *, own_head: bool = False
) -> dict[str, torch.Tensor]:
    """One backward pass under FSDP2, each process with its half of the samples."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    net = pico.model(kind)
    add_fused_lm_head(net, outputs=("log_probs", "entropy", "is_top1"))
    trainer_module._FusionHead(clm_weight=0.25).install(net)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype) if dtype else MixedPrecisionPolicy()
    parts = [*net.model.layers, *([net.lm_head] if own_head else []), net]
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    dataset = pico.rows()
    count = sum(label != -100 for row in dataset for label in row["labels"][1:])
    mine = [dict(row) for row in dataset][rank::world]
    for row in mine:  # what preparation does to rows that the loss ignores
        for t, label in enumerate(row["labels"]):
            if t == 0 or label == -100:
                row["fusion_ids"][t], row["fusion_probs"][t] = [0] * 3, [0.0] * 3
    batch = DataCollatorForFusion(pad_token_id=0)(mine)
    batch["fusion_probs"] = batch["fusion_probs"].view(torch.int32)
    outputs = net(**batch, fused_lm_head=True)
    # FSDP averages over the processes, DDP too; `compute_loss` multiplies by their number.
    (-outputs.log_probs.sum() / count * world).backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in net.named_parameters()
    }


def main(folder: Path) -> None:
    results = {layout: train(folder / layout, layout, world=2) for layout in LAYOUTS}
    results["sharded"] = {kind: sharded_gradients(kind) for kind in ("untied", "tied", "soft_cap")}
    results["bf16"] = sharded_gradients("untied", torch.bfloat16)
    try:
        sharded_gradients("untied", own_head=True)
    except ValueError as error:
        results["refusal"] = str(error)
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
