"""Intervals on simulated data whose truth is known, and Holm's correction."""

from __future__ import annotations

import numpy as np
import pytest

from fusechat_distill.evaluation.bootstrap import Losses, bootstrap, holm

MEAN = -0.02
"""The simulated difference, bits per byte."""


def simulated(
    rng: np.random.Generator,
    seeds: tuple[int, int],
    spread: tuple[float, float, float],
    samples: int = 60,
    *,
    weighted: bool = False,
    mean: float = MEAN,
) -> dict[str, Losses]:
    """Crossed effects: y[s, i] = mean + a[s] + b[i] + e[s, i] is model a's lead over model b.

    `spread`: standard deviations of a, b and e. What both models share is far larger than all.
    A model of one seed is its checkpoint, whose seed effect is part of the truth.
    """
    of_seed, of_sample, both = spread
    num_bytes = rng.lognormal(5, 0.6, samples) if weighted else np.full(samples, 200.0)
    shared = 2 + 0.5 * rng.normal(size=samples)
    models = {}
    for name, count, lead in zip("ab", seeds, (mean, 0.0), strict=True):
        rates = np.tile(shared + lead, (count, 1))
        if count > 1 or name == "a":
            seed_effects = of_seed * rng.normal(size=(count, 1)) if count > 1 else 0.0
            rates += seed_effects + both * rng.normal(size=(count, samples))
        if name == "a":
            rates += of_sample * rng.normal(size=samples)
        models[name] = Losses(rates * num_bytes, num_bytes)
    return models


def coverage(seeds: tuple[int, int], spread: tuple[float, float, float], **options: bool) -> float:
    """How often the 95 % interval holds the true difference; it and the relative one agree."""
    rng = np.random.default_rng(11)
    hits = agree = 0
    runs = 600
    for run in range(runs):
        models = simulated(rng, seeds, spread, **options)
        _, found = bootstrap(models, [("a", "b")], resamples=300, seed=run)
        interval, p = found["a", "b"].absolute, found["a", "b"].p
        hit = interval.low <= MEAN <= interval.high
        hits += hit
        # The relative interval is the absolute one over b's bits per byte, up to b's own noise.
        relative = found["a", "b"].relative
        agree += (relative.low <= MEAN / 2 <= relative.high) == hit
        if abs(p - 0.05) > 0.01:
            assert (p < 0.05) == (not interval.low <= 0 <= interval.high)
    assert agree > 0.97 * runs
    return hits / runs


SEEDS_DOMINATE = (0.05, 0.05, 0.05)
"""Variance of the mean from seeds: 8e-4 at 3 seeds; from 60 samples: 4e-5."""
SAMPLES_DOMINATE = (0.0, 0.2, 0.05)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("spread", [SEEDS_DOMINATE, SAMPLES_DOMINATE], ids=["seeds", "samples"])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_95_per_cent_intervals_cover_93_to_97(seeds, spread, weighted):
    assert 0.93 <= coverage((seeds, 1), spread, weighted=weighted) <= 0.97


@pytest.mark.parametrize("seeds", [(3, 3), (3, 5)], ids=["paired", "unpaired"])
def test_both_models_have_seeds(seeds):
    assert 0.93 <= coverage(seeds, SEEDS_DOMINATE) <= 0.97


@pytest.mark.parametrize("spread", [(0.013, 0.1, 0.0), (0.0, 0.1, 0.1), (0.0, 0.0, 0.1)])
def test_in_between_they_are_rather_too_wide_than_too_narrow(spread):
    assert 0.935 <= coverage((3, 1), spread) <= 0.99


def test_a_plain_bootstrap_over_seeds_would_not_do():
    """The simulation tells a bad interval from a good one."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        losses = simulated(rng, (3, 1), SEEDS_DOMINATE)
        difference = losses["a"].by_seed() - losses["b"].by_seed()
        drawn = difference[rng.integers(3, size=(400, 3))].mean(axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        hits += low <= MEAN <= high
    assert hits / 400 < 0.85


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(3)
    found = []
    for run in range(400):
        models = simulated(rng, (1, 1), (0.0, 0.1, 0.05), mean=0.0)
        found.append(bootstrap(models, [("a", "b")], resamples=400, seed=run)[1]["a", "b"].p)
    for level in (0.05, 0.2, 0.5, 0.8):
        assert abs(np.mean(np.array(found) <= level) - level) < 0.06


def test_estimates_are_ratios_of_sums():
    rng = np.random.default_rng(0)
    models = simulated(rng, (3, 1), (0.1, 0.2, 0.1), weighted=True)
    own, found = bootstrap(models, [("a", "b"), ("b", "a")], resamples=200)
    rates = {
        name: np.mean([row.sum() / losses.num_bytes.sum() for row in losses.bits])
        for name, losses in models.items()
    }
    for name, rate in rates.items():
        assert own[name].value == pytest.approx(rate, rel=1e-12)
        assert own[name].low < rate < own[name].high
    lead = found["a", "b"]
    assert lead.absolute.value == pytest.approx(rates["a"] - rates["b"])
    assert lead.relative.value == pytest.approx(rates["a"] / rates["b"] - 1)
    assert (lead.seeds, lead.paired) == ((3, 1), False)
    back = found["b", "a"].absolute
    assert (back.low, back.high) == pytest.approx((-lead.absolute.high, -lead.absolute.low))


def test_sample_intervals_are_those_of_the_delta_method():
    """One seed, many samples: the interval is ± t · the standard error of a ratio."""
    rng = np.random.default_rng(1)
    models = simulated(rng, (1, 1), (0.0, 0.2, 0.1), samples=2000, weighted=True)
    _, found = bootstrap(models, [("a", "b")])
    a, b, num_bytes = models["a"].bits[0], models["b"].bits[0], models["a"].num_bytes
    lead = (a.sum() - b.sum()) / num_bytes.sum()
    residual = a - b - lead * num_bytes
    error = np.sqrt(np.square(residual).sum()) / num_bytes.sum()
    interval = found["a", "b"].absolute
    assert interval.low == pytest.approx(lead - 1.96 * error, abs=0.06 * error)
    assert interval.high == pytest.approx(lead + 1.96 * error, abs=0.06 * error)


def test_seed_intervals_are_students():
    """Samples all alike: the interval is the mean ± t(2) · s / √3."""
    rates = np.array([2.0, 2.1, 2.3])
    num_bytes = np.full(50, 100.0)
    models = {
        "a": Losses(rates[:, None] * num_bytes, num_bytes),
        "b": Losses(np.tile(2.2 * num_bytes, (1, 1)), num_bytes),
    }
    _, found = bootstrap(models, [("a", "b")], resamples=100)
    half = 4.302653 * rates.std(ddof=1) / np.sqrt(3)
    interval = found["a", "b"].absolute
    assert interval.low == pytest.approx(rates.mean() - 2.2 - half, rel=1e-6)
    assert interval.high == pytest.approx(rates.mean() - 2.2 + half, rel=1e-6)


def test_seeds_are_paired_by_index():
    """Seed effects that both models share take no part in their difference."""
    rng = np.random.default_rng(2)
    num_bytes = np.full(50, 100.0)
    shared = rng.normal(size=(3, 1))
    a = (5 + shared + 0.01 * rng.normal(size=(3, 50))) * num_bytes
    b = (5 + shared) * num_bytes
    models = {"a": Losses(a, num_bytes), "b": Losses(b, num_bytes)}
    difference = bootstrap(models, [("a", "b")], resamples=200)[1]["a", "b"]
    assert difference.paired
    assert difference.absolute.high - difference.absolute.low < 0.1


def test_the_same_seed_gives_the_same_numbers_and_another_others():
    models = simulated(np.random.default_rng(4), (3, 1), (0.01, 0.1, 0.1))
    first, again, other = (
        bootstrap(models, [("a", "b")], resamples=300, seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_blocks_of_resamples_change_nothing(monkeypatch):
    models = simulated(np.random.default_rng(4), (2, 1), (0.01, 0.1, 0.1))
    whole = bootstrap(models, [("a", "b")], resamples=300)
    monkeypatch.setattr("fusechat_distill.evaluation.bootstrap.DRAWN", 60 * 7)
    cut = bootstrap(models, [("a", "b")], resamples=300)
    for name in "ab":
        assert cut[0][name].low == pytest.approx(whole[0][name].low, rel=1e-12)
    assert cut[1]["a", "b"].absolute.high == pytest.approx(whole[1]["a", "b"].absolute.high)


def test_what_can_not_be_told():
    num_bytes = np.array([10.0])
    one = {"a": Losses(np.array([[5.0]]), num_bytes), "b": Losses(np.array([[6.0]]), num_bytes)}
    own, found = bootstrap(one, [("a", "b")], resamples=50)
    assert own["a"].low is own["a"].high is None
    assert found["a", "b"].p is None
    two = np.array([10.0, 30.0])
    same = Losses(np.array([[5.0, 9.0]]), two)
    _, found = bootstrap({"a": same, "b": same}, [("a", "b")], resamples=50)
    assert found["a", "b"].p == 1
    assert found["a", "b"].absolute.low == found["a", "b"].absolute.high == 0


@pytest.mark.parametrize(
    "p_values",
    [[0.01, 0.04, 0.03, 0.005], [0.02], [], [0.5, 0.5, 0.5], [1e-4, 0.9, 0.02, 0.02, 0.3]],
)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    assert len(adjusted) == len(p_values)
    for level in (0.001, 0.01, 0.0201, 0.05, 0.1, 0.5):
        rejected = set()
        left = sorted(range(len(p_values)), key=lambda i: p_values[i])
        while left and p_values[left[0]] <= level / len(left):
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected
