"""What a hostile model, configuration or neighbour can make a merge do: nothing."""

import json
import os
import pickle
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qa.reliability.cases import Figure, Section
from qa.reliability.models import BF16, SMALL, TOKENIZER_CONFIG, Trap, adapter, with_tokenizer
from tests.support.checkpoints import llama_family as family
from tests.support.merging import change_json, cli, configuration, content, run_program

SECURITY = "Security of a merge"
PROGRAM = [sys.executable, "-m", "fusechat_merge.cli"]
PICKLES = (".bin", ".pt", ".pkl", ".pth")


def run(config: dict[str, Any], work: Path, *options: str, **environment: str) -> Any:
    """The program itself, in a folder and with a home of its own."""
    for name in ("cwd", "home", "tmp"):
        (work / name).mkdir(exist_ok=True)
    command = [*PROGRAM, "run", written(work, config), str(work / "made" / "out"), *options]
    environment |= {"HOME": str(work / "home"), "TMPDIR": str(work / "tmp")}
    return run_program(command, work / "cwd", **environment)


def written(work: Path, config: dict[str, Any] | str) -> str:
    """The path of a file with this configuration."""
    yml = work / "merge.yml"
    yml.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(yml)


def hostile(work: Path) -> list[Path]:
    """Models full of traps; each would make the folder ``mark``."""
    paths = family(work / "in", (BF16,) * 3, changes=SMALL)
    for path in paths:
        with_tokenizer(path)
    paths.append(adapter(work / "in" / "adapter", paths[0]))
    trap = pickle.dumps(Trap(work / "mark"))
    for path in paths:
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pkl", "rng_state.pth"):
            (path / name).write_bytes(trap)
        weights = "adapter_model.bin" if path.name == "adapter" else "pytorch_model.bin"
        torch.save({"model.norm.weight": Trap(work / "mark")}, path / weights)
        with zipfile.ZipFile(path / "more.zip", "w") as archive:
            archive.writestr("../../escaped", b"x")
    code = f"import os\nos.makedirs({str(work / 'mark')!r}, exist_ok=True)\n"
    for path in paths[:3]:
        (path / "trap.py").write_text(f"{code}from transformers import LlamaConfig as Trap\n")
        auto_map = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}
        change_json(path / "config.json", auto_map=auto_map)
        settings = {**TOKENIZER_CONFIG, "auto_map": {"AutoTokenizer": ["trap.Trap", "trap.Trap"]}}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return paths


def security(work: Path, scale: float, seed: int) -> Iterator[Figure]:
    """Traps in models, links, tags and places; and every file that a merge opens or changes."""
    paths = hostile(work)
    out, mark = work / "made" / "out", work / "mark"
    configs = {
        "varm": configuration(paths[:3]),
        "ties": configuration(paths[:3], "ties", parameters={"weight": 0.5, "density": 0.5}),
        "LoRA": configuration([paths[0], paths[3]]),
        "merged tokenizer": {**configuration(paths[:3]), "tokenizer_source": "union"},
        "chat template": {**configuration(paths[:3]), "chat_template": "chatml"},
    }
    yield places(work, configuration(paths[:3]))
    if scale < 0.1:
        return
    figure = Figure(SECURITY, "models full of pickles, archives and code of their own: none is run")
    for name, config in configs.items():
        ended = run(config, work)
        figure.count(not ended.returncode and not mark.exists(), f"{name}: {ended.stderr[-500:]}")
        made = sorted(content(out)) if out.exists() else []
        pickled = [n for n in made if n.endswith(PICKLES)]
        figure.count(not pickled, f"{name}: the merged model holds {pickled}")
        shutil.rmtree(work / "made", ignore_errors=True)
        shutil.rmtree(mark, ignore_errors=True)
    safe = paths[1] / "model.safetensors"
    safe.rename(work / "aside")
    ended = run(configuration(paths[:3]), work)
    refused = ended.returncode == 2 and "weights are pickled" in ended.stderr
    figure.count(refused and not mark.exists(), f"pickled weights only: {ended.stderr[-500:]}")
    (work / "aside").rename(safe)
    run(next(iter(configs.values())), work, "--trust-remote-code")
    figure.count(mark.exists(), "with --trust-remote-code the trap doesn't work: it proves nothing")
    shutil.rmtree(mark, ignore_errors=True)
    shutil.rmtree(work / "made", ignore_errors=True)
    yield figure.noted("with --trust-remote-code the same code does run, so the trap is a live one")
    yield from traced(work, configs)


def traced(work: Path, configs: dict[str, Any]) -> Iterator[Figure]:
    """Every path that the program changes or opens, from the system calls."""
    if shutil.which("strace") is None:
        return
    changed = Figure(SECURITY, "paths that a run creates, changes or renames, by strace")
    opened = Figure(
        SECURITY, "models' files that a run opens, by strace: no pickle, archive or code"
    )
    notes: set[str] = set()
    for name, config in configs.items():
        log = work / "trace"
        which = "trace=open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,chmod,fchmodat,truncate"
        PROGRAM[:0] = ["strace", "-f", "-qq", "-y", "-s", "4096", "-e", which, "-o", str(log)]
        ended = run(config, work, PYTHONDONTWRITEBYTECODE="1")
        del PROGRAM[: PROGRAM.index(sys.executable)]
        changed.count(ended.returncode == 0, f"{name}: {ended.stderr[-300:]}")
        calls = log.read_text(errors="replace")
        for path in sorted(changes_in(calls)):
            inside = path.is_relative_to(work / "made")
            device = str(path).startswith(("/dev/", "/proc/"))
            temporary = path.is_relative_to(work / "tmp") and not path.exists()
            if numba_cache(path):
                notes.add("numba's compiled code in its cache")
            elif temporary:
                notes.add("files in a private folder of TMPDIR that mergekit removes again")
            changed.count(inside or device or temporary or numba_cache(path), f"{name}: {path}")
        for path in set(re.findall(rf'"({re.escape(str(work / "in"))}[^"]*)"', calls)):
            opened.count(not path.endswith(PICKLES), f"{name}: {path}")
        shutil.rmtree(work / "made", ignore_errors=True)
    outside = "; besides " + ", ".join(sorted(notes)) if notes else ""
    yield changed.noted(f"all in OUT or in .OUT.partial beside it{outside}")
    yield opened.noted(
        "code and archives are copied byte for byte as side files are, never opened otherwise"
    )


def numba_cache(path: Path) -> bool:
    return path.name == "__pycache__" or re.search(r"\.nb[ic]($|\.)", path.name) is not None


def changes_in(log: str) -> set[Path]:
    """The paths that the calls of a trace make, change or remove."""
    found = set()
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += +(-?\d+)", line)
        if call is None or call[3].startswith("-"):
            continue
        name, arguments = call[1], call[2]
        if name in {"open", "openat"} and not re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", arguments):
            continue
        folders = re.findall(r"(?:AT_FDCWD|\d+)<([^>]*)>, \"([^\"]*)\"", arguments)
        if not folders:
            folders = [("/", path) for path in re.findall(r'"([^"]*)"', arguments)]
        found |= {Path(os.path.normpath(Path(folder) / path)) for folder, path in folders}
    return found


def places(work: Path, config: dict[str, Any]) -> Figure:
    """Names, links, tags and modes."""
    figure = Figure(SECURITY, "names, links, YAML tags and file modes")
    base, target = Path(config["base_model"]), Path(config["models"][0]["model"])
    made = work / "made" / "out"

    def refused(what: str, config: Any, message: str) -> None:
        ended = cli("run", written(work, config), made)
        fine = ended.exit_code == 2 and message in ended.stderr and not (work / "made").exists()
        figure.count(fine and "Traceback" not in ended.stderr, f"{what}: {ended.stderr[-400:]}")
        shutil.rmtree(work / "made", ignore_errors=True)

    index = target / "model.safetensors.index.json"
    other = base / "model.safetensors"
    for listed in ("../base/model.safetensors", str(other), "http://localhost:1/m.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": listed}}))
        refused(f"index with {listed}", config, "not a plain name in the same folder")
    index.unlink()
    (work / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(work / "secret")
    refused("a side file that is a link out of the model", config, "out of the model's folder")
    (base / "notes.txt").unlink()
    weights = target / "model.safetensors"
    weights.rename(work / "aside")
    weights.symlink_to(work / "secret")
    refused("weights that are a link to a secret", config, "too short for a safetensors file")
    weights.unlink()
    (work / "aside").rename(weights)
    for tag in ("!!python/object/apply:os.mkdir [%s]", "!!python/name:os.system"):
        text = tag.replace("%s", str(work / "mark"))
        refused(tag, f"merge_method: {text}", "could not determine a constructor")
    figure.count(not (work / "mark").exists(), "a YAML tag was obeyed")
    plain = (base / "config.json").read_text()
    change_json(base / "config.json", x="x" * 101_000_000)
    refused("a config.json of 101 MB", config, "is too long")
    (base / "config.json").write_text(plain)

    for mask in (0o077, 0o027, 0o022):
        before = os.umask(mask)
        cli("run", written(work, config), made)
        os.umask(before)
        paths = [made, *made.rglob("*")] if made.exists() else []
        modes = {stat.S_IMODE(path.stat().st_mode) for path in paths} or {0o777}
        wide = [f"{mode:o}" for mode in modes if mode & mask]
        figure.count(not wide, f"umask {mask:o}: {wide}")
        shutil.rmtree(work / "made", ignore_errors=True)
    return figure.noted(
        "links in a model are followed to weights and JSON, which are parsed, and refused for files that are copied"
    )


SECTIONS: dict[str, Section] = {"security-merge": security}
