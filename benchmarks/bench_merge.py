"""Speed and memory of merging, as ratios: against the disk's floor and against mergekit.

Checkpoints are generated in a folder that is removed afterwards. `small` is the 1.1B Llama shape
with three targets, warm cache, the programs in turn; `seven` the 7B shape (43 GB of inputs), cold
cache, once; `wide` has two tensors of 1 GiB and five targets; `many` 20,000 small tensors;
`methods` is `small` for mergekit's methods; `experts` has layers of Qwen3-30B-A3B; `headers` plans
whole mixtures of experts without weights.

    python benchmarks/bench_merge.py small --turns 3
    python benchmarks/bench_merge.py seven --folder /data/bench
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

POOL = 1 << 25
PIECE = 64 << 20


def llama(
    hidden: int, inner: int, layers: int, vocab: int, heads: int, kv_heads: int
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and tensor shapes of a Llama."""
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (hidden, hidden),
            at + "self_attn.k_proj.weight": (kv, hidden),
            at + "self_attn.v_proj.weight": (kv, hidden),
            at + "self_attn.o_proj.weight": (hidden, hidden),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def qwen3_moe(layers: int, vocab: int) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Qwen3-30B-A3B's config.json and tensor shapes, with fewer layers and tokens if wanted."""
    hidden, inner, experts = 2048, 768, 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (4096, hidden),
            at + "self_attn.k_proj.weight": (512, hidden),
            at + "self_attn.v_proj.weight": (512, hidden),
            at + "self_attn.o_proj.weight": (hidden, 4096),
            at + "self_attn.q_norm.weight": (128,),
            at + "self_attn.k_norm.weight": (128,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.gate.weight": (experts, hidden),
        }
        shapes |= _experts(at + "mlp.experts.", experts, hidden, inner)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 6144,
        "moe_intermediate_size": inner,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def deepseek_v3() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """DeepSeek-V3's config.json and tensor shapes: 671B, and a layer for multi-token prediction."""
    hidden, inner, experts, vocab = 7168, 2048, 256, 129280
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(62):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_a_proj.weight": (1536, hidden),
            at + "self_attn.q_a_layernorm.weight": (1536,),
            at + "self_attn.q_b_proj.weight": (24576, 1536),
            at + "self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            at + "self_attn.kv_a_layernorm.weight": (512,),
            at + "self_attn.kv_b_proj.weight": (32768, 512),
            at + "self_attn.o_proj.weight": (hidden, 16384),
        }
        if layer < 3:
            shapes |= _mlp(at + "mlp.", hidden, 18432)
            continue
        shapes |= {
            at + "mlp.gate.weight": (experts, hidden),
            at + "mlp.gate.e_score_correction_bias": (experts,),
        }
        shapes |= _experts(at + "mlp.experts.", experts, hidden, inner)
        shapes |= _mlp(at + "mlp.shared_experts.", hidden, inner)
    shapes |= {
        "model.layers.61.eh_proj.weight": (hidden, 2 * hidden),
        "model.layers.61.embed_tokens.weight": (vocab, hidden),
        "model.layers.61.shared_head.head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "num_hidden_layers": 61,
        "n_routed_experts": experts,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config, shapes


def _mlp(at: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        at + "gate_proj.weight": (inner, hidden),
        at + "up_proj.weight": (inner, hidden),
        at + "down_proj.weight": (hidden, inner),
    }


def _experts(at: str, experts: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(experts):
        shapes |= _mlp(f"{at}{expert}.", hidden, inner)
    return shapes


SMALL = llama(2048, 5632, 22, 32000, 32, 4)
SEVEN = llama(4096, 14336, 32, 32000, 32, 8)
WIDE = llama(2048, 2048, 1, 1 << 18, 32, 4)
MANY = llama(64, 64, 2222, 64, 4, 4)


def generate(
    folder: Path,
    models: int,
    made: tuple[dict[str, Any], dict[str, tuple[int, ...]]],
    shard: int = 5_000_000_000,
    sparse: bool = False,
) -> list[Path]:
    """A base and targets of noise; each model's tensors are slices of its own pool of numbers.

    With `sparse` the files have their size, but no numbers and no blocks on the disk.
    """
    config, shapes = made
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(POOL, generator=generator) * 0.02
    starts = np.random.default_rng(0).integers(0, POOL, len(shapes))
    paths = []
    for number in range(models):
        path = folder / f"model{number}"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        values = noise
        if number:
            values = noise + torch.randn(POOL, generator=generator) * 2e-4 * number
        pool = values.to(torch.bfloat16).view(torch.uint8).numpy()
        begins = dict(zip(shapes, (2 * starts).tolist(), strict=True))
        _write(path, shapes, begins, None if sparse else pool, shard)
        paths.append(path)
    return paths


def _write(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    starts: dict[str, int],
    pool: np.ndarray[Any, Any] | None,
    shard: int,
) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    placed = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        file = file if len(groups) > 1 else "model.safetensors"
        header, position = {}, 0
        for name in names:
            end = position + 2 * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [position, end],
            }
            position, placed[name] = end, file
        raw = json.dumps(header).encode()
        with open(path / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            if pool is None:
                out.truncate(8 + len(raw) + position)
                continue
            for name in names:
                left, at = 2 * int(np.prod(shapes[name])), starts[name]
                while left:
                    piece = pool[at : at + min(left, PIECE)]
                    out.write(piece.data)
                    left, at = left - piece.nbytes, 0
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": placed}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def configuration(method: str, paths: list[Path]) -> dict[str, Any]:
    base, *targets = map(str, paths)
    weight = {} if method in ("varm", "fusechat_sce", "sce") else {"weight": 0.3}
    if method in ("slerp", "karcher", "model_stock"):
        weight = {}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": target, "parameters": weight} for target in targets],
        "dtype": "bfloat16",
    }
    return config if method == "linear" else config | {"base_model": base}


_RUN = """
import json, os, sys, time
start = time.perf_counter()
who, config, out, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
if who == "fusechat":
    import fusechat_merge.engine.execute as stream
    work = lambda: stream.merge(config, out, **options)
else:
    from mergekit.scripts.run_yaml import main
    work = lambda: main([config, out, "--quiet"], standalone_mode=False)
ready = time.perf_counter()
work()
end = time.perf_counter()
# Not getrusage, which includes the parent's memory at the time of the fork.
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps({"start": ready - start, "merge": end - ready, "peak": peak}))
"""


def run(who: str, config: dict[str, Any], folder: Path, **options: Any) -> dict[str, float]:
    """One merge in a process of its own: seconds of start-up and merging, peak bytes."""
    yml, out = folder / "merge.yml", folder / "out"
    yml.write_text(yaml.safe_dump(config))
    remove(out)
    ended = subprocess.run(
        [sys.executable, "-c", _RUN, who, str(yml), str(out), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if not os.environ.get("VERBOSE") else None,
        check=True,
    )
    os.sync()
    remove(out)
    return json.loads(ended.stdout.splitlines()[-1])


def remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)


def floor(paths: list[Path], folder: Path) -> dict[str, float]:
    """`cat` of all inputs plus `cp` of one plus `sync` of it."""
    files = [str(file) for path in paths for file in sorted(path.glob("*.safetensors"))]
    copy = folder / "copy"
    copy.mkdir()
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    for file in paths[0].glob("*.safetensors"):
        subprocess.run(["cp", str(file), str(copy / file.name)], check=True)
        subprocess.run(["sync", str(copy / file.name)], check=True)
    took = time.perf_counter() - start
    shutil.rmtree(copy)
    return {"start": 0.0, "merge": took, "peak": 0.0}


def forget(paths: list[Path]) -> None:
    """Drop the models' files from the page cache."""
    os.sync()
    for path in paths:
        for file in path.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="bench_merge", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def show(rows: dict[str, list[dict[str, float]]], unit: str) -> None:
    """Print medians, and the ratio of each to the row `unit`."""
    one = statistics.median(row["merge"] for row in rows[unit])
    click.echo(f"{'':28}{'merging':>10}{'ratio':>8}{'start-up':>10}{'peak RSS':>11}")
    for name, found in rows.items():
        start, merge, peak = (
            statistics.median(row[key] for row in found) for key in ("start", "merge", "peak")
        )
        click.echo(f"{name:28}{merge:9.2f}s{merge / one:8.2f}{start:9.1f}s{peak / 1e6:8.0f} MB")


_folder = click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where to work; default: the system's temporary folder.",
)


@click.group()
def main() -> None:
    """Measure merging."""


@main.command()
@click.option("--turns", default=3, show_default=True)
@click.option("--mergekit/--no-mergekit", default=True, show_default=True)
@_folder
def small(turns: int, mergekit: bool, folder: Path | None) -> None:
    """1.1B parameters, base and three targets, warm cache."""
    with workplace(folder) as place:
        paths = generate(place, 4, SMALL)
        jobs: dict[str, Callable[[], dict[str, float]]] = {
            "floor (cat + cp + sync)": lambda: floor(paths, place)
        }
        for method in ("varm", "fusechat_sce", "linear"):
            jobs[f"fusechat-merge {method}"] = lambda m=method: run(  # type: ignore[misc]
                "fusechat", configuration(m, paths), place
            )
        if mergekit:
            for method in ("varm", "task_arithmetic", "sce", "linear"):
                jobs[f"mergekit-yaml {method}"] = lambda m=method: run(  # type: ignore[misc]
                    "mergekit", configuration(m, paths), place
                )
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in range(turns):
            for name, job in jobs.items():
                rows[name].append(job())
        show(rows, "floor (cat + cp + sync)")


@main.command()
@_folder
def seven(folder: Path | None) -> None:
    """7B parameters, base and two targets, cold cache, once."""
    with workplace(folder) as place:
        paths = generate(place, 3, SEVEN)
        forget(paths)
        least = floor(paths, place)
        forget(paths)
        found = run("fusechat", configuration("varm", paths), place)
        show({"floor, cold": [least], "fusechat-merge varm": [found]}, "floor, cold")
        whole = (found["start"] + found["merge"]) / least["merge"]
        click.echo(f"start-up included: {whole:.2f} x the floor")


@main.command()
@_folder
def wide(folder: Path | None) -> None:
    """Two tensors of 1 GiB, five targets."""
    with workplace(folder) as place:
        paths = generate(place, 6, WIDE)
        found = run("fusechat", configuration("varm", paths), place)
        show({"floor": [floor(paths, place)], "fusechat-merge varm": [found]}, "floor")


@main.command()
@_folder
def many(folder: Path | None) -> None:
    """20,000 small tensors, base and one target."""
    with workplace(folder) as place:
        half = llama(64, 64, 1111, 64, 4, 4)
        results = {}
        for name, made in (("10,000", half), ("20,000", MANY)):
            paths = generate(place / name, 2, made)
            results[name] = run("fusechat", configuration("varm", paths), place)
            count = len(made[1])
            click.echo(f"{count} tensors: {1000 * results[name]['merge'] / count:.2f} ms a tensor")


@main.command()
@click.option("--turns", default=3, show_default=True)
@_folder
def methods(turns: int, folder: Path | None) -> None:
    """mergekit's methods that are computed block by block, as `small`; slerp has two inputs."""
    with workplace(folder) as place:
        paths = generate(place, 4, SMALL)
        rows: dict[str, list[dict[str, float]]] = {"floor": []}
        for _ in range(turns):
            rows["floor"].append(floor(paths, place))
            for method in ("linear", "task_arithmetic", "multislerp", "karcher", "model_stock"):
                config = configuration(method, paths)
                rows.setdefault(method, []).append(run("fusechat", config, place))
            config = configuration("slerp", paths[:2]) | {"parameters": {"t": 0.5}}
            rows.setdefault("slerp", []).append(run("fusechat", config, place))
        show(rows, "floor")


@main.command()
@click.option("--turns", default=3, show_default=True)
@_folder
def experts(turns: int, folder: Path | None) -> None:
    """Three layers of Qwen3-30B-A3B (128 experts), base and two targets, warm cache."""
    with workplace(folder) as place:
        paths = generate(place, 3, qwen3_moe(3, 32000))
        config = configuration("varm", paths)
        rows: dict[str, list[dict[str, float]]] = {"floor": [], "fusechat-merge varm": []}
        for _ in range(turns):
            rows["floor"].append(floor(paths, place))
            rows["fusechat-merge varm"].append(run("fusechat", config, place))
        show(rows, "floor")
        planned = plan_headers(config, place)
        peak = statistics.median(row["peak"] for row in rows["fusechat-merge varm"])
        click.echo(f"the plan's peak: {planned['planned'] / peak:.2f} of the measured one")


_PLAN = """
import json, sys, time
from fusechat_merge.engine.execute import peak_memory
from fusechat_merge.planning.planner import plan
start = time.process_time()
planned = plan(sys.argv[1])
took = time.process_time() - start
assert not planned.problems, planned.problems
peak = 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
tensors = len(planned.outputs)
print(json.dumps({"cpu": took, "peak": peak, "tensors": tensors, "planned": peak_memory(planned)}))
"""


def plan_headers(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """One plan in a process of its own: seconds of processor time beyond start-up, peak bytes."""
    yml = folder / "plan.yml"
    yml.write_text(yaml.safe_dump(config))
    ended = subprocess.run(
        [sys.executable, "-c", _PLAN, str(yml)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


@main.command()
@_folder
def headers(folder: Path | None) -> None:
    """Plans of whole mixtures of experts, base and two targets, whose files hold no numbers."""
    with workplace(folder) as place:
        for name, made in (("30B", qwen3_moe(48, 151936)), ("671B", deepseek_v3())):
            paths = generate(place / name, 3, made, sparse=True)
            found = plan_headers(configuration("varm", paths), place)
            click.echo(
                f"{name}: {found['tensors']} tensors a model, {found['cpu']:.1f} s of processor"
                f" time, peak {found['peak'] / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
