"""The fuse stage: its dataset against a reference in plain Python, resume, joins, refusals."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.alignment.stage import AlignedSample, align_stages, aligned_samples
from fusechat_distill.fusion.stage import (
    FuseContext,
    byte_counts,
    fuse_stages,
    held_out,
    join_sample,
)
from fusechat_distill.inputs.open import Inputs, open_inputs
from fusechat_distill.recipe.schema import Fusion
from fusechat_distill.scoring.stage import score_stages
from fusechat_distill.storage.processes import Processes
from fusechat_distill.storage.shards import SampleRange, ScoreStore, Shards
from fusechat_distill.text.conversations import Conversation, Message, Rendering, Response
from fusechat_distill.text.scored import ScoredSample
from tests.support import chain
from tests.support.chain import Silent, read_json
from tests.support.fusion import loops
from tests.support.scores import scored_response


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, models) -> Inputs:
    """Two sources, scored and aligned; one of them can't take every answer."""
    folder = tmp_path_factory.mktemp("fuse")
    sources = [str(models / "neox"), str(models / "twin")]
    path = chain.recipe(folder, models, count=280, sources=sources)
    made = chain.rows(280)
    for i in range(0, 280, 9):  # a special token of neox's: that answer is context only
        made[i]["messages"][-1]["content"] += " </s> it ends"
    made[7] = made[3]  # the same conversation twice
    chain.write_rows(folder / "chats.jsonl", made)
    inputs = open_inputs(path)
    for stage in [*score_stages(inputs), *align_stages(inputs)]:
        stage.run(Processes("cpu"), Silent())
    return inputs


def changed(inputs: Inputs, unmatched: str = "one_hot", **fusion) -> Inputs:
    alignment = inputs.recipe.alignment.model_copy(update={"unmatched": unmatched})
    sections = {"fusion": Fusion(**fusion), "alignment": alignment}
    return replace(inputs, recipe=inputs.recipe.model_copy(update=sections))


def fuse_all(inputs: Inputs, folder: Path):
    """The stages, with folders of their own, run."""
    stages = fuse_stages(inputs)
    for stage in stages:
        stage.folder = folder / stage.name
        assert stage.run(Processes("cpu"), Silent()).complete
    return stages


def read(stage) -> list[dict]:
    shards = Shards.open(stage.folder)
    return [row for part in shards.manifest.ranges() for row in shards.read(part).to_pylist()]


def bytes_of(response, i: int) -> int:
    """How many of the answer's bytes token i of a response adds."""
    before = max(e for e in (response.begin, *response.ends[:i]) if e >= 0)
    if response.ends[i] >= 0:
        return response.ends[i] - before
    last = before < response.end and not any(e >= 0 for e in response.ends[i:])
    return response.end - before if last and (i == 0 or response.ends[i - 1] >= 0) else 0


def reference(inputs: Inputs, sources: tuple[str, ...]):
    """Per key: each model's share of each position, and the positions' distributions."""
    names = ("pivot", *sources)
    stores = {name: ScoreStore(inputs.scores_folder(inputs.models[name])) for name in names}
    found: dict[str, dict[str, AlignedSample]] = {}
    for name in sources:
        shards = Shards.open(inputs.recipe.aligned_folder / name)
        parts = (aligned_samples(shards.read(part)) for part in shards.manifest.ranges())
        found[name] = {sample.key: sample for samples in parts for sample in samples}

    def model(name: str, key: str, positions: list, shared: set[int]):
        """What the model has at each of the pivot's positions: its entries, its loss from there
        up to the next match, of what comes before the first match at the first position."""
        if name == "pivot":
            matches = list(range(len(positions)))
            entries = [(r.ids[i], r.logprobs[i]) for r, i in positions]
        else:
            sample = found[name][key]
            matches = sample.matches.tolist()
            rows = iter(zip(sample.ids, sample.logprobs, strict=True))
            entries = [next(rows) if match >= 0 else ([], []) for match in matches]
        own = [
            (r.turn in shared, -float(g)) for r in stores[name][key].responses
            for g in r.gold_logprobs
        ]  # fmt: skip
        nll, tokens = [], []
        for p, match in enumerate(matches):
            begin = match if p else 0
            end = next((m for m in matches[p + 1 :] if m >= 0), len(own))
            part = [loss for counted, loss in own[begin:end] if counted] if begin >= 0 else []
            nll.append(sum(part))
            tokens.append(len(part))
        ids, logprobs = zip(*entries, strict=True)
        matched = [match >= 0 for match in matches]
        return SimpleNamespace(
            present=[True], matched=matched, ids=ids, logprobs=logprobs, nll=nll, tokens=tokens
        )

    fusion, results = inputs.recipe.fusion, {}
    for key in stores["pivot"]:
        responses = stores["pivot"][key].responses
        turns = {"pivot": {r.turn for r in responses}}
        for name in sources:
            own = {r.turn for r in stores[name][key].responses} if key in found[name] else set()
            if own & turns["pivot"]:
                turns[name] = own
        shared = set.intersection(*turns.values())
        positions = [(r, i) for r in responses for i in range(len(r.tokens))]
        absent = SimpleNamespace(present=[False])
        models = [model(n, key, positions, shared) if n in turns else absent for n in names]
        sizes = [bytes_of(r, i) if r.turn in shared else 0 for r, i in positions]
        targets, shares = loops(
            models,
            [0, len(positions)],
            sizes,
            fusion.function,
            fusion.level,
            fusion.cross_entropy,
            fusion.tail,
            fusion.temperature,
            inputs.recipe.alignment.unmatched,
        )
        results[key] = [dict(zip(names, share, strict=True)) for share in shares], targets
    return results


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "multi", "cross_entropy": "token", "temperature": 2.0},
        {"strategy": "multi", "function": "avg_ce", "tail": "gold", "unmatched": "pivot"},
        {"level": "token", "tail": "gold", "temperature": 0.5},
        {"strategy": "multi", "level": "token", "function": "avg_ce", "cross_entropy": "token"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_the_dataset_is_the_reference(aligned, tmp_path, settings):
    inputs = changed(aligned, **settings)
    for stage in fuse_all(inputs, tmp_path):
        expected = reference(inputs, stage.sources)
        stores = [ScoreStore(inputs.scores_folder(inputs.models[s])) for s in stage.sources]
        table = read(stage)
        assert [row["row"] for row in table] == list(range(280))
        won = defaultdict(float)
        compared = 0
        for row in table:
            shares, targets = expected[row["key"].hex()]
            live = [i for i, label in enumerate(row["labels"]) if label != -100]
            assert [row["labels"][i] for i in live] == [row["input_ids"][i] for i in live]
            for i, target in zip(live, targets, strict=True):
                ids, probs = row["fusion_ids"][i], row["fusion_probs"][i]
                got = {t: p for t, p in zip(ids, probs, strict=True) if p > 0}
                assert got == pytest.approx(target, abs=2e-6)
                assert probs == sorted(probs, reverse=True)
            dead = set(range(len(row["labels"]))) - set(live)
            assert all(sum(row["fusion_probs"][i]) == 0 for i in dead)
            if any(row["key"].hex() in store for store in stores):
                compared += len(shares)
                for share in shares:
                    for name, weight in share.items():
                        won[name] += weight
        said = read_json(stage.folder / "decisions.json")
        assert said["positions_compared"] == compared
        for name in stage.models:
            assert said["won"][name]["positions"] == pytest.approx(won[name] / compared, abs=1e-5)
            assert ("samples" in said["won"][name]) == (inputs.recipe.fusion.level == "sequence")
        assert 0 < sum(row["held_out"] for row in table) == said["held_out"] < 60


def test_a_source_without_an_answer_is_compared_over_the_others():
    """neox takes one of two answers; what the pivot lost on the other one doesn't count."""
    key = "00" * 16

    def response(turn, first, nll):
        n = len(nll)
        made = Response(turn, 0, n - 1, first, np.array([*range(1, n), -1]), b"", "special")
        ids = np.arange(2 * n).reshape(n, 2)
        return made, scored_response(made, range(n), ids, np.full((n, 2), -1), -np.array(nll))

    (one, first), (two, second) = response(1, 2, [1.0, 1.0, 1.0]), response(3, 8, [50.0, 50.0])
    pivot = ScoredSample(key, 0, (first, second))
    source = ScoredSample(key, 0, (response(1, 2, [2.0, 0.5, 2.0])[1],))
    conversation = Conversation(key, 0, tuple(Message("assistant", "ab") for _ in range(4)))
    rendering = Rendering(np.arange(10), (one, two))
    matches = AlignedSample(
        np.array([0, 1, 2, -1, -1], np.int32),
        np.zeros((3, 2), np.uint32),
        np.zeros((3, 2), np.float16),
        key,
        0,
    )
    sample = join_sample(conversation, rendering, pivot, [(matches, source), None])
    scores = sample.scores
    assert [s.nll.tolist() for s in scores[:2]] == [[1, 1, 1, 0, 0], [2, 0.5, 2, 0, 0]]
    assert scores[0].tokens.tolist() == [1, 1, 1, 0, 0]
    assert scores[0].matched.all()
    assert sample.num_bytes.tolist() == [1, 1, 0, 0, 0]
    assert [bool(s.present[0]) for s in scores] == [True, True, False]
    # Without a common answer it is as if the source had not scored the sample.
    other = ScoredSample(key, 0, (response(2, 2, [0.0, 0.0])[1],))
    sample = join_sample(conversation, rendering, pivot, [(matches, other)])
    assert not sample.scores[1].present[0]
    assert sample.scores[0].nll.tolist() == [1, 1, 1, 50, 50]
    # Without the pivot's scores nothing is compared, and the labels are learnt as they are.
    sample = join_sample(conversation, rendering, None, [None])
    assert not any(s.present[0] for s in sample.scores)
    assert len(sample.num_bytes) == 5
    # Scores of other tokens than the conversation's are no scores of it.
    with pytest.raises(FusechatError, match="5 positions where the conversation has 3; delete the"):
        join_sample(conversation, replace(rendering, responses=(one,)), pivot, [])


@pytest.mark.parametrize(
    ("begin", "end", "ends", "expected"),
    [
        (0, 5, [2, 5, -1], [2, 3, 0]),  # a stop
        (0, 5, [2, 5], [2, 3]),  # none
        (3, 9, [5, 9, -1, -1], [2, 4, 0, 0]),  # a template that trims, a stop of two tokens
        (0, 6, [2, -1, 5, -1], [2, 0, 3, 1]),  # the last token runs over the end
        (0, 4, [-1, -1, -1], [4, 0, 0]),  # no end is known
        (0, 0, [-1], [0]),
        (0, 7, [3, 3, 7], [3, 0, 4]),  # a token without text of its own
    ],
)
def test_bytes_of_each_token(begin, end, ends, expected):
    response = Response(1, begin, end, 1, np.array(ends, np.int32), b"", "special")
    counts = byte_counts(response)
    assert counts.tolist() == expected
    assert counts.sum() == end - begin


def test_the_baseline_has_labels_only(aligned, tmp_path):
    (stage,) = fuse_all(changed(aligned, strategy="sft"), tmp_path)
    assert stage.name == "sft"
    (fused, _) = fuse_all(changed(aligned), tmp_path / "fused")
    columns = ("key", "row", "held_out", "input_ids", "labels")
    table, other = read(stage), read(fused)
    assert set(table[0]) == set(columns)
    assert table == [{c: row[c] for c in columns} for row in other]
    assert read_json(stage.folder / "decisions.json")["won"] == {}


def test_the_columns_are_of_fixed_size_and_datasets_reads_them(aligned, tmp_path):
    stage = fuse_all(changed(aligned, strategy="multi", function="avg_ce"), tmp_path)[0]
    shards = Shards.open(stage.folder)
    schema = shards.read(shards.manifest.ranges()[0]).schema
    assert schema.field("fusion_ids").type == pa.list_(pa.list_(pa.int32(), 18))
    assert schema.field("fusion_probs").type == pa.list_(pa.list_(pa.float32(), 18))
    files = [str(shards.path(part)) for part in shards.manifest.ranges()]
    dataset = Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 280
    assert np.array(dataset[5]["fusion_probs"]).shape == (len(dataset[5]["input_ids"]), 18)


def test_resuming_gives_the_same_bytes_and_other_settings_are_refused(
    aligned, tmp_path, monkeypatch
):
    stage = fuse_all(changed(aligned), tmp_path)[0]
    expected = {path.name: path.read_bytes() for path in stage.folder.iterdir()}
    names = sorted(name for name in expected if name.endswith(".parquet"))
    assert names == ["00000000-00000256.parquet", "00000256-00000280.parquet"]
    (stage.folder / names[0]).unlink()
    (stage.folder / "decisions.json").unlink()
    assert stage.status().done == 24
    (stage.folder / names[1]).write_bytes(expected[names[1]][:200])
    monkeypatch.setattr("fusechat_distill.fusion.stage.BLOCK", 300)  # of two or three samples each
    assert stage.run(Processes("cpu"), Silent()).complete
    assert {p.name: p.read_bytes() for p in stage.folder.iterdir() if p.is_file()} == expected
    before = (stage.folder / names[0]).stat().st_mtime_ns
    stage.run(Processes("cpu"), Silent())
    assert (stage.folder / names[0]).stat().st_mtime_ns == before

    other = fuse_stages(changed(aligned, temperature=2.0, tail="gold"))[0]
    other.folder = stage.folder
    (problem,) = other.problems()
    assert "temperature was 1.0, is 2.0" in problem
    assert "tail was 'renormalize', is 'gold'" in problem
    with pytest.raises(RequestError, match="was made with other settings or inputs"):
        other.run(Processes("cpu"), Silent())


def test_what_is_not_aligned_is_asked_for(aligned, tmp_path):
    stage = fuse_stages(changed(aligned))[0]
    stage.folder = tmp_path / "fused"
    stage._aligned[0].folder = tmp_path / "elsewhere"
    with pytest.raises(
        FusechatError, match="neox: 280 of 280 samples are not aligned; run `fusechat-distill align"
    ):
        stage.run(Processes("cpu"), Silent())
    assert not stage.folder.exists()


def test_a_shard_without_an_answer_that_the_pivot_can_be_given(aligned, tmp_path, models):
    made = chain.rows(258)
    for row in made[256:]:  # a special token of the pivot's
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "<|im_end|>"}]
    path = chain.recipe(tmp_path, models, count=258, fusion={"strategy": "sft"})
    chain.write_rows(tmp_path / "chats.jsonl", made)
    (stage,) = fuse_all(open_inputs(path), tmp_path / "fused")
    assert [row["row"] for row in read(stage)] == list(range(256))
    nothing = FuseContext({}, {}), SampleRange(0, 0)
    table, summary = fuse_stages(changed(aligned))[0].make(*nothing)
    assert (len(table), summary.positions, summary.positions_with_target) == (0, 0, 0)


def test_who_is_held_out_depends_on_the_conversation_alone():
    keys = [f"{i:032x}" for i in range(0, 2**128, 2**120)]
    assert sum(held_out(key, 0.25) for key in keys) == 64
    assert not any(held_out(key, 0.0) for key in keys)
    assert {k for k in keys if held_out(k, 0.1)} <= {k for k in keys if held_out(k, 0.2)}
