"""The report: every number against one counted here, position by position."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fusechat_common.errors import RequestError
from fusechat_distill.alignment.stage import aligned_samples
from fusechat_distill.fusion.stage import fuse_stages
from fusechat_distill.inputs.open import Inputs
from fusechat_distill.recipe.schema import Alignment, Fusion
from fusechat_distill.report import compute
from fusechat_distill.report.page import tables, write_report
from fusechat_distill.report.schema import REASONS, Report
from fusechat_distill.storage.shards import ScoreStore, Shards, scores_table
from fusechat_distill.text.scored import ScoredSample
from fusechat_distill.text.tokens import vocabulary
from tests.distill.alignment.test_stage import changed, stages
from tests.support import real_tokenizers
from tests.support.chain import Silent, printed, read_json, refused
from tests.support.scores import Alone, random_scores, scored_recipe

ANSWERS = [
    ["Hello there, friend."],
    ["日本語 and café", "  spaced out \n"],
    ["def f(x):\n        return x + 1\n"],
    ["Cafe\u0301 A\u030a n\u0303 de\u0301ja\u0300 vu", "it is <|im_end|> here"],
    ["one", "Zwei, naïve café.", "internationalization, counterrevolutionary."],
]
SAMPLES = 270
MISSING = 11
"""Every so many samples one that the source `other` has no scores of."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Inputs:
    """A pivot and three sources; `other` and `twin` are aligned, `late` has not been scored."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = real_tokenizers.qwen(nfc=True, template=real_tokenizers.PLAIN)
    sources = (
        "[{folder}/other, {model: {folder}/twin, vocabulary: bytes}, "
        "{model: {folder}/twin, name: late}]"
    )
    inputs = scored_recipe(folder, ANSWERS, SAMPLES, tokenizer, sources, max_length=77)
    for seed, name in enumerate(("pivot", "other", "twin")):
        shards = random_scores(inputs, name, seed)
        if name == "other":
            store = ScoreStore(shards.folder)
            for samples in shards.manifest.ranges():
                kept = [s for s in store.shard(samples) if s.row % MISSING]
                shards.write(samples, scores_table(kept), {})
    for name in ("other", "twin"):
        stages(inputs)[name].run(Alone(), Silent())
    return inputs


@pytest.fixture
def inputs(made, tmp_path) -> Inputs:
    """The same with an output folder of its own."""
    shutil.copytree(made.recipe.output_folder, tmp_path / "out")
    return changed(made, output=str(tmp_path / "out"))


def report(inputs: Inputs) -> dict:
    """The content of `report.json`."""
    made = compute.report(inputs)
    assert Report.model_validate(made.as_json()) == made
    return made.as_json()


@pytest.fixture(scope="module")
def found(made) -> dict:
    return report(made)


def aligned(inputs: Inputs, name: str):
    """(pivot's sample, source's, aligned) of every sample that both scored."""
    pivot = ScoreStore(inputs.scores_folder(inputs.pivot))
    source = ScoreStore(inputs.scores_folder(inputs.models[name]))
    shards = Shards.open(inputs.recipe.aligned_folder / name)
    for samples in shards.present():
        for sample in aligned_samples(shards.read(samples)):
            yield pivot[sample.key], source[sample.key], sample


def states(response) -> list[int | None]:
    """The byte up to which each state has consumed the answer; of several at one the last."""
    at: list[int | None] = [response.begin, *(int(e) for e in response.ends[:-1])]
    last = {byte: t for t, byte in enumerate(at)}
    return [byte if byte >= 0 and last[byte] == t else None for t, byte in enumerate(at)]


def reason(pivot, t: int, source) -> str:
    at, others = states(pivot)[t], states(source)
    reached = max(byte for byte in others if byte is not None)
    if at is None:
        return "no_offset"
    if source.stop == "none" and source.ends[-1] >= 0 and at > reached and at < pivot.end:
        return "past_cut"
    if at in others or t == 0 or at == pivot.end or at > reached or at < source.begin:
        return "edge"
    begin = source.begin
    for end in source.ends.tolist():
        if end > at:
            return "inside_token" if begin is not None else "no_offset"
        begin = end if end >= 0 else None
    raise AssertionError("no token holds the state")


@pytest.mark.parametrize("name", ["other", "twin"])
def test_positions_and_why_they_have_no_match(made, found, name):
    counts: Counter[str] = Counter()
    source = ScoreStore(made.scores_folder(made.models[name]))
    pivot = ScoreStore(made.scores_folder(made.pivot))
    for key in pivot:
        if key not in source:
            counts["no_sample"] += sum(len(r.tokens) for r in pivot[key].responses)
    for left, right, sample in aligned(made, name):
        turns = {response.turn: response for response in right.responses}
        start = 0
        for response in left.responses:
            for t in range(len(response.tokens)):
                if sample.matches[start + t] >= 0:
                    counts["matched"] += 1
                elif response.turn not in turns:
                    counts["no_answer"] += 1
                else:
                    counts[reason(response, t, turns[response.turn])] += 1
            start += len(response.tokens)
    positions = dict(found["sources"][name]["positions"])
    assert positions.pop("mode") == "bytes"
    total = positions.pop("total")
    assert total == sum(counts.values())
    assert {what: round(share * total) for what, share in positions.items() if share} == counts
    assert sum(positions.values()) == pytest.approx(1)
    if name == "other":
        assert set(counts) == {"matched", *REASONS} - {"several"}


@pytest.mark.parametrize("name", ["other", "twin"])
def test_mass_and_the_gold_token(made, found, name):
    stage = stages(made)[name]
    mapped = stage._read_vocabulary()
    roles = stage._roles()
    mass: Counter[str] = Counter()
    before = after = matched = first_before = first_after = 0
    for left, right, sample in aligned(made, name):
        gold = np.concatenate([r.tokens for r in left.responses])
        own = np.concatenate([r.tokens for r in right.responses])
        ids = np.concatenate([r.ids for r in right.responses])
        probs = np.exp(np.concatenate([r.logprobs for r in right.responses]).astype(np.float64))
        row = 0
        for t, state in enumerate(sample.matches.tolist()):
            if state < 0:
                continue
            for token, prob in zip(ids[state].tolist(), probs[state].tolist(), strict=True):
                target = int(mapped.ids[token])
                if token in roles or (target >= 0 and not mapped.source.text[token]):
                    kind = "special"
                elif target < 0:
                    kind = "dropped"
                elif mapped.pivot.tokens[target] == mapped.source.tokens[token]:
                    kind = "exact"
                else:
                    kind = "mapped"
                mass[kind] += prob
                before += prob
            arrived = np.exp(sample.logprobs[row].astype(np.float64))
            after += arrived.sum()
            first_before += ids[state][0] == own[state]
            first_after += arrived[0] > 0 and sample.ids[row][0] == gold[t]
            matched += 1
            row += 1
    source = found["sources"][name]
    assert source["mass"] == {
        "kept": pytest.approx(after / before),
        **{
            kind: pytest.approx(mass[kind] / before)
            for kind in ("exact", "mapped", "special", "dropped")
        },
    }
    assert source["gold_first"] == {
        "before": pytest.approx(first_before / matched),
        "after": pytest.approx(first_after / matched),
    }
    if name == "other":
        assert all(mass[kind] > 0 for kind in ("exact", "mapped", "dropped"))
        assert first_after < first_before
    else:
        assert mass["special"] > 0


@pytest.mark.parametrize("name", ["other", "twin"])
def test_edges_of_answers(made, found, name):
    answers = first = ends = last = 0
    over = [0, 0]
    for left, right, sample in aligned(made, name):
        turns = {response.turn: response for response in right.responses}
        start = 0
        for response in left.responses:
            matches = sample.matches[start : start + len(response.tokens)]
            start += len(response.tokens)
            if response.turn not in turns:
                continue
            answers += 1
            first += matches[0] >= 0
            byte = [b == response.end for b in states(response)]
            if response.stop != "none" and any(byte):
                ends += 1
                last += matches[byte.index(True)] >= 0
            for i, side in enumerate((response, turns[response.turn])):
                over[i] += side.ends[-1] < 0 and side.end not in states(side)
    assert found["sources"][name]["edges"] == {
        "begins_matched": pytest.approx(first / answers),
        "ends_matched": pytest.approx(last / ends),
        "pivot_run_over": pytest.approx(over[0] / answers),
        "source_run_over": pytest.approx(over[1] / answers),
    }
    if name == "other":
        assert over[1] > 0


@pytest.mark.parametrize("per", ["byte", "token"])
def test_cross_entropy_and_samples_won(made, found, per):
    if per == "token":
        found = report(changed(made, fusion=Fusion(cross_entropy="token")))
    nll, size = np.zeros(2), np.zeros(2)
    won = [0, 0]
    for left, right, _ in aligned(made, "other"):
        common = {r.turn for r in left.responses} & {r.turn for r in right.responses}
        lost, tokens, length = [], [], []
        for sample in (left, right):
            shared = [r for r in sample.responses if r.turn in common]
            lost.append(-sum(float(p) for r in shared for p in r.gold_logprobs))
            tokens.append(sum(len(r.tokens) for r in shared))
            length.append(sum(r.end - r.begin for r in shared))
        nll += lost
        size += length
        # Bytes are the same text's; tokens are each model's own.
        better = lost[1] < lost[0] if per == "byte" else lost[1] / tokens[1] < lost[0] / tokens[0]
        won[better] += 1
    source = found["sources"]["other"]
    assert source["cross_entropy"] == {
        "pivot": pytest.approx(nll[0] / size[0]),
        "source": pytest.approx(nll[1] / size[1]),
    }
    assert source["samples"] == {
        "compared": sum(won),
        "per": per,
        "pivot_won": pytest.approx(won[0] / sum(won)),
        "source_won": pytest.approx(won[1] / sum(won)),
    }
    assert min(won) > 10


def test_targets_are_what_the_fuse_stage_decided(inputs):
    assert report(inputs)["targets"] == dict.fromkeys(("other", "twin", "late"))
    (stage,) = fuse_stages(inputs, ["other"])
    stage.run(Alone(), Silent())
    found = report(inputs)
    decided = read_json(stage.folder / "decisions.json")
    assert found["targets"] == {"other": decided, "twin": None, "late": None}
    samples = found["sources"]["other"]["samples"]
    assert decided["samples_compared"] == samples["compared"]
    assert decided["won"]["other"]["samples"] == pytest.approx(samples["source_won"])
    (stage.folder / "decisions.json").unlink()
    assert report(inputs)["targets"]["other"] is None


def test_the_worst_samples_side_by_side(made, found):
    arrives = {}
    for left, right, sample in aligned(made, "other"):
        matched = sample.matches >= 0
        entries = np.concatenate([r.logprobs for r in right.responses])[sample.matches[matched]]
        before = np.exp(entries.astype(np.float64)).sum()
        kept = np.exp(sample.logprobs.astype(np.float64)).sum() / before
        arrives[left.row] = matched.mean() * kept, matched.mean(), kept
    worst = sorted(arrives, key=lambda row: (arrives[row][0], row))[:3]
    shown = found["sources"]["other"]["worst"]
    assert [entry["row"] for entry in shown] == worst
    tables = [vocabulary(made.models[name].renderer.tokenizer) for name in ("pivot", "other")]
    samples = {left.row: (left, right) for left, right, _ in aligned(made, "other")}
    for entry in shown:
        _, matched, kept = arrives[entry["row"]]
        assert (entry["matched"], entry["kept"]) == (pytest.approx(matched), pytest.approx(kept))
        indices = [segment["index"] for segment in entry["segments"]]
        assert indices == sorted(set(indices))
        if len(indices) < entry["segments"][0]["of"]:
            continue
        for side, table, sample in zip(
            ("pivot", "source"), tables, samples[entry["row"]], strict=True
        ):
            text = "".join(token for segment in entry["segments"] for token in segment[side])
            parts = [
                table.tokens[i].decode(errors="backslashreplace")
                if table.text[i]
                else f"<special {i}>"
                for r in sample.responses
                for i in r.tokens.tolist()
            ]
            assert text == "".join(parts)
            lost = sum(segment[f"{side}_logprob"] for segment in entry["segments"])
            expected = sum(r.gold_logprobs.sum(dtype=np.float64) for r in sample.responses)
            assert lost == pytest.approx(expected, abs=1e-3)


def test_one_sample_side_by_side(made):
    pivot, source, sample = next(entry for entry in aligned(made, "other") if entry[2].row == 5)
    tables = tuple(vocabulary(made.models[name].renderer.tokenizer) for name in ("pivot", "other"))
    segments = compute.longest_segments(pivot, source, sample, tables)
    shown = [("".join(segment.pivot), "".join(segment.source)) for segment in segments]
    assert shown == [
        (" Hello", "Hello"),
        *((text, text) for text in (" there", ",", " friend")),
        (".<special 32000>", ".\n\n"),
    ]
    assert all(1 <= len(segment.arrived) <= 3 for segment in segments)
    lost = sum(segment.source_logprob for segment in segments)
    assert lost == pytest.approx(source.responses[0].gold_logprobs.sum(), abs=1e-4)


def test_papers_positions_have_one_reason(inputs):
    other = changed(inputs, alignment=Alignment(positions="dtw"))
    shutil.rmtree(inputs.recipe.aligned_folder)
    stages(other)["twin"].run(Alone(), Silent())
    positions = report(other)["sources"]["twin"]["positions"]
    assert positions["mode"] == "dtw"
    assert positions["matched"] + positions["several"] == pytest.approx(1)
    assert 0 < positions["several"] < 0.5


def test_what_is_not_there_is_said(inputs):
    late = "the scores of late are not complete; run `fusechat-distill score RECIPE --model late`"
    (inputs.recipe.aligned_folder / "twin" / "00000256-00000270.parquet").unlink()
    sources = report(inputs)["sources"]
    assert sources["late"] == {
        "model": inputs.models["late"].spec.model,
        "aligned": {"done": 0, "total": SAMPLES},
        "problem": f"late: {late}, then `align`",
    }
    assert sources["other"]["problem"] is None
    assert sources["twin"]["aligned"] == {"done": 256, "total": SAMPLES}
    assert sources["twin"]["problem"] == (
        "twin: 14 of 270 samples are not aligned; run `fusechat-distill align RECIPE --source twin`"
    )
    pivot = ScoreStore(inputs.scores_folder(inputs.pivot))
    there = pivot.shard(pivot.shards.manifest.ranges()[0])
    assert sources["twin"]["positions"]["total"] == sum(
        len(r.tokens) for sample in there for r in sample.responses
    )
    shutil.rmtree(inputs.recipe.aligned_folder / "other")
    em = changed(inputs, alignment=Alignment(vocabulary="em"))
    shutil.copytree(inputs.recipe.aligned_folder / "twin", inputs.recipe.aligned_folder / "other")
    problem = report(em)["sources"]["other"]["problem"]
    assert "was made with other settings or inputs" in problem
    assert "move it away or delete it" in problem


def test_a_source_that_nothing_matches(inputs):
    """It has scores of one answer, of which only the bytes of the end are known: no share is made
    of nothing, and no sample of it is put side by side."""
    folder = inputs.scores_folder(inputs.models["other"])
    shards, store = Shards.open(folder), ScoreStore(folder)
    first, second = shards.manifest.ranges()
    sample = store.shard(second)[-1]
    (whole, *_) = sample.responses
    response = replace(whole, begin=whole.begin + 1, ends=np.full_like(whole.ends, -1))
    shards.write(first, scores_table([]), {})
    shards.write(second, scores_table([ScoredSample(sample.key, sample.row, (response,))]), {})
    for old in ("other", ".vocabularies"):
        shutil.rmtree(inputs.recipe.aligned_folder / old)
    assert stages(inputs)["other"].run(Alone(), Silent()).complete
    found = report(inputs)["sources"]["other"]
    pivots = ScoreStore(inputs.scores_folder(inputs.pivot))[sample.key].responses
    positions = found["positions"]
    assert positions["matched"] == 0
    there = sum(len(r.tokens) for r in pivots) / positions["total"]
    assert positions["no_sample"] == 1 - there
    assert set(found["edges"].values()) == {None}
    assert found["mass"]["kept"] is None
    write_report(compute.report(inputs), inputs.recipe.output_folder / "report")


def test_the_command_writes_json_and_a_page(made, found, monkeypatch):
    recipe = made.recipe.output_folder.parent / "recipe.yaml"
    monkeypatch.setattr("fusechat_distill.inputs.open.open_inputs", lambda path, **options: made)
    folder = made.recipe.output_folder / "report"
    assert json.loads(printed("report", recipe, "--json")) == found
    assert read_json(folder / "report.json") == found
    page = (folder / "report.png").read_bytes()
    assert page.startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png"]
    write_report(Report(**found), folder)
    assert (folder / "report.png").read_bytes() == page
    shown = printed("report", recipe)
    assert all(name in shown for name in ("twin", "other", "late", "written: "))

    shutil.rmtree(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("report", recipe) == (
        "Error: report: draws with matplotlib, which is missing: pip install 'fusechat[report]'\n"
    )
    assert not folder.exists()


def test_tables_say_it_too(found):
    console = Console(file=io.StringIO(), width=100, record=True)
    for shown in tables(Report(**found)):
        console.print(shown)
    text = console.export_text()
    other = found["sources"]["other"]
    for said in (
        "not: inside a source token",
        f"{other['positions']['matched']:.1%}",
        f"{other['cross_entropy']['source']:.3f}",
        "late: the scores of late are not complete",
        f"other, row {other['worst'][0]['row']}: ",
        "<special·32000>",
    ):
        assert said in text


def test_nothing_aligned_is_an_error(inputs):
    shutil.rmtree(inputs.recipe.aligned_folder)
    with pytest.raises(RequestError) as raised:
        report(inputs)
    assert [problem.partition(":")[0] for problem in raised.value.problems] == [
        "other", "twin", "late",
    ]  # fmt: skip
    assert "align RECIPE --source other" in raised.value.problems[0]
    with pytest.raises(RequestError, match="nothing to report on"):
        report(replace(inputs, models={"pivot": inputs.pivot}))
