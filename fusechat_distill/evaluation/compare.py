"""Bits per byte of held-out answers: which models, which rows, and what is compared with what.

Every model sees a conversation under its own template and tokenizer, as in scoring, and cut where
`max_length` cuts the pivot's; `bits` says what is counted. Only answers that all models could
score are counted, so that all numbers are of the same text. Transformers computes them whatever
`scoring.engine` is, in the recipe's `scoring.dtype` (or the model's own `dtype`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fusechat_common.errors import FusechatError
from fusechat_distill.evaluation.bootstrap import RESAMPLES, Difference, Losses, bootstrap, holm
from fusechat_distill.evaluation.candidates import Candidate, EvaluationPlan
from fusechat_distill.evaluation.measure import CheckpointBits, CheckpointEvaluation, answer_turns
from fusechat_distill.evaluation.schema import (
    ALL,
    BitsPerByte,
    ConfidenceInterval,
    EvaluatedDataset,
    EvaluatedModel,
    Evaluation,
    EvaluationMethod,
    GroupDifference,
    GroupSize,
    Pair,
    Verdict,
)
from fusechat_distill.recipe.schema import PIVOT
from fusechat_distill.storage.stage import Progress

if TYPE_CHECKING:
    from fusechat_distill.storage.processes import Processes

BASELINE = "sft"

LEVEL = 0.95

SEED = 0

INTERVALS = (
    "paired bootstrap over conversations; where a model has several training seeds, a t interval "
    "over these is put together with it (fusechat_distill.evaluation.bootstrap)"
)
FAMILIES = "all pairs on `all`; all pairs on all single groups"


def evaluate(
    plan: EvaluationPlan, processes: Processes, progress: Progress
) -> tuple[Evaluation, dict[str, list[list[str] | None]]]:
    """The content of `evaluation.json`, and each model's answers to the questions.

    One checkpoint after the other is loaded, and only if an earlier run did not evaluate it.
    """
    bits: dict[str, list[CheckpointBits]] = {}
    answers: dict[str, list[list[str] | None]] = {}
    for candidate in plan.candidates:
        name, count = candidate.name, len(candidate.checkpoints)
        bits[name] = []
        for i, model in enumerate(candidate.checkpoints):
            checkpoint = CheckpointEvaluation(plan, model, processes, progress)
            seed = f" ({i + 1} of {count} seeds)" if count > 1 else ""
            bits[name].append(checkpoint.bits(f"evaluate {name}{seed}"))
            if i == 0 and plan.questions is not None:
                answers[name] = checkpoint.answers(f"answers of {name}")
    return summary(plan, bits), answers


def summary(plan: EvaluationPlan, bits: Mapping[str, Sequence[CheckpointBits]]) -> Evaluation:
    """Estimates, intervals and tests over the answers that all models could score.

    Args:
        bits: of each candidate's checkpoints, by the candidate's name.

    Raises:
        FusechatError: there is no such answer.
    """
    held_out, recipe = plan.held_out, plan.inputs.recipe
    common = set.intersection(*(set(one.answers) for several in bits.values() for one in several))
    if not common:
        raise FusechatError(
            "no held-out answer can be scored by all models; leave models out, or "
            "raise dataset.eval_fraction"
        )
    # In the rows' order, so that the same answers give the same sums.
    answers = sorted(common, key=lambda answer: (held_out.rows[answer[0]], answer[1]))
    # The samples of the bootstrap are conversations: `rows` [n], and each answer's index in it.
    rows, sample_of = np.unique([held_out.rows[key] for key, _ in answers], return_inverse=True)
    losses = {
        name: Losses(
            np.stack([_sums(one, answers, sample_of, "bits") for one in several]),
            _sums(several[0], answers, sample_of, "num_bytes"),
        )
        for name, several in bits.items()
    }
    # Which samples are in a group: a mask [n] each.
    labels = np.array([held_out.groups[row] for row in rows])
    groups = {ALL: np.ones(len(rows), dtype=bool)}
    if held_out.column is not None:
        groups |= {label: labels == label for label in sorted(set(labels.tolist()))}
    pairs = pairs_to_test(plan.candidates)
    intervals: dict[str, dict[str, ConfidenceInterval]] = {}
    differences: dict[str, dict[tuple[str, str], Difference]] = {}
    for group, samples in groups.items():
        of_group = {name: of_model.part(samples) for name, of_model in losses.items()}
        intervals[group], differences[group] = bootstrap(of_group, pairs, level=LEVEL, seed=SEED)
    pivot_bytes = losses[PIVOT].num_bytes
    return Evaluation(
        format=1,
        unit="bits per UTF-8 byte",
        dataset=EvaluatedDataset(
            path=recipe.dataset.path,
            eval_fraction=recipe.dataset.eval_fraction,
            conversations=len(held_out.conversations),
            copies=held_out.copies,
            answers=sum(len(answer_turns(c)) for c in held_out.conversations),
            counted=len(answers),
            bytes=int(pivot_bytes.sum()),
            column=held_out.column,
        ),
        groups={
            group: GroupSize(conversations=int(part.sum()), bytes=int(pivot_bytes[part].sum()))
            for group, part in groups.items()
        },
        models={
            candidate.name: EvaluatedModel(
                role=candidate.role,
                paths=[checkpoint.spec.model for checkpoint in candidate.checkpoints],
                groups={
                    group: BitsPerByte(
                        **dict(intervals[group][candidate.name]),
                        seeds=losses[candidate.name].part(samples).by_seed().tolist(),
                    )
                    for group, samples in groups.items()
                },
                end_bits=_end_bits(bits[candidate.name], answers),
                left_out=max(one.left_out for one in bits[candidate.name]),
            )
            for candidate in plan.candidates
        },
        pairs=_pairs(pairs, differences),
        unfinished=list(plan.unfinished),
        method=EvaluationMethod(
            level=LEVEL, resamples=RESAMPLES, seed=SEED, intervals=INTERVALS, families=FAMILIES
        ),
    )


def pairs_to_test(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """The pairs that are tested: each trained model with those that it should be better than."""
    targets = [candidate.name for candidate in candidates if candidate.role == "target"]
    named = [candidate.name for candidate in candidates if candidate.role == "model"]
    baselines = [name for name in (BASELINE, f"target {BASELINE}") if name in targets + named]
    pairs = []
    for name in [*targets, *named]:
        others = [PIVOT, *baselines]
        if name in named and name not in baselines:
            others += [target for target in targets if target not in baselines]
        pairs += [(name, other) for other in others if other != name]
    return pairs


def _sums(
    bits: CheckpointBits,
    answers: Sequence[tuple[str, int]],
    sample_of: NDArray[np.integer],
    column: str,
) -> np.ndarray:
    """A column of `AnswerBits`, added up over the answers of each sample: [n]."""
    values = np.array([getattr(bits.answers[answer], column) for answer in answers], float)
    return np.bincount(sample_of, weights=values)


def _end_bits(
    several: Sequence[CheckpointBits], answers: Sequence[tuple[str, int]]
) -> float | None:
    ends = [one.answers[answer].end_bits for one in several for answer in answers]
    known = [bits for bits in ends if bits is not None]
    return float(np.mean(known)) if known else None


def _pairs(
    pairs: Sequence[tuple[str, str]],
    differences: Mapping[str, Mapping[tuple[str, str], Difference]],
) -> list[Pair]:
    """The entries of `pairs`, from the differences by group and pair."""
    # The group of all samples is one family of tests, all other groups together are another.
    adjusted: dict[tuple[str, tuple[str, str]], float] = {}
    for family in ([ALL], [group for group in differences if group != ALL]):
        tests = [(group, pair) for group in family for pair in pairs]
        known = {test: p for test in tests if (p := differences[test[0]][test[1]].p) is not None}
        adjusted |= dict(zip(known, holm(list(known.values())), strict=True))
    entries = []
    for pair in pairs:
        of_all = differences[ALL][pair]
        seeds, paired, scope = of_all.seeds, of_all.paired, _scope(pair, of_all.seeds)
        groups = {
            group: _group_difference(of_group[pair], adjusted.get((group, pair)))
            for group, of_group in differences.items()
        }
        a, b = pair
        entries.append(Pair(a=a, b=b, scope=scope, seeds=seeds, paired=paired, groups=groups))
    return entries


def _group_difference(difference: Difference, p_holm: float | None) -> GroupDifference:
    verdict: Verdict = "no difference shown"
    if p_holm is not None and p_holm < 1 - LEVEL:
        verdict = "better" if difference.absolute.value < 0 else "worse"
    return GroupDifference(
        difference=difference.absolute,
        relative=difference.relative,
        p=difference.p,
        p_holm=p_holm,
        verdict=verdict,
    )


def _scope(pair: tuple[str, str], seeds: tuple[int, int]) -> str:
    """What an interval holds for: pivot and sources are what they are, all else was trained."""
    trained = dict(zip(pair, seeds, strict=True))
    trained.pop(PIVOT, None)
    several = [name for name, count in trained.items() if count > 1]
    if len(several) == len(trained):
        return "seeds and samples"
    (one, *_) = (name for name in trained if name not in several)
    return f"seeds of {several[0]}, this checkpoint of {one}" if several else "this checkpoint only"
