"""Intervals and tests for bits per byte, over samples and over training seeds.

Bits per byte of a checkpoint is a ratio: the bits it needs for all samples over their bytes. Two
things are random in it: which samples were held out, and, where a model was trained with several
seeds, which seeds. With y[s, i] the (linearised) difference of two models on sample i at seed s,

    y[s, i] = μ + a[s] + b[i] + e[s, i],      Var(mean) = σa²/S + σb²/n + σe²/(S·n).

Samples are resampled, the same ones for all models and seeds; that gives the part of b. Three to
five seeds are too few to be resampled: a percentile interval over them misses a factor n/(n - 1) of
the variance and the tails of Student's t. So the seeds' part is a t interval from the spread of the
seeds' ratios (which holds σa²/S and σe²/(S·n)), the samples' part is freed of σe²/(S·n), and the
two are put together by the method of variance estimates recovery (Zou and Donner 2008): the squares
of the distances from the estimate to the two bounds add up.

How often a 95 % interval holds the true value: docs/distilling.md, "Is it better?".
"""

# mypy: disable-error-code="import-untyped"
# (SciPy has no types)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusechat_distill.evaluation.schema import ConfidenceInterval

RESAMPLES = 10_000

DRAWN = 1 << 22
"""Sample indices that are drawn at a time."""

LEVELS = 1024
"""Levels at which an interval is looked at to find a p-value; neighbours differ by 1 %."""


@dataclass(frozen=True, eq=False)
class Losses:
    """What the checkpoints of one model need for n samples."""

    bits: NDArray[np.float64]
    """[S, n], one row a training seed."""
    num_bytes: NDArray[np.float64]
    """[n], what they are bits of."""

    @property
    def seeds(self) -> int:
        return len(self.bits)

    def by_seed(self) -> NDArray[np.float64]:
        """[S] bits per byte of each checkpoint."""
        return self.bits.sum(axis=1) / self.num_bytes.sum()

    def part(self, samples: NDArray[np.bool_]) -> Losses:
        return Losses(self.bits[:, samples], self.num_bytes[samples])


@dataclass(frozen=True)
class Difference:
    """Model a's bits per byte minus model b's; below zero, a is better."""

    absolute: ConfidenceInterval
    relative: ConfidenceInterval
    """Of b's bits per byte."""
    p: float | None
    """Two-sided: the highest level at which the absolute interval leaves zero out."""
    seeds: tuple[int, int]
    paired: bool
    """Seed i of a was compared with seed i of b."""


def bootstrap(
    models: Mapping[str, Losses],
    pairs: Sequence[tuple[str, str]] = (),
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, ConfidenceInterval], dict[tuple[str, str], Difference]]:
    """Bits per byte of each model, and the difference of each pair, with intervals.

    All models have the same n samples, in the same order. A pair of models with equally many
    seeds (more than one) is paired by seed.
    """
    totals = _resampled(models, resamples, seed)
    ratios = {name: bits.mean(axis=0) / num_bytes for name, (bits, num_bytes) in totals.items()}
    values = {name: float(losses.by_seed().mean()) for name, losses in models.items()}
    n = len(next(iter(models.values())).num_bytes)
    intervals = {
        name: _Spread(values[name], ratios[name], n, _seed_part([(losses, 1.0)])).interval(level)
        for name, losses in models.items()
    }
    differences = {}
    for a, b in pairs:
        paired = models[a].seeds == models[b].seeds > 1
        change = values[a] / values[b]
        seeds = _seeds_of([(models[a], 1.0), (models[b], -1.0)], paired=paired)
        absolute = _Spread(values[a] - values[b], ratios[a] - ratios[b], n, seeds)
        # To first order, r_a / r_b varies as (r_a - change · r_b) / r_b does.
        weights = [(models[a], 1 / values[b]), (models[b], -change / values[b])]
        seeds = _seeds_of(weights, paired=paired)
        relative = _Spread(change - 1, ratios[a] / ratios[b] - 1, n, seeds)
        differences[a, b] = Difference(
            absolute.interval(level),
            relative.interval(level),
            absolute.p_value(),
            (models[a].seeds, models[b].seeds),
            paired,
        )
    return intervals, differences


def _resampled(
    models: Mapping[str, Losses], resamples: int, seed: int
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Each model's bits [S, R] and bytes [R] in every resample of the samples."""
    rows = [np.vstack([losses.bits, losses.num_bytes]) for losses in models.values()]
    stacked = np.vstack(rows)
    n = stacked.shape[1]
    rng = np.random.default_rng(seed)
    block = max(1, DRAWN // n)
    sums = np.empty((resamples, len(stacked)))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        # [count, n] sample indices, each resample's in its own range; how often each sample was
        # drawn is then one `bincount`, and the resample's sums one product.
        drawn = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=count * n).reshape(count, n)
        sums[start : start + count] = counts.astype(np.float64) @ stacked.T
    ends = np.cumsum([len(part) for part in rows])
    split = np.split(sums.T, ends[:-1])
    return {name: (part[:-1], part[-1]) for name, part in zip(models, split, strict=True)}


@dataclass(frozen=True)
class _SeedPart:
    """What training seeds add to the variance of an estimate."""

    variance: float = 0.0
    """Of the mean over seeds, from their spread: a's part and e's."""
    interaction: float = 0.0
    """e's part, which resampling the samples shows as well."""
    freedom: float = 1.0
    """Degrees of freedom of `variance`."""

    def plus(self, other: _SeedPart) -> _SeedPart:
        """Of two models with seeds of their own; the degrees of freedom are Welch's."""
        parts = [part for part in (self, other) if part.variance]
        variance = sum(part.variance for part in parts)
        freedom = sum(part.variance**2 / part.freedom for part in parts)
        return _SeedPart(
            variance, self.interaction + other.interaction, variance**2 / freedom if parts else 1.0
        )


def _seeds_of(terms: Sequence[tuple[Losses, float]], *, paired: bool) -> _SeedPart:
    """The seeds' part of a weighted sum of two models' bits per byte."""
    if paired:
        return _seed_part(terms)
    first, second = (_seed_part([term]) for term in terms)
    return first.plus(second)


def _seed_part(terms: Sequence[tuple[Losses, float]]) -> _SeedPart:
    """The same where seed i of all models belongs together."""
    seeds, n = terms[0][0].bits.shape
    if seeds == 1 or n < 2:
        return _SeedPart()
    ratios = sum(weight * losses.by_seed() for losses, weight in terms)
    # What each sample adds to a ratio: its residual over the mean number of bytes.
    residuals = sum(
        weight
        * (losses.bits - losses.by_seed()[:, None] * losses.num_bytes)
        / losses.num_bytes.mean()
        for losses, weight in terms
    )
    # What is left of a residual after its sample's mean over seeds estimates e.
    interaction = residuals - np.mean(residuals, axis=0)
    mean_square = np.square(interaction).sum() / ((seeds - 1) * (n - 1))
    return _SeedPart(
        float(np.var(ratios, ddof=1) / seeds), float(mean_square / (seeds * n)), seeds - 1
    )


class _Spread:
    """How an estimate varies over n samples (its resampled values) and over seeds."""

    def __init__(self, value: float, resampled: NDArray[np.float64], n: int, seeds: _SeedPart):
        self.value = value
        self._n = n
        self._deviations = np.sort(resampled - value)
        self._seeds = seeds
        # The resampled variance without e's part, which `seeds` holds: as a factor of deviations.
        variance = float(np.var(resampled)) * n / max(1, n - 1)
        share = 1 - seeds.interaction / variance if variance else 1.0
        self._share = math.sqrt(max(0.0, share))

    def interval(self, level: float) -> ConfidenceInterval:
        if self._n < 2:
            return ConfidenceInterval(value=self.value, low=None, high=None)
        below, above = self._distances(np.array([1 - level]))
        return ConfidenceInterval(
            value=self.value, low=float(self.value - below[0]), high=float(self.value + above[0])
        )

    def p_value(self) -> float | None:
        """The least of a grid of levels at which the interval leaves zero out."""
        if self._n < 2:
            return None
        if self.value == 0:
            return 1.0
        # From the smallest error probability that the resamples can show, up to 1.
        errors = np.geomspace(2 / (len(self._deviations) + 1), 1, LEVELS)
        below, above = self._distances(errors)
        outside = self.value - below > 0 if self.value > 0 else self.value + above < 0
        return float(errors[np.argmax(outside)]) if outside.any() else 1.0

    def _distances(self, errors: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """From the estimate to its lower and its upper bound, for each error probability."""
        # A resample of n has (n - 1)/n of the variance, and its quantiles are the normal's.
        widened = self._share * math.sqrt(self._n / (self._n - 1)) * _t_over_z(self._n - 1, errors)
        of_seeds = self._seeds.variance * _t(self._seeds.freedom, errors) ** 2
        of_samples = (
            -np.quantile(self._deviations, errors / 2),
            np.quantile(self._deviations, 1 - errors / 2),
        )
        # A bound on the estimate's wrong side (few resamples) counts as no distance. The two parts
        # are put together by the method of variance estimates recovery.
        return tuple(np.sqrt((np.maximum(d, 0) * widened) ** 2 + of_seeds) for d in of_samples)


def _t(freedom: float, errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """What Student's t exceeds in absolute value with these probabilities."""
    from scipy.special import stdtrit

    return -np.asarray(stdtrit(freedom, errors / 2))


def _t_over_z(freedom: int, errors: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.special import ndtri

    z = -np.asarray(ndtri(errors / 2))
    t = _t(freedom, errors)
    return np.divide(t, z, out=np.ones_like(t), where=z > 0)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of one family, adjusted by Holm's step-down method (1979), in their order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    # The smallest times m, the next times m - 1, ...; none below the one before it.
    scaled = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted.tolist()
