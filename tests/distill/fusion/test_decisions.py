"""`decisions.json`: what it says of the sums, its format, and a file that can't be read."""

from __future__ import annotations

import json

import pytest

from fusechat_common.errors import FusechatError
from fusechat_distill.fusion.decisions import Decisions, FuseSummary


def test_shares_are_of_what_was_compared(tmp_path):
    first = FuseSummary(
        samples=3,
        tokens=40,
        positions=30,
        samples_compared=2,
        samples_won=[1.0, 1.0],
        positions_compared=20,
        positions_won=[5.0, 15.0],
    )
    other = FuseSummary(
        samples=2,
        tokens=9,
        positions=8,
        samples_compared=2,
        samples_won=[0.0, 2.0],
        positions_compared=0,
        positions_won=[0.0, 0.0],
    )
    decisions = Decisions.of(("pivot", "a"), FuseSummary() + first + other)
    decisions.write(tmp_path)
    assert json.loads((tmp_path / "decisions.json").read_text()) == {
        "format": 1,
        "samples": 5,
        "held_out": 0,
        "tokens": 49,
        "positions": 38,
        "samples_compared": 4,
        "positions_compared": 20,
        "won": {
            "pivot": {"samples": 0.25, "positions": 0.25},
            "a": {"samples": 0.75, "positions": 0.75},
        },
    }
    assert Decisions.read(tmp_path) == decisions


def test_nothing_compared_is_a_share_of_nothing():
    summary = FuseSummary(samples=1, samples_compared=0, samples_won=[0.0, 0.0])
    won = Decisions.of(("pivot", "a"), summary).model_dump(exclude_none=True)["won"]
    assert won == {"pivot": {"samples": 0.0}, "a": {"samples": 0.0}}
    assert Decisions.of((), FuseSummary(samples=1)).won == {}


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"won": {"pivot": 1}}'])
def test_a_file_that_cannot_be_read_is_named_with_its_remedy(tmp_path, content):
    (tmp_path / "decisions.json").write_text(content)
    with pytest.raises(FusechatError, match=r"decisions.json: can't be read \(.*delete it, and"):
        Decisions.read(tmp_path)
    (tmp_path / "decisions.json").unlink()
    with pytest.raises(FileNotFoundError):
        Decisions.read(tmp_path)
