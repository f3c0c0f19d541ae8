"""The align stage over two real tokenizers' stores: join, resume, processes, report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.alignment.positions import Responses, align, match_positions
from fusechat_distill.alignment.stage import (
    AlignedSample,
    AlignStage,
    align_stages,
    aligned_samples,
    aligned_table,
    alignment_shares,
    join,
)
from fusechat_distill.inputs.open import Inputs
from fusechat_distill.recipe.schema import Alignment
from fusechat_distill.storage.shards import ScoreStore, Shards
from tests.support import real_tokenizers
from tests.support.chain import Silent, parquet_files
from tests.support.scores import Alone, random_scores, scored_recipe

K = 5
ANSWERS = [
    ["Hello there, friend."],
    ["日本語 and café", "  spaced out \n"],
    ["def f(x):\n        return x + 1\n"],
    ["Paris — and 東京 🙂."],
    ["one", "Zwei, naïve café.", "3.14159"],
]


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Inputs:
    """A recipe with two sources, of the pivot's and of another family; all scored."""
    folder = tmp_path_factory.mktemp("align")
    sources = "[{model: {folder}/twin, vocabulary: bytes}, {folder}/other]"
    inputs = scored_recipe(folder, ANSWERS, 300, real_tokenizers.qwen(), sources, max_length=48)
    for seed, name in enumerate(inputs.models):
        random_scores(inputs, name, seed)
    return inputs


@pytest.fixture
def inputs(scored, tmp_path) -> Inputs:
    """The scored recipe with an output folder of its own."""
    shutil.copytree(scored.recipe.output_folder, tmp_path / "out")
    return changed(scored, output=str(tmp_path / "out"))


def changed(inputs: Inputs, **keys) -> Inputs:
    return replace(inputs, recipe=inputs.recipe.model_copy(update=keys))


def stages(inputs: Inputs) -> dict[str, AlignStage]:
    return {stage.name: stage for stage in align_stages(inputs)}


def opened(inputs: Inputs, stage: AlignStage) -> tuple[ScoreStore, ScoreStore, Shards]:
    """The pivot's scores, the source's, and what the stage made of them."""
    folders = [inputs.scores_folder(inputs.models[name]) for name in ("pivot", stage.name)]
    return ScoreStore(folders[0]), ScoreStore(folders[1]), Shards.open(stage.folder)


def files(stage: AlignStage) -> dict[str, bytes]:
    return parquet_files(stage.folder)


@pytest.mark.parametrize("name", ["twin", "other"])
def test_every_sample_is_aligned_as_it_is_alone(inputs, name):
    stage = stages(inputs)[name]
    status = stage.run(Alone(), Silent())
    assert status.complete
    assert status.details.samples == 300
    pivot, source, shards = opened(inputs, stage)
    vocabulary_map = stage._read_vocabulary()
    keys = []
    for samples in shards.manifest.ranges():
        found = aligned_samples(shards.read(samples))
        keys += [sample.key for sample in found]
        for sample in found[:7]:
            left, right = pivot[sample.key], source[sample.key]
            at, matches, ids = 0, [], []
            starts = {}
            for response in right.responses:
                starts[response.turn] = at, response
                at += len(response.tokens)
            for response in left.responses:
                start, other = starts[response.turn]
                alone = align(Responses.of([response]), Responses.of([other]), vocabulary_map)
                matches += [m + start if m >= 0 else -1 for m in alone.matches.tolist()]
                ids += alone.ids.tolist()
            assert sample.matches.tolist() == matches
            assert sample.ids.tolist() == ids
            rising = sample.matches[sample.matches >= 0]
            assert (np.diff(rising) > 0).all()
    assert keys == list(pivot)


def test_resuming_gives_the_same_bytes(inputs):
    whole = stages(inputs)["other"]
    whole.run(Alone(), Silent())
    expected = files(whole)
    assert len(expected) == 2
    first, second = sorted(expected)
    (whole.folder / second).unlink()
    again = stages(inputs)["other"]
    assert (again.status().done, again.status().total) == (256, 300)
    assert again.run(Alone(), Silent()).complete
    assert files(again) == expected
    (whole.folder / second).write_bytes(expected[second][:100])
    assert again.run(Alone(), Silent()).complete
    assert files(again) == expected
    assert (whole.folder / "quarantine" / second).exists()
    untouched = (whole.folder / first).stat().st_mtime_ns
    again.run(Alone(), Silent())
    assert (whole.folder / first).stat().st_mtime_ns == untouched


def test_two_processes_give_what_one_gives(inputs, tmp_path):
    one = stages(inputs)["twin"]
    one.run(Alone(), Silent())
    expected = files(one)
    shutil.rmtree(one.folder)
    shards = Shards.create(one.folder, one.manifest())
    for index in (1, 0):
        stage = stages(inputs)["twin"]
        stage.make_shards(shards, shards.manifest.ranges()[index::2], Alone(), Silent())
    assert files(one) == expected


def test_the_vocabulary_map_is_made_once(inputs, monkeypatch):
    stage = stages(inputs)["twin"]
    stage.run(Alone(), Silent())
    assert stage.vocabulary_file().name.startswith("bytes-")
    shutil.rmtree(stage.folder)
    monkeypatch.setattr("fusechat_distill.alignment.stage.first_tokens", None)
    stage.run(Alone(), Silent())
    # A torn file is made again.
    shutil.rmtree(stage.folder)
    stage.vocabulary_file().write_bytes(b"PK")
    with pytest.raises(TypeError):
        stage.run(Alone(), Silent())


@pytest.mark.parametrize("mode", ["em", "mined"])
def test_the_same_tokenizer_loses_nothing_in_any_vocabulary(inputs, mode):
    source = inputs.models["twin"]
    source = replace(
        source,
        files=replace(source.files, spec=source.spec.model_copy(update={"vocabulary": mode})),
    )
    stage = AlignStage(inputs, source)
    shares = alignment_shares(stage.run(Alone(), Silent()).details)
    assert stage.vocabulary_file().name.startswith(f"{mode}-")
    assert shares["mass_exact"] + shares["mass_special"] == pytest.approx(1)
    assert shares["mass_kept"] == pytest.approx(1, abs=1e-3)


def test_scores_that_are_not_complete_are_asked_for(inputs):
    model = inputs.models["other"]
    sorted(inputs.scores_folder(model).glob("*.parquet"))[1].unlink()
    with pytest.raises(FusechatError, match="other: 44 of 300 samples have no scores; run"):
        stages(inputs)["other"].run(Alone(), Silent())
    assert stages(inputs)["twin"].run(Alone(), Silent()).complete


def test_another_alignment_is_refused_with_what_changed(inputs):
    stages(inputs)["other"].run(Alone(), Silent())
    other = changed(inputs, alignment=Alignment(vocabulary="em"))
    with pytest.raises(RequestError, match="vocabulary was 'ms', is 'em'"):
        stages(other)["other"].run(Alone(), Silent())


def test_the_summary_adds_up(inputs):
    stage = stages(inputs)["other"]
    details = stage.run(Alone(), Silent()).details
    pivot, source, shards = opened(inputs, stage)
    positions = matched = won = 0
    for key in pivot:
        nll = []
        for sample in (pivot[key], source[key]):
            lost = -sum(r.gold_logprobs.sum(dtype=np.float64) for r in sample.responses)
            nll.append(lost / sum(r.end - r.begin for r in sample.responses))
        won += nll[1] < nll[0]
        for mine, theirs in zip(pivot[key].responses, source[key].responses, strict=False):
            assert mine.turn == theirs.turn
            positions += len(mine.tokens)
            matched += 1 + int((match_positions(mine.ends[:-1], theirs.ends[:-1]) >= 0).sum())
    assert details.positions == positions
    assert details.matched == pytest.approx(matched, rel=0.02)  # begins and ends have rules
    assert details.source_won == won
    shares = alignment_shares(details)
    assert all(0 <= share <= 1 for name, share in shares.items() if "entropy" not in name)
    parts = ("exact", "mapped", "special", "dropped")
    assert sum(shares[f"mass_{part}"] for part in parts) == pytest.approx(1)
    assert shares["mass_exact"] > shares["mass_special"] > 0
    assert shares["begins_matched"] > 0.9
    assert shares["pivot_cross_entropy"] > 0
    json.dumps(details.model_dump())
    assert AlignStage.status_of("other", shards).details == details


def test_samples_without_a_match_are_kept(inputs):
    empty = np.zeros((0, K))
    samples = [
        AlignedSample(np.full(4, -1, np.int32), empty.astype(np.uint32), empty, "00" * 16, 3),
        AlignedSample(np.array([0, -1]), np.ones((1, K)), np.ones((1, K)), "01" * 16, 4),
    ]
    first, second = aligned_samples(aligned_table(samples))
    assert (first.row, len(first.ids), first.matches.tolist()) == (3, 0, [-1] * 4)
    assert (second.row, second.ids.shape) == (4, (1, K))
    assert join([], ScoreStore(inputs.scores_folder(inputs.pivot))) is None
