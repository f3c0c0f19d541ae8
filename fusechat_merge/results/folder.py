"""Writes all files of a merged model but its weights: config, tokenizer, record, card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fusechat_merge import __version__
from fusechat_merge.planning.configuration import referenced_models
from fusechat_merge.planning.plan import Plan
from fusechat_merge.planning.side_files import (
    as_json,
    index,
    merged_config,
    own_template,
    side_files,
)
from fusechat_merge.results.card import model_card
from fusechat_merge.results.published import PublicNames
from fusechat_merge.results.record import RECORD, MergeRecord, UnitWeights


def write_side_files(
    planned: Plan,
    units: Sequence[UnitWeights],
    identity: str,
    device: str,
    folder: Path,
    report: bool,
) -> None:
    """Write all files but the weights into `folder`; existing ones are replaced.

    Args:
        planned: the merge.
        units: the merge's statistics and weights.
        identity: hash by which the finished merge is recognised.
        device: where it was computed.
        folder: where to write.
        report: whether to write `README.md` and `mergekit_config.yml`.
    """
    donor = planned.models[planned.donor].folder
    assert donor is not None
    for name in side_files(planned, donor):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(donor / name, folder / name)
    if planned.tokenizer is not None:
        tokenizer = planned.tokenizer.tokenizer
        if planned.chat_template:
            tokenizer.chat_template = planned.chat_template
        tokenizer.save_pretrained(folder)
    elif planned.chat_template:
        _write(folder / "chat_template.jinja", planned.chat_template)
        # A template in the tokenizer's settings would take precedence over the requested one.
        settings = own_template(donor)
        if settings is not None:
            del settings["chat_template"]
            _write(folder / "tokenizer_config.json", as_json(settings))
    original = (donor / "config.json").read_text(encoding="utf-8")
    _write(folder / "config.json", merged_config(original, planned))
    if len(planned.shards) > 1:
        _write(folder / "model.safetensors.index.json", index(planned))
    names = PublicNames(planned.config)
    record = _record(planned, names, units, identity, device)
    _write(folder / RECORD, record.as_text())
    if report:
        source = names.configuration(planned.source)
        hub_ids = names.hub_ids(referenced_models(planned.config))
        _write(folder / "README.md", model_card(record, hub_ids, source))
        _write(folder / "mergekit_config.yml", source)


def _record(
    planned: Plan, names: PublicNames, units: Sequence[UnitWeights], identity: str, device: str
) -> MergeRecord:
    config = planned.config
    granularities = sorted({unit.granularity for unit in units})
    public = {str(model): names.of(model) for model in referenced_models(config)}
    return MergeRecord.model_validate(
        {
            "fusechat": __version__,
            "merge_method": config.merge_method,
            "base_model": names.of(config.base_model) if config.base_model else None,
            "models": list(public.values()),
            "granularity": granularities[0] if len(granularities) == 1 else granularities or None,
            "units": units,
            "merged_by_name": planned.by_name,
            "copied_from_base": planned.copied,
            "left_out": [asdict(left) | {"model": public[left.model]} for left in planned.left_out],
            "dequantised": [
                f"{public[name]}: {model.quantised}"
                for name, model in planned.models.items()
                if model.quantised
            ],
            "identity": identity,
            "device": device,
        }
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
