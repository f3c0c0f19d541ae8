"""The fuse stage: its dataset against a reference in plain Python, resume, joins, refusals."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from fusechat_common.errors import FusechatError, RequestError
from fusechat_distill.alignment.stage import AlignedSample, align_stages, aligned_samples
from fusechat_distill.fusion.stage import byte_counts, fuse_stages, held_out, join_sample
from fusechat_distill.inputs.open import Inputs, open_inputs
from fusechat_distill.recipe.schema import Fusion
from fusechat_distill.scoring.stage import score_stages
from fusechat_distill.storage.processes import Processes
from fusechat_distill.storage.shards import ScoreStore, Shards
from fusechat_distill.text.conversations import Conversation, Message, Rendering, Response
from fusechat_distill.text.scored import ScoredResponse, ScoredSample
from tests.support import chain


class Silent:
    def start(self, title, total):
        pass

    def advance(self, samples, tokens):
        pass

    def stop(self):
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    chain.save_models(folder)
    return folder


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


def changed(inputs: Inputs, tmp_path: Path | None = None, **fusion) -> Inputs:
    unmatched = fusion.pop("unmatched", "one_hot")
    recipe = inputs.recipe.model_copy(
        update={
            "fusion": Fusion(**fusion),
            "alignment": inputs.recipe.alignment.model_copy(update={"unmatched": unmatched}),
        }
    )
    return replace(inputs, recipe=recipe)


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


# The reference: one sample at a time, dictionaries, float64.


def dense(logprobs: dict[int, float], temperature: float, tail: str) -> dict[int, float]:
    heated = {i: math.exp(v / temperature) for i, v in logprobs.items()}
    total = sum(heated.values())
    mass = 1.0 if tail == "renormalize" else min(1.0, sum(math.exp(v) for v in logprobs.values()))
    return {i: v / total * mass for i, v in heated.items()}


def entries(ids, logprobs) -> dict[int, float]:
    return {int(i): float(v) for i, v in zip(ids, logprobs, strict=True) if v > -np.inf}


def reference(inputs: Inputs, sources: tuple[str, ...]):
    """Per key: list of (token index, distribution), and each model's share of each position."""
    fusion, unmatched = inputs.recipe.fusion, inputs.recipe.alignment.unmatched
    names = ("pivot", *sources)
    stores = {name: ScoreStore(inputs.scores_folder(inputs.models[name])) for name in names}
    found: dict[str, dict[str, AlignedSample]] = {}
    for name in sources:
        shards = Shards.open(inputs.recipe.output_folder / "aligned" / name)
        found[name] = {
            sample.key: sample
            for part in shards.manifest.ranges()
            for sample in aligned_samples(shards.read(part))
        }
    results = {}
    for key in stores["pivot"]:
        pivot = stores["pivot"][key]
        text = {m: inputs.conversations[inputs.conversations.keys.index(key)].messages for m in [0]}
        there = {"pivot": {r.turn for r in pivot.responses}}
        for name in sources:
            if key in found[name]:
                turns = {r.turn for r in stores[name][key].responses}
                if turns & there["pivot"]:
                    there[name] = turns
        shared = set.intersection(*there.values())
        # Distributions at every position of the pivot, by model.
        flat = [(r, i) for r in pivot.responses for i in range(len(r.tokens))]
        rows: dict[str, list[dict[int, float] | None]] = {
            "pivot": [dense(entries(r.ids[i], r.logprobs[i]), fusion.temperature, fusion.tail)
                      for r, i in flat]
        }  # fmt: skip
        for name in there:
            if name == "pivot":
                continue
            sample, at = found[name][key], 0
            rows[name] = []
            for match in sample.matches:
                if match < 0:
                    rows[name].append(None)
                    continue
                own = entries(sample.ids[at], sample.logprobs[at])
                at += 1
                rows[name].append(dense(own, fusion.temperature, fusion.tail) if own else None)
        # Segments of positions that are decided on together.
        if fusion.level == "sequence":
            starts = [0]
        else:
            starts = [0] + [
                p
                for p in range(1, len(flat))
                if all(found[name][key].matches[p] >= 0 for name in there if name != "pivot")
            ]
        bounds = list(zip(starts, [*starts[1:], len(flat)], strict=True))
        shares = []
        for first, last in bounds:
            losses = {}
            size = 0
            for p in range(first, last):
                r, i = flat[p]
                if r.turn not in shared:
                    continue
                content = text[0][r.turn].content.encode()
                known = [e for e in (r.begin, *r.ends[:i]) if e >= 0]
                before = max(known)
                if r.ends[i] >= 0:
                    size += r.ends[i] - before
                elif before < r.end and not any(e >= 0 for e in r.ends[i:]):
                    size += (r.end - before) if r.ends[i - 1] >= 0 or i == 0 else 0
                assert r.end <= len(content)
            for name in there:
                own = [
                    (r.turn, -float(g)) for r in stores[name][key].responses
                    for g in r.gold_logprobs
                ]  # fmt: skip
                if name == "pivot":
                    low, high = first, last
                else:
                    matches = found[name][key].matches
                    inside = [int(m) for m in matches[first:] if m >= 0]
                    low = inside[0] if inside and first else 0
                    later = [int(m) for m in matches[last:] if m >= 0] if last < len(flat) else []
                    high = later[0] if later else len(own)
                part = [nll for turn, nll in own[low:high] if turn in shared]
                divisor = size if fusion.cross_entropy == "byte" else len(part)
                losses[name] = sum(part) / max(divisor, 1)
            if fusion.function == "min_ce":
                best = min(there, key=lambda n: (losses[n], names.index(n)))
                shares.append({best: 1.0})
            else:
                weights = {n: math.exp(-losses[n]) for n in there}
                total = sum(weights.values())
                shares.append({n: w / total for n, w in weights.items()})
        decided, targets = [], []
        for (first, last), share in zip(bounds, shares, strict=True):
            for p in range(first, last):
                mixed: dict[int, float] = defaultdict(float)
                for name, weight in share.items():
                    row = rows[name][p]
                    if row is None:
                        row = rows["pivot"][p] if unmatched == "pivot" else {}
                    for token, prob in row.items():
                        mixed[token] += weight * prob
                decided.append(share)
                targets.append({t: v for t, v in mixed.items() if v > 0})
        results[key] = decided, targets
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
        table = read(stage)
        assert [row["row"] for row in table] == list(range(280))
        won = defaultdict(float)
        compared = 0
        for row in table:
            key = row["key"].hex()
            _, targets = expected[key]
            live = [i for i, label in enumerate(row["labels"]) if label != -100]
            assert [row["labels"][i] for i in live] == [row["input_ids"][i] for i in live]
            assert len(live) == len(targets)
            for i, target in zip(live, targets, strict=True):
                ids, probs = row["fusion_ids"][i], row["fusion_probs"][i]
                got = {t: p for t, p in zip(ids, probs, strict=True) if p > 0}
                assert got == pytest.approx(target, abs=2e-6)
                assert probs == sorted(probs, reverse=True)
            dead = set(range(len(row["labels"]))) - set(live)
            assert all(sum(row["fusion_probs"][i]) == 0 for i in dead)
        keys = {row["row"]: row["key"].hex() for row in table}
        source_stores = [ScoreStore(inputs.scores_folder(inputs.models[s])) for s in stage.sources]
        for key in keys.values():
            if not any(key in store for store in source_stores):
                continue
            for share in expected[key][0]:
                compared += 1
                for name, weight in share.items():
                    won[name] += weight
        said = json.loads((stage.folder / "decisions.json").read_text())
        assert said["positions_compared"] == compared
        for name in stage.models:
            assert said["won"][name]["positions"] == pytest.approx(won[name] / compared, abs=1e-5)
            assert ("samples" in said["won"][name]) == (inputs.recipe.fusion.level == "sequence")
        assert 0 < sum(row["held_out"] for row in table) == said["held_out"] < 60


def test_a_source_without_an_answer_is_compared_over_the_others(aligned, tmp_path):
    """neox takes one of two answers; what the pivot lost on the other one doesn't count."""

    def response(turn, first, nll):
        n = len(nll)
        return ScoredResponse(
            turn=turn,
            begin=0,
            end=n - 1,
            first=first,
            pending=b"",
            stop="special",
            tokens=np.arange(n, dtype=np.uint32),
            ends=np.array([*range(1, n), -1], np.int32),
            ids=np.arange(2 * n, dtype=np.uint32).reshape(n, 2),
            logprobs=np.full((n, 2), -1, np.float16),
            gold_logprobs=-np.array(nll, np.float32),
        )

    def rendered(scored):
        return Response(
            scored.turn, scored.begin, scored.end, scored.first, scored.ends, b"", "special"
        )

    own = (response(1, 2, [1.0, 1.0, 1.0]), response(3, 8, [50.0, 50.0]))
    pivot = ScoredSample("00" * 16, 0, own)
    source = ScoredSample("00" * 16, 0, (response(1, 2, [2.0, 0.5, 2.0]),))
    conversation = Conversation("00" * 16, 0, tuple(Message("assistant", "ab") for _ in range(4)))
    rendering = Rendering(np.arange(10), tuple(rendered(r) for r in own))
    matches = AlignedSample(
        np.array([0, 1, 2, -1, -1], np.int32),
        np.zeros((3, 2), np.uint32),
        np.zeros((3, 2), np.float16),
        "00" * 16,
        0,
    )
    sample = join_sample(conversation, rendering, pivot, [(matches, source), None])
    first, second, third = sample.scores
    assert first.nll.tolist() == [1, 1, 1, 0, 0]
    assert first.tokens.tolist() == [1, 1, 1, 0, 0]
    assert second.nll.tolist() == [2, 0.5, 2, 0, 0]
    assert first.matched.all()
    assert sample.num_bytes.tolist() == [1, 1, 0, 0, 0]
    assert [bool(s.present[0]) for s in (first, second, third)] == [True, True, False]
    # Without a common answer it is as if the source had not scored the sample.
    other = ScoredSample("00" * 16, 0, (response(2, 2, [0.0, 0.0]),))
    sample = join_sample(conversation, rendering, pivot, [(matches, other)])
    assert not sample.scores[1].present[0]
    assert sample.scores[0].nll.tolist() == [1, 1, 1, 50, 50]
    # Without the pivot's scores nothing is compared, and the labels are learnt as they are.
    sample = join_sample(conversation, rendering, None, [None])
    assert not any(s.present[0] for s in sample.scores)
    assert len(sample.num_bytes) == 5
    # Scores of other tokens than the conversation's are no scores of it.
    with pytest.raises(FusechatError, match="5 positions where the conversation has 3; delete the"):
        join_sample(conversation, replace(rendering, responses=rendering.responses[:1]), pivot, [])


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
    assert json.loads((stage.folder / "decisions.json").read_text())["won"] == {}


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
    with pytest.raises(RequestError, match="was made otherwise"):
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
    table, summary = fuse_stages(changed(aligned))[0]._shard([])
    assert (len(table), summary.positions, summary.positions_with_target) == (0, 0, 0)


def test_who_is_held_out_depends_on_the_conversation_alone():
    keys = [f"{i:032x}" for i in range(0, 2**128, 2**120)]
    assert sum(held_out(key, 0.25) for key in keys) == 64
    assert not any(held_out(key, 0.0) for key in keys)
    assert {k for k in keys if held_out(k, 0.1)} <= {k for k in keys if held_out(k, 0.2)}
