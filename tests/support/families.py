"""Pico models of the families that people merge, made by transformers' own classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = TEXT | {"head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16,
}  # fmt: skip
LATENT = ROUTED | {
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
PLE = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
              "out_hidden_size": 32}  # fmt: skip
QWEN3_TOWER = QWEN_TOWER | {
    "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]
}  # fmt: skip
MROPE = HEADS | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
            "vision_end_token_id": 63}  # fmt: skip
LEFT_OUT = "leaves the experts out"


@dataclass(frozen=True)
class Family:
    """How to make a pico model of a family.

    Attributes:
        model, config: transformers' classes, by name.
        settings: of the configuration.
        mergekit: what `mergekit-yaml` 0.1.5 does: `same`, or why it is not.
        differs: part of the name of every tensor that it gives other numbers, or none.
    """

    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    mergekit: str = "same"
    differs: str = ""

    def row(self, name: str) -> str:
        """The family's line of the table in docs/merging.md."""
        return (
            f"| {name} | `{self.model}` | {'yes' if self.mergekit == 'same' else self.mergekit} |"
        )

    def build(self) -> Any:
        config = getattr(transformers, self.config)(**self.settings)
        return getattr(transformers, self.model)(config)


def _causal(
    name: str, settings: dict[str, Any], mergekit: str = "same", differs: str = ""
) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", settings, mergekit, differs)


def _vision(
    name: str, text: dict[str, Any], vision: dict[str, Any], mergekit: str = "same",
    differs: str = "", **settings: Any,
) -> Family:  # fmt: skip
    settings |= {"text_config": text, "vision_config": vision}
    kind = f"{name}ForConditionalGeneration"
    return Family(kind, f"{name}Config", settings, mergekit, differs)


FAMILIES: dict[str, Family] = {
    "Llama": _causal("Llama", HEADS),
    "Qwen3 (tied head)": _causal("Qwen3", HEADS | {"tie_word_embeddings": True}),
    "Gemma 2": _causal("Gemma2", HEADS),
    "Gemma 3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "Gemma 3n": Family("Gemma3nForCausalLM", "Gemma3nTextConfig", HEADS | PLE | {
        "intermediate_size": [48, 48], "laurel_rank": 4, "num_kv_shared_layers": 0,
        "altup_num_inputs": 2, "activation_sparsity_pattern": None,
        "layer_types": ["full_attention"] * 2}),
    "Gemma 4": Family("Gemma4ForCausalLM", "Gemma4TextConfig", HEADS | PLE | {"global_head_dim": 16}),
    "Gemma 4 MoE": Family("Gemma4ForCausalLM", "Gemma4TextConfig", HEADS | PLE | {
        "global_head_dim": 16, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16}),
    "Phi-3": _causal("Phi3", TEXT),
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": _causal("GPTNeoX", {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4}, "wants buffers that are no longer saved"),
    "Command-R": _causal("Cohere", HEADS, "wants norms of queries and keys"),
    "OLMo 2": _causal("Olmo2", HEADS),
    "OLMo hybrid": _causal("OlmoHybrid", HEADS | LINEAR,
                           "leaves out what layer 1 doesn't have", "layers.0."),
    "Falcon-H1": _causal("FalconH1", HEADS | {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1}),
    "Mamba 2": _causal("Mamba2", {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
        "state_size": 8, "n_groups": 1, "expand": 2}),
    "Jamba": _causal("Jamba", TEXT | {
        "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_d_conv": 2,
        "mamba_expand": 2, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
        LEFT_OUT, ".experts."),
    "Nemotron-H": _causal("NemotronH", HEADS | ROUTED | {
        "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1}, "leaves out what not every layer has", ".layers."),
    "Mixtral": _causal("Mixtral", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2-MoE": _causal("Qwen2Moe", HEADS | MOE | {"shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": _causal("Qwen3Moe", HEADS | MOE),
    "Qwen3-Next": _causal("Qwen3Next", HEADS | MOE | LINEAR | {"shared_expert_intermediate_size": 16}),
    "DeepSeek-V3": _causal("DeepseekV3", TEXT | LATENT, LEFT_OUT, ".experts."),
    "GLM-4-MoE": _causal("Glm4Moe", HEADS | ROUTED | {"first_k_dense_replace": 1}),
    "gpt-oss": _causal("GptOss", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "LFM2-MoE": _causal("Lfm2Moe", TEXT | MOE | {
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}, LEFT_OUT, ".experts."),
    "OLMoE": _causal("Olmoe", TEXT | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite MoE": _causal("GraniteMoe", TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ERNIE 4.5 MoE": _causal("Ernie4_5_Moe", HEADS | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1}, "leaves the experts and their bias out", ".mlp."),
    "Qwen3.5": _vision("Qwen3_5", HEADS | LINEAR, QWEN_TOWER | {"num_position_embeddings": 16},
                       **QWEN_IDS),
    "Qwen3.5-MoE": _vision(
        "Qwen3_5Moe", HEADS | LINEAR | MOE | {"shared_expert_intermediate_size": 16},
        QWEN_TOWER | {"num_position_embeddings": 16}, LEFT_OUT, ".experts.", **QWEN_IDS),
    "Llama 4": _vision("Llama4", HEADS | {
        "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        TOWER | {"intermediate_size": 64, "vision_output_dim": 32, "projector_input_dim": 32,
                 "projector_output_dim": 32}),
    "Mistral 3": _vision("Mistral3", HEADS | {"model_type": "mistral"},
                         TOWER | {"head_dim": 8, "model_type": "pixtral"}, image_token_id=60),
    "Qwen2-VL": _vision("Qwen2VL", MROPE, {"depth": 1, "embed_dim": 16, "hidden_size": 32,
                        "num_heads": 2, "mlp_ratio": 2},
                        "wants config.json as it was before transformers 5", **QWEN_IDS),
    "Qwen2.5-VL": _vision("Qwen2_5_VL", MROPE, QWEN_TOWER, **QWEN_IDS),
    "Qwen3-VL": _vision("Qwen3VL", HEADS, QWEN3_TOWER, **QWEN_IDS),
    "Qwen3-VL-MoE": _vision("Qwen3VLMoe", HEADS | MOE | {"moe_intermediate_size": 12}, QWEN3_TOWER, **QWEN_IDS),
    "GLM-4.5V": _vision("Glm4vMoe", HEADS | ROUTED | {
        "first_k_dense_replace": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}, TOWER | {
        "depth": 1, "num_heads": 2, "out_hidden_size": 32, "spatial_merge_size": 2},
        LEFT_OUT, ".experts.", **QWEN_IDS),
    "Gemma 3 with vision": _vision("Gemma3", HEADS, TOWER, "wants the vision tower's older names",
                                   mm_tokens_per_image=4, image_token_index=60),
    "LLaVA": _vision("Llava", HEADS | {"model_type": "llama"}, TOWER | {"model_type": "clip_vision_model"},
                     "leaves the language model out", "", image_token_index=60),
    "Kimi K2.5": _vision("Kimi_K25", TEXT | LATENT | {"model_type": "deepseek_v3"}, TOWER | {
        "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2},
        "leaves the experts out; other order of the vision tower's rows", "", image_token_id=60,
        projection_hidden_size=16),
}  # fmt: skip


def family(name: str, folder: Path, targets: int = 2, scale: float = 1e-2) -> list[Path]:
    """Checkpoints `m0` (the base), `m1`, … of a family, saved by its class.

    Every tensor of every target moved by another amount.
    """
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    paths = []
    for number in range(targets + 1):
        if number:
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor += scale * number * torch.rand(()) * torch.randn_like(tensor)
        paths.append(folder / f"m{number}")
        model.save_pretrained(paths[-1])
    return paths
