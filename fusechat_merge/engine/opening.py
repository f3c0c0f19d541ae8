"""Whether a merged folder opens as what was written: by its config, tensors and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

from fusechat_common.errors import one_line
from fusechat_merge.inputs.loading import loading
from fusechat_merge.planning.plan import Plan


def opening_problems(planned: Plan, out: Path) -> tuple[str, list[str]]:
    """What `from_pretrained` would find wrong with a merged folder, and not with its base.

    Args:
        planned: the merge.
        out: the merged folder; its weights are as planned.

    Returns:
        The class that opens it, or why that can't be said; and the problems.
    """
    base = planned.models[planned.donor]
    assert base.folder is not None
    trust = planned.options.trust_remote_code
    problems = _tokenizer_problems(planned, out)
    try:
        config = AutoConfig.from_pretrained(out, trust_remote_code=trust)
        merged = loading(config, {o.tensor: o.tensor_shape for o in planned.outputs})
    except LookupError as error:
        return f"not checked whether it loads: {error}", problems
    except Exception as error:  # transformers' errors have no common base
        return "", [*problems, f"{out}: can't be loaded ({one_line(error)})"]
    alone = loading(
        AutoConfig.from_pretrained(base.folder, trust_remote_code=trust),
        {name: at.shape for name, at in base.tensors.items()},
    )
    (kind,) = config.architectures
    return kind, problems + [f"{out}: loads {problem}" for problem in merged.beyond(alone)]


def _tokenizer_problems(planned: Plan, out: Path) -> list[str]:
    """Token ids of `tokenizer.json` for which the embeddings have no row."""
    try:
        tokenizer = json.loads((out / "tokenizer.json").read_bytes())
        vocabulary = tokenizer["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
        largest = max([*ids, *(added["id"] for added in tokenizer["added_tokens"])])
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or of another form
        return []
    rows = [
        output.tensor_shape[0]
        for output in planned.outputs
        if output.name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))
    ]
    if not rows or largest < max(rows):
        return []
    return [
        f"{out}: its tokenizer has ids up to {largest}, its embeddings {max(rows)} rows; the same"
        f" is so in {planned.donor} if nothing changed the tokenizer"
    ]
