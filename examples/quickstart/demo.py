"""Train a small pivot and three targets on text at hand, merge them with `varm`, show the result.

    python examples/quickstart/demo.py

Needs no network. A part that is finished is used again by the next run, and made anew once what it
was made from has changed: edit a merge configuration it wrote, say, and run it again.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import corpus
import result
import torch
import training
import yaml
from parts import Parts, command, digest
from rich.console import Console
from tqdm import tqdm

HERE = Path(__file__).parent
METHODS = ("linear", "varm")


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/quickstart"))
    out = parser.parse_args().out
    if Parts(out).are_foreign():
        parser.error(f"{out} was not made by this demo; name another folder with --out")
    run(out, training.Settings())


def run(out: Path, settings: training.Settings) -> None:
    """Make what isn't there yet below `out`, then print the result."""
    torch.set_num_threads(2)  # more don't help so small a model, and would change the last digits
    make = Parts(out).make

    made_from = [settings, sys.version, digest([HERE / "corpus.py", HERE / "training.py"])]
    made_from += [version(package) for package in ("tokenizers", "transformers", "torch")]
    text = make("text", made_from, partial(corpus.write, settings.vocabulary, settings.every))
    pivot = make("pivot", made_from, partial(training.train_pivot, settings, text, corpus.GENERAL))
    targets = {
        domain: make(
            f"targets/{domain}",
            made_from,
            partial(training.train_target, settings, text, domain, pivot),
        )
        for domain in corpus.DOMAINS
    }

    made_from += [version("mergekit"), digest(_package("fusechat_merge"))]
    configs = {method: out / f"{method}.yml" for method in METHODS}
    merged = {}
    for method, config in configs.items():
        if not config.exists():
            config.write_text(configuration(method, pivot, targets.values()), encoding="utf-8")
        made_from.append(config.read_text(encoding="utf-8"))
        merged[method] = make(
            f"merged/{method}", made_from, partial(command, "mergekit-yaml", config)
        )
    analysis = make(
        "analysis",
        made_from,
        partial(command, "fusechat-merge", "analyze", configs["varm"], "--out"),
    )

    models = {"pivot": pivot, **targets, **merged}
    made_from.append(digest([HERE / "result.py"]))
    evaluation = make("evaluation", made_from, partial(evaluate, settings, text, models))
    losses = json.loads((evaluation / "losses.json").read_text(encoding="utf-8"))

    Console().print(result.table(losses))
    print(*result.in_words(losses, "varm", [name for name in models if name != "varm"]), sep="\n")
    print("(one run with one seed: small differences mean little)\n")
    print(f"merged weights   {merged['varm']}, {merged['linear']}")
    print(f"heat map         {analysis / 'analysis.png'}")
    print(f"losses           {evaluation / 'losses.png'}")
    print(f"try another way  edit {configs['varm']} and run this again")


def configuration(method: str, pivot: Path, targets: Iterable[Path]) -> str:
    """The mergekit YAML that merges the targets; `linear`, a plain mean, needs no pivot."""
    config: dict[str, object] = {"merge_method": method}
    hint = ""
    if method == "linear":
        config["models"] = [{"model": str(t), "parameters": {"weight": 1.0}} for t in targets]
    else:
        config["base_model"] = str(pivot)
        config["models"] = [{"model": str(target)} for target in targets]
        config["parameters"] = {"granularity": "matrix"}
        hint = "# granularity: matrix, module, layer, model or element\n"
    config["dtype"] = "bfloat16"
    return hint + yaml.safe_dump(config, sort_keys=False)


def evaluate(
    settings: training.Settings, text: Path, models: Mapping[str, Path], folder: Path
) -> None:
    """Write every model's held-out loss in every domain, and the picture of it, into `folder`."""
    losses = {
        name: {
            domain: training.held_out_loss(settings, text, domain, checkpoint)
            for domain in corpus.DOMAINS
        }
        for name, checkpoint in tqdm(models.items(), desc="evaluating", unit="model")
    }
    (folder / "losses.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    result.draw(losses, "pivot", folder / "losses.png")


def _package(name: str) -> list[Path]:
    """The source files of an installed package."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return sorted(Path(spec.origin).parent.rglob("*.py"))


if __name__ == "__main__":
    main()
