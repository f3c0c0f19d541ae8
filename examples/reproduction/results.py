"""The results: tables beside the papers' figures, and which of their orderings hold."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pictures import forest
from steps import PIVOT, Ladder
from variants import (
    CONTROL,
    DEFAULT,
    DOMAINS,
    VARM,
    Scale,
)

from fusechat_distill.evaluation.bootstrap import Difference, Losses, bootstrap, holm
from fusechat_distill.evaluation.schema import ConfidenceInterval

LEVEL = 0.05

FIGURES = {
    PIVOT: "6.84 / -",
    "sft": "6.88 / 7.95",
    "multi": "6.99 / 8.06",
    VARM: "- / 8.22",
    "sce": "7.38 / -",
}
"""MT-Bench averages of FuseChat's Table 1 (GPT-4-0125) / of FusionChat (GPT-4-0613)."""

TARGETS = "7.17 to 7.24 / 8.08, 8.18"
"""The same averages of the papers' pairwise targets."""


@dataclass(frozen=True)
class Test:
    """One comparison within a family of tests."""

    a: str
    b: str
    difference: Difference
    p: float
    """Adjusted by Holm's method for the family."""

    @property
    def verdict(self) -> str:
        if self.p >= LEVEL:
            return "within noise"
        return "better" if self.difference.absolute.value < 0 else "worse"

    @property
    def size(self) -> float:
        return abs(self.difference.relative.value)

    def shown(self) -> str:
        return f"{_percent(self.difference.relative)}, {self.verdict}"


@dataclass(frozen=True)
class Results:
    """The losses of every model and seed on the held-out answers."""

    ladder: Ladder
    domains: np.ndarray
    """[n], of each held-out answer."""
    losses: Mapping[str, Losses]

    def intervals(
        self, names: Iterable[str], domain: str | None = None
    ) -> dict[str, ConfidenceInterval]:
        chosen = {name: self._of(name, domain) for name in names}
        return bootstrap(chosen)[0]

    def tests(
        self, pairs: Sequence[tuple[str, str]], *, seeds: int | None = None
    ) -> dict[tuple[str, str], Test]:
        """A family: every pair's difference, seed by seed."""
        chosen = {}
        for name in dict.fromkeys(name for pair in pairs for name in pair):
            of = self.losses[name]
            chosen[name] = Losses(of.bits[:seeds], of.num_bytes)
        _, differences = bootstrap(chosen, pairs)
        adjusted = holm([differences[pair].p or 0.0 for pair in pairs])
        return {
            pair: Test(*pair, differences[pair], p) for pair, p in zip(pairs, adjusted, strict=True)
        }

    def _of(self, name: str, domain: str | None) -> Losses:
        of = self.losses[name]
        return of if domain is None else of.part(self.domains == domain)


def write_results(ladder: Ladder, jobs: Mapping[str, Any], folder: Path, *, command: str) -> None:
    """RESULTS.md and the pictures, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = collect(ladder)
    parts = [_heading(results, jobs, command)]
    tests: dict[str, Test] = {}
    for part in (_ladder, _merges, _factors):
        text, more = part(results, folder)
        parts.append(text)
        tests |= more
    parts[1:1] = [_orderings(ladder.scale.sources, tests)]
    parts.append(_choice(ladder.scale, tests))
    (folder / "RESULTS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def collect(ladder: Ladder) -> Results:
    """Read (or measure) the bits that every checkpoint needs for every held-out answer."""
    paths: dict[str, list[Path]] = {}
    for variant in ladder.scale.variants:
        seeds = range(ladder.scale.seeds_of(variant))
        for target in ladder.scale.targets(variant):
            folders = [ladder.target(variant, target, seed) for seed in seeds]
            paths[_target(variant.name, target)] = folders
        if ladder.scale.targets(variant) == ladder.scale.sources:
            for merge in ladder.scale.merges:
                if variant.name == DEFAULT or merge.name == VARM:
                    paths[_merged(variant.name, merge.name)] = [
                        ladder.merged(variant.name, merge.name, s) for s in seeds
                    ]
    paths[CONTROL] = [ladder.merged(DEFAULT, CONTROL, s) for s in range(ladder.scale.seeds)]
    names = {f"m{i}": name for i, name in enumerate(paths)}
    held, measured = ladder.measure({short: paths[name] for short, name in names.items()})
    answers = sorted(
        set.intersection(*(set(one.answers) for several in measured.values() for one in several)),
        key=lambda answer: (held.rows[answer[0]], answer[1]),
    )
    num_bytes = np.array([measured[PIVOT][0].answers[a].num_bytes for a in answers], float)
    losses = {
        names.get(short) or _model(short): Losses(
            np.array([[one.answers[a].bits for a in answers] for one in several]), num_bytes
        )
        for short, several in measured.items()
    }
    domains = np.array([held.groups[held.rows[key]] for key, _ in answers])
    return Results(ladder, domains, losses)


def _model(name: str) -> str:
    return name if name == PIVOT else f"source {name}"


def _target(variant: str, target: str) -> str:
    if variant == target:
        return variant
    return f"target {target}" if variant == DEFAULT else f"{variant}: target {target}"


def _merged(variant: str, merge: str) -> str:
    return merge if variant == DEFAULT else f"{variant}: {merge}"


# The parts of RESULTS.md.


def _heading(results: Results, jobs: Mapping[str, Any], command: str) -> str:
    scale = results.ladder.scale
    wall = max(entry["wall"] for entry in jobs.values())
    cpu = sum(entry["cpu_seconds"] for entry in jobs.values())
    packages = ("torch", "transformers", "trl", "mergekit")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    models = (PIVOT, *scale.sources)
    sizes = ", ".join(f"{name} {_parameters(results.ladder, name)}" for name in models)
    counts = {
        domain: int((results.domains == domain).sum()) for domain in sorted(set(results.domains))
    }
    held = ", ".join(f"{count} of {domain}" for domain, count in counts.items())
    shown = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size")
    training = ", ".join(f"{key} {scale.training[key]}" for key in shown)
    epochs = scale.training.get("num_train_epochs", "part of an")
    factors = ", ".join(_parts(scale))
    return f"""\
# The ladder at small scale

Written by `{command}` on {datetime.date.today()};
nothing in it is edited by hand. {scale.processes} processes of one thread on {_hardware()};
{wall / 60:.0f} minutes of wall time ({cpu / 60:.0f} of CPU time); Python
{platform.python_version()}, {versions}.

- Text: questions and answers about Python's standard library, of two domains, {", ".join(DOMAINS)}.
  Each source was trained on its own domain, the pivot on a little of both, and none of them on the
  text that the targets are trained and evaluated on.
- Models (family, parameters, tokens): {sizes}.
- Targets: {1 - scale.eval_fraction:.0%} of {scale.corpus["target_bytes"]:,} bytes of answers,
  {epochs} epochs, {training}.
  The default here is λ 0.5 and k 64, and otherwise the defaults of `fusechat-distill`; each other
  recipe differs in what its row says.
- Training seeds: {scale.seeds} for the ladder and the merges, the first {scale.factor_seeds} of
  them for the single factors (shown for {factors}). They decide the order of the rows; pivot,
  sources and text are the same for all, so the intervals do not cover another pivot or other
  text.
- Measured: bits per UTF-8 byte of {len(results.domains)} held-out answers ({held}); lower is
  better.
  Intervals are 95 % intervals over answers and seeds; differences are paired by both
  (`fusechat_distill/evaluation/bootstrap.py`). *Within noise* is a p-value of {LEVEL} or more
  after Holm's correction for the table's family of tests. Models with one checkpoint (pivot,
  sources) have an interval over answers only.

The papers measured 7B models with MT-Bench; their figures can't be compared with these, only the
order can."""


def _ladder(results: Results, folder: Path) -> tuple[str, dict[str, Test]]:
    sources = results.ladder.scale.sources
    targets = [f"target {source}" for source in sources]
    rows = [PIVOT, *(f"source {source}" for source in sources)]
    rows += ["sft", CONTROL, "multi", *targets, VARM, "sce"]
    pairs = [
        ("sft", PIVOT),
        ("multi", "sft"),
        (CONTROL, "sft"),
        *((target, "sft") for target in targets),
        (VARM, "sft"),
        ("sce", "sft"),
        *((target, "multi") for target in targets),
        *((VARM, other) for other in (*targets, "multi", CONTROL)),
    ]
    tests = results.tests(pairs)
    whole = results.intervals(rows)
    domains = {domain: results.intervals(rows, domain) for domain in DOMAINS}
    table = [["", "papers", "all", *DOMAINS, "against sft"]]
    for name in rows:
        against = tests.get((name, "sft"))
        table.append(
            [
                name,
                FIGURES.get(name, TARGETS if name in targets else ""),
                _value(whole[name]),
                *(_value(domains[domain][name]) for domain in DOMAINS),
                against.shown() if against else "",
            ]
        )
    others = [test for pair, test in tests.items() if pair[1] != "sft"]
    picture = [tests[name, "sft"] for name in rows if (name, "sft") in tests] + others
    forest(
        [(f"{t.a} vs {t.b}", t.difference.relative, t.verdict) for t in picture],
        "The ladder: change of held-out bits per byte",
        folder / "ladder.png",
    )
    text = f"""\
## The ladder

MT-Bench averages of FuseChat / FusionChat beside bits per byte here.

{_table(table)}

{_table([["", "difference"], *([f"{t.a} vs {t.b}", t.shown()] for t in others)])}

![differences with intervals](ladder.png)"""
    return text, {f"{a} vs {b}": test for (a, b), test in tests.items()}


def _merges(results: Results, folder: Path) -> tuple[str, dict[str, Test]]:
    names = [merge.name for merge in results.ladder.scale.merges]
    pairs = [(name, CONTROL) for name in names]
    pairs += [(name, VARM) for name in names if name != VARM]
    tests = results.tests(pairs)
    whole = results.intervals([*names, CONTROL])
    table = [["", "FusionChat", "all", f"against {CONTROL}", f"against {VARM}"]]
    for merge in results.ladder.scale.merges:
        name = merge.name
        varm = tests.get((name, VARM))
        table.append(
            [
                name,
                "" if merge.paper is None else f"{merge.paper:.2f}",
                _value(whole[name]),
                tests[name, CONTROL].shown(),
                varm.shown() if varm else "",
            ]
        )
    forest(
        [
            (f"{name} vs {CONTROL}", t.difference.relative, t.verdict)
            for name in names
            for t in [tests[name, CONTROL]]
        ],
        "Merges of the two targets: change of held-out bits per byte",
        folder / "merges.png",
    )
    text = f"""\
## Merges of the same two targets

The control, a linear merge of two SFT seeds, has {_value(whole[CONTROL])}. Task arithmetic adds the
targets' updates at weight 0.7 (at 0.5 it is the linear merge), TIES and DARE keep half of each
update (density 0.5, normalised), SCE selects all elements, or a tenth where the row says 0.1.

{_table(table)}

![differences with intervals](merges.png)"""
    return text, {f"{a} vs {b}": test for (a, b), test in tests.items()}


def _factors(results: Results, folder: Path) -> tuple[str, dict[str, Test]]:
    scale = results.ladder.scale
    factors = [v for v in scale.variants if v.strategy == "pairwise" and v.name != DEFAULT]
    parts = _parts(scale)
    pairs = [(f"{variant.name}: {part}", part) for variant in factors for part in parts]
    tests = results.tests(pairs, seeds=scale.factor_seeds)
    last = parts[-1]
    further = [(f"{variant.name}: {last}", "sft") for variant in factors]
    names = [variant.name for variant in factors]
    at_ten = [(a, "k-10") for a in ("gold-k-10", "lambda-0.9-k-10") if {a, "k-10"} <= {*names}]
    further += [(f"{a}: {last}", f"{b}: {last}") for a, b in at_ten]
    others = results.tests([(last, "sft"), *further], seeds=scale.factor_seeds)
    table = [["factor", "here", "instead of", *parts, f"{last} against sft"]]
    table.append(["", "the default", "", *("" for _ in parts), others[last, "sft"].shown()])
    for variant in factors:
        of = [tests[f"{variant.name}: {part}", part].shown() for part in parts]
        of.append(others[f"{variant.name}: {last}", "sft"].shown())
        table.append([variant.factor, variant.level, variant.default_level, *of])
    ten = [f"{a} against {b} {others[f'{a}: {last}', f'{b}: {last}'].shown()}" for a, b in at_ten]
    forest(
        [
            (f"{variant.factor}: {variant.level}, {part}", t.difference.relative, t.verdict)
            for variant in factors
            for part in parts
            for t in [tests[f"{variant.name}: {part}", part]]
        ],
        "One factor changed: change of held-out bits per byte against the default",
        folder / "factors.png",
    )
    text = f"""\
## One factor changed

The change against the default, seed by seed ({scale.factor_seeds} seeds), where below zero is
better; and the change against SFT, as a separate family of tests.

{_table(table)}

{"At k 10: " + "; ".join(ten) + "." if ten else ""}

![differences with intervals](factors.png)"""
    del others[last, "sft"]  # the ladder has it with all its seeds
    return text, {f"{a} vs {b}": test for (a, b), test in (others | tests).items()}


def _parts(scale: Scale) -> list[str]:
    """The models that show the single factors: targets, and their merge if all were trained."""
    if not scale.factor_sources:
        return [*(f"target {source}" for source in scale.sources), VARM]
    return [f"target {source}" for source in scale.factor_sources]


def _orderings(sources: Sequence[str], tests: Mapping[str, Test]) -> str:
    """The papers' claims, and whether each holds here."""
    targets = [f"target {source}" for source in sources]
    better = [
        ("sft", PIVOT),
        ("multi", "sft"),
        *((target, other) for other in ("sft", "multi") for target in targets),
        *((VARM, other) for other in ("sft", "multi", *targets)),
        *((VARM, name) for name in ("linear", "slerp", "task arithmetic", "ties", "dare")),
        *((VARM, f"varm {name}") for name in ("layer", "model", "element")),
    ]
    small = _small(tests)
    rows = [["the papers' order", "here", "change"]]
    count: Counter[str] = Counter()
    for first, second in better:
        test = tests.get(f"{first} vs {second}") or tests[f"{second} vs {first}"]
        holds = "better" if test.a == first else "worse"
        verdict = {holds: "holds", "within noise": "within noise"}.get(test.verdict, "reversed")
        count[verdict] += 1
        if verdict != "within noise" and test.size < small:
            verdict += ", but hardly"
        change = f"{test.a} vs {test.b}: {_percent(test.difference.relative)}"
        rows.append([f"{first} better than {second}", f"**{verdict}**", change])
    names = {"holds": "hold", "reversed": "are reversed", "within noise": "are within noise"}
    said = ", ".join(f"{count[verdict]} {name}" for verdict, name in names.items())
    control = tests[f"{VARM} vs {CONTROL}"]
    return f"""\
## Which of the papers' orderings hold

Of {len(better)}, {said}. *Hardly* means a difference that is shown, but is smaller than the gain
from averaging two SFT seeds ({small:.2%}), so it is no reason to choose. The control on this page:
{control.a} against {control.b}, that is, against averaging without any source,
{control.shown()}.

{_table(rows)}"""


def _small(tests: Mapping[str, Test]) -> float:
    """The relative gain from averaging two seeds; smaller differences are no reason to choose."""
    return tests[f"{CONTROL} vs sft"].size


RECIPE = {
    "strategy": "pairwise",
    "λ": "0.9",
    "k": "10",
    "λ and k": "0.9 and 10 (the papers')",
    "tail": "renormalize",
    "tail at k 10": "renormalize",
    "vocabulary": "ms",
    "positions": "bytes",
    "template": "native",
}
"""The defaults of a recipe."""

WHY = {
    "strategy": "the papers' main result, and a source can be added later without training the "
    "other targets anew; one target for all gains most where the sources have different "
    "strengths, as here",
    "λ": "the papers' value, chosen at 7B with answers that strong models wrote; nothing of that "
    "size was measured here",
    "k": "the papers' value; models as small as these keep about half of their mass in the top 10, "
    "so they need more, and each entry costs about 3 bytes per token in every store",
    "λ and k": "the papers' values; see the rows of both",
    "tail at k 10": "the papers' way, with λ 0.9, where it costs less; with a smaller λ use gold",
    "vocabulary": "FuseChat's choice, and it needs no map over the whole vocabulary",
}
"""Why the recipe keeps its default although another level is better here."""


def _choice(scale: Scale, tests: Mapping[str, Test]) -> str:
    small, part = _small(tests), _parts(scale)[-1]
    compared = [("strategy", "multi", "pairwise", tests.get(f"{VARM} vs multi"), True)]
    compared += [
        (v.factor, v.level, v.default_level, tests.get(f"{v.name}: {part} vs {part}"), False)
        for v in scale.variants
    ]
    ten = tests.get(f"gold-k-10: {part} vs k-10: {part}")
    compared.append(("tail at k 10", "gold", "renormalize", ten, False))
    lines = []
    for factor, level, default_level, test, turned in compared:
        if test is None:
            continue
        of = f"({_percent(test.difference.relative)})"
        if test.verdict == "within noise" or test.size < small:
            lines.append(f"- {factor}: {level} or {default_level}, no relevant difference {of}.")
            continue
        wins = (test.verdict == "better") != turned
        better, other = (level, default_level) if wins else (default_level, level)
        default = RECIPE.get(factor)
        note = ""
        if default == better:
            note = " It is the recipe's default."
        elif default == other:
            note = f" The recipe's default is {default}: {WHY.get(factor, 'the papers have it')}."
        lines.append(f"- {factor}: **{better}** instead of {other} {of}.{note}")
    against = [tests[f"{m.name} vs {VARM}"] for m in scale.merges if m.name != VARM]
    sorts: dict[str, list[str]] = {"better": [], "worse": [], "no relevant difference": []}
    for test in against:
        sort = test.verdict if test.size >= small else "no relevant difference"
        sorts[sort if sort in sorts else "no relevant difference"].append(test.a)
    lines.append(
        "- merge: against VaRM by matrices, the recipe's default, "
        + "; ".join(f"{sort}: {', '.join(names)}" for sort, names in sorts.items() if names)
        + "."
    )
    papers = tests.get(f"lambda-0.9-k-10: {part} vs sft")
    if papers is not None:
        lines.append(
            f"- The recipe's unchanged defaults, λ 0.9 and k 10, against SFT: {papers.shown()}."
        )
    body = "\n".join(lines)
    return f"""\
## What to choose

These results are for small models, little data read several times, and sources that know more than
the data contain. At another size, run this with your own scale before you rely on it. A difference
is a reason to choose if it is shown and is at least {small:.2%}, the gain from averaging two SFT
seeds. In brackets: the VaRM merge against multi, and below it the first level against the second
for {part}.

{body}"""


# How numbers are written.


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(interval: ConfidenceInterval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.4f}"
    return f"{interval.value:.4f} ±{(interval.high - interval.low) / 2:.4f}"


def _percent(interval: ConfidenceInterval) -> str:
    digits = 2 if abs(interval.value) >= 0.0005 else 4
    if interval.low is None or interval.high is None:
        return f"{interval.value:+.{digits}%}"
    return f"{interval.value:+.{digits}%} [{interval.low:+.{digits}%}, {interval.high:+.{digits}%}]"


def _parameters(ladder: Ladder, name: str) -> str:
    from transformers import AutoConfig

    from fusechat_distill.estimate.measure import shape

    config = AutoConfig.from_pretrained(ladder.model(name))
    count = shape(config).parameters
    return f"({config.model_type}, {count / 1e6:.2g}M, {config.vocab_size:,})"


def _hardware() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{os.cpu_count()} cores ({cpu})"
