"""From a mergekit configuration to the plan of its merge, read from headers alone.

Everything that is wrong with the request is reported here, at once, before a weight is read.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mergekit.architecture import ModelArchitecture, arch_info_for_config, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config, _set_chat_template, _update_config_vocab
from mergekit.tokenizer import BuildTokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from fusechat_common.errors import RequestError, one_line
from fusechat_merge.inputs.checkpoint import Checkpoint, CheckpointError
from fusechat_merge.inputs.layouts import in_layout_of
from fusechat_merge.mergekit_bridge.by_files import files_architecture, fits
from fusechat_merge.mergekit_bridge.loader import DTYPES, loading
from fusechat_merge.mergekit_bridge.methods import weightless
from fusechat_merge.mergekit_bridge.parameters import idle_filters, pieces_of
from fusechat_merge.mergekit_bridge.units import with_units
from fusechat_merge.methods.units import members_of
from fusechat_merge.planning.configuration import (
    name_adapters,
    read_adapter,
    read_config,
    read_model,
    referenced_models,
)
from fusechat_merge.planning.layer_keys import follow_layers
from fusechat_merge.planning.outputs import LayerPlanner, OutputMaker, plan_unknown
from fusechat_merge.planning.plan import DTYPE_NAMES, LeftOut, Options, Output, Plan, Shard
from fusechat_merge.planning.side_files import links_that_escape

_PAGE = 4096


def plan(
    config: str | Path | Mapping[str, Any] | MergeConfiguration,
    *,
    download: bool = False,
    **options: Any,
) -> Plan:
    """Plan a merge from its configuration and the models' headers.

    Args:
        config: path of a mergekit YAML, or the configuration itself.
        download: fetch models from the hub whole; else only their headers are read there.
        options: fields of `Options`.

    Returns:
        The plan; what is wrong with the request is listed in its `problems`.

    Raises:
        RequestError: the configuration can't be read as one of mergekit's.
    """
    result = read_config(config, Options(**options))
    name_adapters(result.config)
    models: dict[ModelReference, Checkpoint] = {}
    for reference in referenced_models(result.config):
        try:
            checkpoint = models[reference] = read_model(reference, result.options, download)
            changed = read_adapter(reference, checkpoint, result.options, download)
            result.models[str(reference)] = changed
        except CheckpointError as error:
            result.problems += error.problems
    if not result.problems:
        result.problems += _range_problems(result)
    if result.problems:
        return result
    configs = _configs(result)
    if not result.problems:
        _present(result, configs, models, download)
    if not result.problems:
        presented = {reference: result.models[str(reference)] for reference in models}
        with loading(presented, result.options.of_mergekit()):
            _plan_outputs(result, configs)
    return result


def _configs(planned: Plan) -> dict[str, PretrainedConfig]:
    """Every model's configuration, the base's first."""
    configs: dict[str, PretrainedConfig] = {}
    for reference in referenced_models(planned.config):
        try:
            configs[str(reference)] = reference.config(planned.options.trust_remote_code)
        except Exception as error:  # transformers' errors have no common base, and name no model
            planned.problems.append(f"{reference}: config.json: {one_line(error)}")
    return configs


def _present(
    planned: Plan,
    configs: Mapping[str, PretrainedConfig],
    plain: Mapping[ModelReference, Checkpoint],
    download: bool,
) -> None:
    """Give every checkpoint the names and the layout of the base's files.

    Args:
        planned: its models are replaced.
        configs: every model's, the base's first.
        plain: the checkpoints without adapters.
        download: as in `plan`.
    """
    planned.donor = next(iter(configs))
    base = next(iter(plain.values()))
    for reference, checkpoint in plain.items():
        model = str(reference)
        presented = in_layout_of(base, configs[planned.donor], checkpoint, configs[model])
        if presented is checkpoint:
            continue
        try:
            planned.models[model] = read_adapter(
                reference, presented, planned.options, download, configs[planned.donor]
            )
        except CheckpointError as error:
            planned.problems += error.problems


def _architecture(planned: Plan, configs: Mapping[str, PretrainedConfig]) -> ModelArchitecture:
    """mergekit's table of the models' tensors; where it has none that fits, one by the files.

    Raises:
        RuntimeError: the models have different architectures.
    """
    models = [planned.models[model] for model in configs]
    base = next(iter(configs.values()))
    logging.getLogger("mergekit.architecture").setLevel(logging.ERROR)  # not every class has one
    tables = all(arch_info_for_config(config) for config in configs.values())
    within = _one_within_another(configs.values())
    if planned.config.modules or (tables and not within):
        table = get_architecture_info(planned.config, planned.options.of_mergekit())
        if planned.config.modules or fits(table, base, models[0].tensors):
            return table
    kinds = {str(config.architectures) for config in configs.values()}
    if not tables and not within and len(kinds) > 1 and not planned.options.allow_crimes:
        raise RequestError(_different(configs))
    return files_architecture(models, base)


def _range_problems(planned: Plan) -> list[str]:
    """Slices of more layers than there can be, which mergekit would plan one by one."""
    return [
        f"layer_range {list(source.layer_range)}: {source.model} has not so many layers"
        for piece in pieces_of(planned.config).values()
        for part in piece.slices or []
        for source in part.sources
        if source.layer_range
        and source.layer_range[1] - source.layer_range[0]
        > len(planned.models[str(source.model)].tensors)
    ]


def _one_within_another(configs: Iterable[PretrainedConfig]) -> bool:
    """Whether one model is the language model that is a part of another one's class."""
    types = {config.model_type for config in configs}
    inner = {config.get_text_config().model_type for config in configs}
    return len(types) > 1 and len(inner) == 1


def _plan_outputs(planned: Plan, configs: Mapping[str, PretrainedConfig]) -> None:
    config = planned.config.model_copy(deep=True)
    references = referenced_models(config)
    try:
        planned.architecture = _architecture(planned, configs)
        planned.out_config = _model_out_config(
            config, planned.architecture, trust_remote_code=planned.options.trust_remote_code
        )
        planner = LayerPlanner(planned, planned.architecture, config)
        maker = OutputMaker(planned, config)
        if planner._tokenizer_task:
            try:
                planned.tokenizer = _tokenizer(planner._tokenizer_task, references)
            except Exception as error:  # transformers', which names no model
                source = config.tokenizer_source or (config.tokenizer and config.tokenizer.source)
                named = [*references, *([source] if isinstance(source, ModelReference) else [])]
                unreadable = _tokenizer_problems(named, planned.options.trust_remote_code)
                raise RequestError(unreadable or [one_line(error)]) from error
        if config.chat_template:
            holder = SimpleNamespace(chat_template=None)
            _set_chat_template(holder, config, planned.options.trust_remote_code)
            planned.chat_template = holder.chat_template
        if planned.tokenizer is not None:
            _update_config_vocab(
                planned.out_config,
                planned.architecture,
                planned.tokenizer.tokenizer,
                pad_to_multiple_of=config.tokenizer and config.tokenizer.pad_to_multiple_of,
            )
        planner.plan_all(maker.add)
    except RequestError as error:
        planned.problems += error.problems
        return
    except Exception as error:  # what mergekit refuses is refused; its errors have no common base
        planned.problems.append(_remedy(error, configs))
        return

    plan_unknown(planned, planner, maker)
    planned.problems += _condensed(planner.problems + maker.problems)
    planned.problems += idle_filters(config, list(maker.tensors))
    donor = planned.models[planned.donor].folder
    if donor is not None:
        try:
            planned.problems += links_that_escape(planned, donor)
        except (OSError, ValueError, RecursionError) as error:
            planned.problems.append(f"{donor}: side files can't be read ({one_line(error)})")
    if maker.weightless:
        planned.problems.append(weightless(maker.weightless))
    planned.outputs = _ordered(planned, maker)
    for module in ("default", "text_decoder"):
        if (sources := planner.sources.get(module)) and not planned.problems:
            follow_layers(planned, configs, sources)
    planned.tasks = maker.tasks
    _plan_units(planned, maker)
    _place(planned)
    _account(planned, maker, planner)


def _tokenizer(task: BuildTokenizer, references: Sequence[ModelReference]) -> Any:
    """mergekit's tokenizer, the same every time: it takes models and words in no fixed order."""
    unordered = PreTrainedTokenizerFast.get_vocab

    def get_vocab(self: Any) -> dict[str, int]:
        return dict(sorted(unordered(self).items(), key=lambda item: item[1]))

    PreTrainedTokenizerFast.get_vocab = get_vocab
    try:
        return task.model_copy(update={"referenced_models": tuple(references)}).execute()
    finally:
        PreTrainedTokenizerFast.get_vocab = unordered


def _tokenizer_problems(models: Sequence[ModelReference], trust_remote_code: bool) -> list[str]:
    """Which models' tokenizers can't be loaded, each by its name."""
    problems = []
    for model in dict.fromkeys(reference.model for reference in models):
        try:
            AutoTokenizer.from_pretrained(
                model.path, revision=model.revision, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            problems.append(
                f"{model}: its tokenizer can't be loaded, which merging tokenizers needs"
                f" ({one_line(error)})"
            )
    return problems


def _condensed(problems: Sequence[tuple[str, str]]) -> list[str]:
    """One problem for many tensors that have the same."""
    alike: dict[str, list[str]] = defaultdict(list)
    for tensor, problem in problems:
        alike[problem.replace(tensor, "")].append(problem)
    return [
        first + (f" (the same for {len(more)} more)" if more else "")
        for first, *more in alike.values()
    ]


def _remedy(error: Exception, configs: Mapping[str, PretrainedConfig]) -> str:
    message = one_line(error)
    if "--allow-crimes" in message:
        return _different(configs)
    if "same number of layers" in message:
        layers = {name: getattr(c, "num_hidden_layers", "?") for name, c in configs.items()}
        return f"the models have different numbers of layers ({_by_model(layers)})"
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        message = f"{type(error).__name__}: {message}"
        return f"a model's config.json or the YAML is not as mergekit needs it ({message})"
    return message


def _different(configs: Mapping[str, PretrainedConfig]) -> str:
    kinds = {name: (c.architectures or [c.model_type])[0] for name, c in configs.items()}
    return (
        "the models have different architectures; --allow-crimes tries all the same"
        f" ({_by_model(kinds)})"
    )


def _by_model(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} in {name}" for name, value in values.items())


def _ordered(planned: Plan, maker: OutputMaker) -> list[Output]:
    """In the order of the donor's files, if all of it comes from there once; else as planned."""
    outputs = list(maker.outputs.values())
    ranks = {
        (model, tensor): rank
        for model, checkpoint in planned.models.items()
        for rank, tensor in enumerate(checkpoint.tensors)
    }
    # An output's lead is the tensor whose place in the donor's files decides the output's place.
    leads = []
    for output in outputs:
        own = [s for s in output.sources if s.model == planned.donor] or list(output.sources)
        leads.append((own[0].model, own[0].tensor, own[0].first))
    if len({model for model, _, _ in leads}) == 1 and len(set(leads)) == len(leads):
        order = sorted(range(len(outputs)), key=lambda i: (ranks[leads[i][:2]], leads[i][2]))
        return [outputs[i] for i in order]
    return outputs


def _plan_units(planned: Plan, maker: OutputMaker) -> None:
    """Find the tensors of every unit.

    Where some are converted or permuted, only mergekit's tasks can read them: use those then.
    """
    in_units = {output.tensor for output in planned.outputs if output.unit}
    if not in_units:
        return
    if any(
        output.how == "task" and (name in maker.complete or name in in_units)
        for name, output in maker.tensors.items()
    ):
        try:
            united = with_units(list(maker.regular.values()))
        except RequestError as error:
            planned.problems += error.problems
            return
        for name, task in zip(maker.regular, united, strict=True):
            if name in in_units:
                maker.tasks[name] = task
        # A task gives a whole tensor: stacks of experts in one piece.
        whole = {o.tensor: maker.tensors[o.tensor] if o.unit else o for o in planned.outputs}
        planned.outputs = [
            replace(output, how="task", parameters={}, unit=None) if output.unit else output
            for output in whole.values()
        ]
        return
    # An output that a model lacks is merged by the unit's weights, but its deltas don't count.
    counted = [output.name for output in planned.outputs if output.name in maker.complete]
    members = members_of((output.unit for output in planned.outputs if output.unit), counted)
    planned.units = {
        unit: tuple(counted[i] for i in positions) for unit, positions in members.items()
    }


def _place(planned: Plan) -> None:
    """Split the outputs into shards and fix every offset."""
    groups: list[list[Output]] = []
    size = 0
    for _, tensor in groupby(planned.outputs, key=lambda output: output.tensor):
        matrices = list(tensor)  # of a stack; one otherwise
        nbytes = sum(output.nbytes for output in matrices)
        if not groups or (size and size + nbytes > planned.options.shard_size):
            groups.append([])
            size = 0
        groups[-1] += matrices
        size += nbytes
    # Every file's header is final now, and so is the offset of every tensor behind it.
    placed: dict[str, Output] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Wider items first, so that every tensor is aligned to its own item.
        group.sort(key=lambda output: -output.dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for output in group:
            begin, end = position, position + output.nbytes
            if output.tensor in header:  # the next matrix of a stack
                begin = header[output.tensor]["data_offsets"][0]
            header[output.tensor] = {
                "dtype": DTYPE_NAMES[output.dtype],
                "shape": list(output.tensor_shape),
                "data_offsets": [begin, end],
            }
            position = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-(8 + len(raw)) % _PAGE)  # most tensors begin on a page then
        first = 8 + len(raw)
        planned.shards.append(Shard(name, len(raw).to_bytes(8, "little") + raw, first + position))
        position = first
        for output in group:
            placed[output.name] = replace(output, file=name, offset=position)
            position += output.nbytes
    planned.outputs = [placed[output.name] for output in planned.outputs]


def _account(planned: Plan, maker: OutputMaker, planner: LayerPlanner) -> None:
    """List every input tensor that is not used; a matrix that fits nothing is a problem."""
    listed = {(left.model, left.tensor) for left in planned.left_out}
    for reference in referenced_models(planned.config):
        model = str(reference)
        checkpoint = planned.models[model]
        known = planner.known_names(reference)
        unfit = []
        for tensor, at in checkpoint.tensors.items():
            if tensor in maker.used[model] or (model, tensor) in listed:
                continue
            if tensor in known:
                reason = "no slice of the configuration takes it"
            elif tensor in maker.tensors:
                reason = "the base has another shape or not every model has it"
            else:
                reason = "the architecture doesn't know it and the base has no such tensor"
                if len(at.shape) > 1 and DTYPES[at.dtype].is_floating_point:
                    unfit.append(tensor)
            planned.left_out.append(LeftOut(model, tensor, reason))
        if unfit and not planned.options.allow_crimes:
            number = f"{len(unfit)} tensors, {unfit[0]} for one, fit"
            if len(unfit) == 1:
                number = f"1 tensor, {unfit[0]}, fits"
            planned.problems.append(
                f"{model}: {number} none of the base's and would be left out; if that is what you"
                " want, --allow-crimes"
            )
        for tensor, file in checkpoint.unlisted.items():
            reason = f"it lies in {file}, but the index doesn't place it there"
            planned.left_out.append(LeftOut(model, tensor, reason))
