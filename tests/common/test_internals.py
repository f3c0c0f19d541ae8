"""What is used of other packages beyond what they document: a new release fails here, not a user.

docs/design.md has a table of them. Where a name is a function, its parameters are what a call or an
override of ours counts on.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from fusechat_common import versions
from fusechat_common.errors import RequestError
from fusechat_common.versions import SUPPORTED, require_supported
from fusechat_distill.cli import commands
from fusechat_distill.trainer.trainer import FusionTrainer
from fusechat_merge.cli import main

ROOT = Path(__file__).parents[2]
PARAMETERS: dict[str, str | None] = {
    "accelerate.utils.align_module_device": "module",
    "accelerate.utils.memory.should_reduce_batch_size": "exception",
    "huggingface_hub.utils.build_hf_headers": "",
    "huggingface_hub.utils.get_session": "",
    "mergekit.architecture.arch_info_for_config": "config",
    "mergekit.architecture.get_architecture_info": "config options",
    "mergekit.evo.genome.METHOD_PARAM_MAPS": None,
    "mergekit.evo.genome.ModelGenome.genotype_merge_config": "self genotype",
    "mergekit.io.lazy_tensor_loader.ShardInfo": "filename contained_keys",
    "mergekit.io.lazy_tensor_loader.ShardedTensorIndex": "base_path is_safetensors tensor_paths shards",
    "mergekit.io.tasks.LoaderCache": None,
    "mergekit.merge._model_out_config": "config arch_info trust_remote_code",
    "mergekit.merge._set_chat_template": "tokenizer merge_config trust_remote_code",
    "mergekit.merge._update_config_vocab": "config arch_info tokenizer pad_to_multiple_of",
    "mergekit.merge_methods.base.MergeMethod._execute": "self groups parameters options input_dtypes out_dtype",
    "mergekit.merge_methods.registry.register": "method",
    "mergekit.merge_methods.registry.registered_methods": "",
    "mergekit.merge_methods.task_adapter.ExecuteMergeMethodTask": None,
    "mergekit.plan.MergePlanner": "config arch_info options out_model_config",
    "mergekit.plan.MergePlanner._plan": "self",
    "mergekit.scripts.merge_raw_pytorch.plan_flat_merge": "config",
    "numba.extending.intrinsic": "",
    "peft.tuners.tuners_utils.BaseTunerLayer": None,
    "peft.tuners.tuners_utils.check_target_module_exists": "config key",
    "torch.backends": None,
    "transformers.AutoModelForCausalLM._model_mapping": None,
    "transformers.PreTrainedModel.get_expanded_tied_weights_keys": "self all_submodels",
    "transformers.Trainer._prepare_inputs": "self inputs",
    "transformers.Trainer._set_signature_columns_if_needed": "self",
    "transformers.Trainer.get_optimizer_cls_and_kwargs": "args model",
    "transformers.conversion_mapping.get_model_conversion_mapping": "model",
    "transformers.core_model_loading.dot_natural_key": "s",
    "transformers.core_model_loading.rename_source_key": "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
    "transformers.core_model_loading.WeightConverter.convert": "self layer_name model config",
    "transformers.core_model_loading.WeightRenaming": "source_patterns target_patterns",
    "transformers.initialization.no_init_weights": "",
    "transformers.LlamaForCausalLM._tied_weights_keys": None,
    "transformers.utils.chat_template_utils._compile_jinja_template": "chat_template",
    "transformers.utils.hub.extract_commit_hash": "resolved_file commit_hash",
    "trl.data_utils.pack_dataset": "dataset seq_length strategy map_kwargs",
    "trl.kernels.ChunkedLogProbFunction.backward": "ctx",
    "trl.kernels.ChunkedLogProbFunction.forward": "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    "trl.SFTTrainer._prepare_dataset": "self dataset processing_class args packing formatting_func dataset_name",
    "trl.SFTTrainer._tag_names": None,
    "trl.SFTTrainer.compute_loss": "self model inputs return_outputs num_items_in_batch",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call": "self examples",
    "trl.trainer.utils._ChunkedLogProbFunction": None,
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "params",
}


def named(name: str) -> Any:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_internal_is_there_and_takes_what_we_pass(name: str) -> None:
    found, expected = named(name), PARAMETERS[name]
    if expected is not None:
        parameters = list(inspect.signature(found).parameters)
        assert parameters[: len(expected.split())] == expected.split()


def test_what_they_do() -> None:
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction  # which the fused head looks up
    outputs = ChunkedLogProbFunction.apply(
        torch.zeros(2, 4), torch.zeros(8, 4), None, torch.tensor([1, 2]), 1.0, 8, None, 1.0, ()
    )
    assert len(outputs) == 5
    torch.testing.assert_close(outputs[0], torch.full((2,), 1 / 8).log())
    assert LoaderCache.loaders is LoaderCache().loaders  # one for all, replaced while we plan
    fields = {"gather_tensors", "base_model", "output_weight", "parameters", "dtype", "out_dtype"}
    assert fields <= set(ExecuteMergeMethodTask.model_fields)
    assert "fusechat_merge" in entry_points(group="torch.backends").names


def test_the_table_of_the_design_lists_them() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = design.partition("### What is used of other packages")[2].partition("\n#")[0]
    listed = [
        f"{row[0]}.{name}"
        for row in re.findall(r"^\| (\w+) \| (.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", row[1])
    ]
    assert sorted(listed) == sorted(PARAMETERS)
    assert {name.partition(".")[0] for name in PARAMETERS} <= SUPPORTED.keys()


def test_the_supported_releases_are_those_of_the_installation() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, wanted in SUPPORTED.items():
        assert required[name] == Requirement(name + wanted).specifier, name
    require_supported(*SUPPORTED)


def test_other_releases_are_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = versions.version
    others = {"trl": "1.17.0", "mergekit": "0.2.0.dev1"}
    monkeypatch.setattr(versions, "version", lambda name: others.get(name) or installed(name))
    mergekit = "mergekit 0.2.0.dev1 is installed, supported is >=0.1.5,<0.2; run pip install 'mergekit>=0.1.5,<0.2'"
    trl = "trl 1.17.0 is installed, supported is >=1.16,<1.17; run pip install 'trl>=1.16,<1.17'"
    told = CliRunner().invoke(commands, ["validate", str(tmp_path / "recipe.yaml")])
    assert (told.exit_code, told.stderr) == (2, f"Error: 2 problems:\n  {mergekit}\n  {trl}\n")
    config, out = str(tmp_path / "merge.yml"), str(tmp_path)
    for line in (
        ["run", config, out],
        ["plan", config],
        ["verify", config, out],
        ["analyze", config],
    ):
        told = CliRunner().invoke(main, line)
        assert (told.exit_code, told.stderr) == (2, f"Error: {mergekit}\n")
    with pytest.raises(RequestError, match=re.escape(trl)):
        FusionTrainer(torch.nn.Linear(1, 1))
