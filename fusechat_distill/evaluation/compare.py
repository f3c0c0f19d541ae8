"""Bits per byte of held-out answers: which models, which rows, and what is compared with what.

Every model sees a conversation under its own template and tokenizer, as in scoring, and cut where
`max_length` cuts the pivot's; `bits` says what is counted. Only answers that all models could be
given are counted, so that all numbers are of the same text. Transformers computes them whatever
`scoring.engine` is, in the recipe's `scoring.dtype` (or the model's own `dtype`).

Keys of `evaluation.json`:

- `format`: 1; another number, other keys. `unit`: bits per UTF-8 byte.
- `dataset`: `path`; `eval_fraction`; `conversations`, held out and different from each other;
  `copies` of these, which count once; their `answers`, those `counted` and the `bytes` of these
  (as the pivot sees them); `column`, what the groups are read from, or None.
- `groups`, by name, `all` first: `conversations` and `bytes`. A group's bits per byte are all its
  bits over all its bytes: a long answer weighs more than a short one.
- `models`, by name, in the order in which they are shown: `role` (pivot, source, target, model),
  `paths` (hub names or folders, one a training seed), `groups` by name with the estimate `value`,
  its interval `low` and `high` (None under two conversations) and `seeds` (each checkpoint's
  value), `end_bits` (bits an answer for ending it, None where no answer has a stop), `left_out`
  (answers that this model could not be given).
- `pairs`: `a`, `b`; `scope`: "seeds and samples", "this checkpoint only" where neither has several
  seeds, or whose seeds (pivot and sources have none); `seeds` (of a and b); `paired`: seed i with
  seed i; `groups` by name: `difference` (a minus b: below zero a is better) and `relative` (of
  b), each with `value`, `low`, `high`; `p`, `p_holm`, and `verdict`: better, worse or no difference
  shown (at 5 % of `p_holm`).
- `unfinished`: targets of the recipe that are not there yet.
- `method`: `level`, `resamples`, `seed`, `intervals`, `families`: what Holm's method corrects for.

Pairs: each target and each `--model` against the pivot and against the baseline `sft` where a model
has that name, and each `--model` against each target. Sources are shown, not tested. The p-values
of all pairs on `all` are one family; those of all pairs on all single groups are another.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusechat_common.errors import FusechatError
from fusechat_distill.evaluation.bootstrap import (
    RESAMPLES,
    Difference,
    Interval,
    Losses,
    bootstrap,
    holm,
)
from fusechat_distill.evaluation.candidates import ALL, Evaluated, Evaluation
from fusechat_distill.evaluation.measure import Measured, answered, load_scorer, measure, turns
from fusechat_distill.recipe.schema import PIVOT
from fusechat_distill.storage.stage import Progress

if TYPE_CHECKING:
    from fusechat_distill.storage.processes import Processes

FORMAT = 1

BASELINE = "sft"

LEVEL = 0.95

SEED = 0

INTERVALS = (
    "paired bootstrap over conversations; where a model has several training seeds, a t interval "
    "over these is put together with it (fusechat_distill.evaluation.bootstrap)"
)
FAMILIES = "all pairs on `all`; all pairs on all single groups"


def evaluate(
    evaluation: Evaluation, processes: Processes, progress: Progress
) -> tuple[dict[str, Any], dict[str, list[list[str] | None]]]:
    """The content of `evaluation.json`, and each model's answers to the questions.

    Models that were not measured before are, one by one.
    """
    measured: dict[str, list[Measured]] = {}
    answers: dict[str, list[list[str] | None]] = {}
    for model in evaluation.models:
        measured[model.name] = []
        for i, checkpoint in enumerate(model.checkpoints):
            loaded = functools.cache(
                functools.partial(load_scorer, evaluation, checkpoint, processes)
            )
            several = f" ({i + 1} of {len(model.checkpoints)} seeds)"
            title = f"evaluate {model.name}" + (several if len(model.checkpoints) > 1 else "")
            measured[model.name].append(measure(evaluation, checkpoint, title, loaded, progress))
            if i == 0 and evaluation.questions is not None:
                title = f"answers of {model.name}"
                answers[model.name] = answered(evaluation, checkpoint, title, loaded, progress)
    return summary(evaluation, measured), answers


def summary(evaluation: Evaluation, measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Estimates, intervals and tests over the answers that all models were given."""
    held, recipe = evaluation.held_out, evaluation.inputs.recipe
    checkpoints = [one for several in measured.values() for one in several]
    common = set.intersection(*(set(one.answers) for one in checkpoints))
    if not common:
        raise FusechatError(
            "there is no held-out answer that all models could be given; leave models out, or "
            "raise dataset.eval_fraction"
        )
    # In the rows' order, so that the same answers give the same sums.
    answers = sorted(common, key=lambda answer: (held.rows[answer[0]], answer[1]))
    rows, row_of = np.unique([held.rows[key] for key, _ in answers], return_inverse=True)
    losses = {
        name: Losses(
            np.stack([_sums(one, answers, row_of, "bits") for one in several]),
            _sums(several[0], answers, row_of, "num_bytes"),
        )
        for name, several in measured.items()
    }
    labels = np.array([held.groups[row] for row in rows])
    groups = {ALL: np.ones(len(rows), dtype=bool)}
    if held.column is not None:
        groups |= {label: labels == label for label in sorted(set(labels.tolist()))}
    pairs = compared(evaluation.models)
    found = {
        group: bootstrap(
            {name: of.part(chosen) for name, of in losses.items()}, pairs, level=LEVEL, seed=SEED
        )
        for group, chosen in groups.items()
    }
    pivot_bytes = losses[PIVOT].num_bytes
    return {
        "format": FORMAT,
        "unit": "bits per UTF-8 byte",
        "dataset": {
            "path": recipe.dataset.path,
            "eval_fraction": recipe.dataset.eval_fraction,
            "conversations": len(held.conversations),
            "copies": held.copies,
            "answers": sum(len(turns(c)) for c in held.conversations),
            "counted": len(answers),
            "bytes": int(pivot_bytes.sum()),
            "column": held.column,
        },
        "groups": {
            group: {
                "conversations": int(chosen.sum()),
                "bytes": int(pivot_bytes[chosen].sum()),
            }
            for group, chosen in groups.items()
        },
        "models": {
            model.name: {
                "role": model.role,
                "paths": [checkpoint.spec.model for checkpoint in model.checkpoints],
                "groups": {
                    group: _interval(found[group][0][model.name])
                    | {"seeds": losses[model.name].part(chosen).by_seed().tolist()}
                    for group, chosen in groups.items()
                },
                "end_bits": _end_bits(measured[model.name], answers),
                "left_out": max(one.left_out for one in measured[model.name]),
            }
            for model in evaluation.models
        },
        "pairs": _pairs(pairs, {group: differences for group, (_, differences) in found.items()}),
        "unfinished": list(evaluation.unfinished),
        "method": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
            "intervals": INTERVALS,
            "families": FAMILIES,
        },
    }


def compared(models: Sequence[Evaluated]) -> list[tuple[str, str]]:
    """The pairs that are tested: what was made against what it is to be better than."""
    targets = [model.name for model in models if model.role == "target"]
    further = [model.name for model in models if model.role == "model"]
    baselines = [name for name in (BASELINE, f"target {BASELINE}") if name in targets + further]
    pairs = []
    for name in [*targets, *further]:
        others = [PIVOT, *baselines]
        if name in further and name not in baselines:
            others += [target for target in targets if target not in baselines]
        pairs += [(name, other) for other in others if other != name]
    return pairs


def _sums(
    measured: Measured, answers: Sequence[tuple[str, int]], rows: Any, what: str
) -> np.ndarray:
    """What the answers of each conversation add up to."""
    values = np.array([getattr(measured.answers[answer], what) for answer in answers], float)
    return np.bincount(rows, weights=values)


def _end_bits(several: Sequence[Measured], answers: Sequence[tuple[str, int]]) -> float | None:
    ends = [one.answers[answer].end_bits for one in several for answer in answers]
    known = [bits for bits in ends if bits is not None]
    return float(np.mean(known)) if known else None


def _pairs(
    pairs: Sequence[tuple[str, str]],
    found: Mapping[str, Mapping[tuple[str, str], Difference]],
) -> list[dict[str, Any]]:
    adjusted: dict[tuple[str, tuple[str, str]], float] = {}
    for family in ([ALL], [group for group in found if group != ALL]):
        tests = [(group, pair) for group in family for pair in pairs]
        known = {test: p for test in tests if (p := found[test[0]][test[1]].p) is not None}
        adjusted |= dict(zip(known, holm(list(known.values())), strict=True))
    entries = []
    for pair in pairs:
        difference = found[ALL][pair]
        entries.append(
            {
                "a": pair[0],
                "b": pair[1],
                "scope": _scope(pair, difference.seeds),
                "seeds": list(difference.seeds),
                "paired": difference.paired,
                "groups": {
                    group: {
                        "difference": _interval(of[pair].absolute),
                        "relative": _interval(of[pair].relative),
                        "p": of[pair].p,
                        "p_holm": adjusted.get((group, pair)),
                        "verdict": _verdict(of[pair], adjusted.get((group, pair))),
                    }
                    for group, of in found.items()
                },
            }
        )
    return entries


def _scope(pair: tuple[str, str], seeds: tuple[int, int]) -> str:
    """What an interval holds for: pivot and sources are what they are, all else was trained."""
    trained = dict(zip(pair, seeds, strict=True))
    trained.pop(PIVOT, None)
    several = [name for name, count in trained.items() if count > 1]
    if len(several) == len(trained):
        return "seeds and samples"
    (one, *_) = (name for name in trained if name not in several)
    return f"seeds of {several[0]}, this checkpoint of {one}" if several else "this checkpoint only"


def _verdict(difference: Difference, p: float | None) -> str:
    if p is None or p >= 1 - LEVEL:
        return "no difference shown"
    return "better" if difference.absolute.value < 0 else "worse"


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
