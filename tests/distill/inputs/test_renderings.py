"""How often conversations are rendered, and that what is kept is what would be made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fusechat_distill.alignment.stage import align_stages
from fusechat_distill.fusion.stage import fuse_stages
from fusechat_distill.inputs.open import open_inputs
from fusechat_distill.inputs.renderings import OBJECTS, Renderings
from fusechat_distill.scoring.stage import score_stages
from fusechat_distill.storage.processes import Processes
from fusechat_distill.text.conversations import Renderer
from tests.support import chain

COUNT = 70  # more than are rendered to see that the templates work


class Silent:
    def start(self, title, total):
        pass

    def advance(self, samples, tokens):
        pass

    def stop(self):
        pass


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Two sources; some conversations are cut, one stands there twice."""
    folder = tmp_path_factory.mktemp("renderings")
    chain.save_models(folder)
    sources = [str(folder / name) for name in ("neox", "twin")]
    path = chain.recipe(folder, folder, count=COUNT, sources=sources)
    made = chain.rows(COUNT)
    for row in made[::10]:
        row["messages"][-1]["content"] = "The cat sat on the mat. " * 20
    made[7] = made[3]
    chain.write_rows(folder / "chats.jsonl", made)
    return path


@pytest.fixture
def rendered(monkeypatch) -> Counter[tuple[str, str]]:
    """How often each conversation was rendered: by tokenizer and key."""
    counts: Counter[tuple[str, str]] = Counter()
    render = Renderer.__call__

    def call(self, conversations):
        name = Path(self.tokenizer.name_or_path).name
        counts.update((name, conversation.key) for conversation in conversations)
        return render(self, conversations)

    monkeypatch.setattr(Renderer, "__call__", call)
    return counts


def test_the_pivot_renders_every_conversation_once(recipe, rendered):
    inputs = open_inputs(recipe)
    for stage in [*score_stages(inputs), *align_stages(inputs), *fuse_stages(inputs)]:
        assert stage.run(Processes("cpu"), Silent()).complete
    keys = set(inputs.conversations.keys)
    assert len(keys) == COUNT - 1
    assert {key: rendered["pivot", key] for key in keys} == dict.fromkeys(keys, 1)
    # Sources once for their scores, the first ones to see that their templates work.
    for name in ("neox", "twin"):
        assert sum(rendered[name, key] for key in keys) == COUNT + 64


@pytest.mark.parametrize("room", [0, 20 * OBJECTS, 2**20])
def test_what_is_kept_is_what_would_be_made(recipe, rendered, room):
    inputs = open_inputs(recipe)
    conversations, renderer = inputs.conversations[:COUNT], inputs.pivot.renderer
    expected = [rendering.cut_to(64) for rendering in renderer(conversations)]
    assert 0 < sum(cut is not None for _, cut in expected) < COUNT
    rendered.clear()
    renderings = Renderings(renderer, room)
    assert renderings.cuts(conversations, 64) == [cut for _, cut in expected]
    assert rendered.total() == COUNT - 1
    for _ in range(2):
        found = renderings(conversations, 64)
        for (rendering, cut), (other, other_cut) in zip(found, expected, strict=True):
            assert cut == other_cut
            assert rendering.input_ids.tolist() == other.input_ids.tolist()
            for one, two in zip(rendering.responses, other.responses, strict=True):
                assert np.array_equal(one.ends, two.ends)
                assert (one.turn, one.first, one.stop) == (two.turn, two.first, two.stop)
    again = rendered.total() - (COUNT - 1)
    kept = COUNT - 1 - again // 2
    assert {0: kept == 0, 20 * OBJECTS: 5 < kept < 20, 2**20: kept == COUNT - 1}[room]
    # Another length is another rendering, and where it is cut stays known.
    rendered.clear()
    assert renderings.cuts(conversations, 16) != renderings.cuts(conversations, 64)
    assert rendered.total() == COUNT - 1
