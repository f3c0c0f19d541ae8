"""Two processes on CPU (gloo) against one, and against the dense reference under FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill.trainer import multiprocess_worker as worker
from tests.distill.trainer.test_trainer import assert_same_gradients
from tests.support import pico_training as pico

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(Path(worker.__file__)), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_two_processes_train_as_one(tmp_path, two, layout):
    one = worker.train(tmp_path, layout, world=1)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two[layout]["weights"][name], value, rtol=1e-4, atol=1e-6)
    logs = two[layout]["logs"]
    assert len(logs) == len(one["logs"])
    keys = {"loss", "clm_loss", "fusion_loss", "target_share", "target_entropy", "grad_norm"}
    keys |= {f"eval_{key}" for key in keys}
    compared = set()
    for ours, wanted in zip(logs, one["logs"], strict=True):
        for key in keys & wanted.keys():
            if layout == "padding_free" and key.startswith("eval_"):
                continue  # one row a process, of which TRL's own metrics drop one as well
            assert ours[key] == pytest.approx(wanted[key], rel=1e-5), key
            compared.add(key)
    assert {"loss", "clm_loss", "fusion_loss", "target_share"} <= compared


@pytest.mark.parametrize("case", ["untied", "tied", "soft_cap"])
def test_sharded_parameters_get_the_dense_gradients(two, case):
    wanted = pico.dense_gradients(pico.model(case), pico.rows(), clm_weight=0.25)
    assert_same_gradients(two["sharded"][case], wanted)


def test_a_head_sharded_apart_is_refused(two):
    assert "FSDP2 shards the output head as a group of its own" in two["refusal"]


def test_sharded_bf16_parameters_get_nearly_the_dense_gradients(two):
    # FSDP casts the forward's floating-point inputs; probabilities travel as bits.
    wanted = pico.dense_gradients(pico.model(), pico.rows(), clm_weight=0.25)
    assert_same_gradients(two["bf16"], wanted, tolerance=0.15)
