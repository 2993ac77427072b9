"""A tiny random config of any architecture that transformers registers, its length thresholds below the lengths used.

Windows, chunks, top-k of indexers, original context lengths and temperature floors are set to a few tokens, so that a
row of some tens of tokens crosses all of them.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = {
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token": ("AutoModelForTokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "encoder": ("AutoModelForTextEncoding", modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES),
    "vision-language": ("AutoModelForImageTextToText", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
}


_SIZES = {
    64: "hidden_size n_embd d_model dim embed_dim embedding_size word_embed_proj_dim decoder_hidden_size emb_dim "
    "lru_width attention_hidden_size projection_dim output_dim rescale_dim residual_dim",
    96: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size intermediate_size_mlp moe_intermediate_size "
    "shared_expert_intermediate_size dense_intermediate_size encoder_ffn_dim decoder_ffn_dim mlp_dim dim_feedforward "
    "shared_intermediate_size expert_ffn_hidden_size hidden_dim inner_dim block_ff_dim",
    4: "num_attention_heads n_head n_heads attention_heads encoder_attention_heads decoder_attention_heads num_heads "
    "num_attn_heads num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts "
    "linear_num_value_heads index_n_heads num_linear_attention_heads mla_num_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads "
    "linear_num_key_heads num_experts_per_tok num_experts_per_token moe_k top_k moe_topk experts_per_token moe_top_k "
    "num_hidden_groups",
    99: "vocab_size embedding_vocab_size text_vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len seq_length",
    16: "head_dim d_kv kv_channels attention_head_size linear_key_head_dim linear_value_head_dim v_head_dim "
    "qk_nope_head_dim index_head_dim swa_head_dim hidden_size_per_head",
    8: "qk_rope_head_dim rotary_dim original_max_position_embeddings",
    32: "kv_lora_rank q_lora_rank",
    5: "sliding_window attention_window_size window_size sliding_window_size local_window_size",
    6: "attention_chunk_size chunk_length",
    1: "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace",
}
_VALUES: dict[str, Any] = {name: value for value, names in _SIZES.items() for name in names.split()} | {
    "index_topk": 4,
    "floor_scale": 4,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_mamba_kernels": False,
    "use_mambapy": False,
    "use_sliding_window": True,
}
# What single architectures need beside, by the model_type of the config or sub-config.
_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 32}},
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
}
_PLANES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# In the place of a vision tower that another library holds.
_CLIP: dict[str, Any] = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
        "model_args": {"embed_dim": 64},
    }
}
_OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 83, "audio_token_offset": 91},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8},
    "canine": {"downsampling_rate": 1},
    "chameleon": {"vocabulary_map": {"<image>": 97, "IMGIMGA": 98}},
    "cosmos3_edge_text": _PLANES,
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_output_size": 64},
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "mlp_layer_types": ["dense", "dense"],
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "emu3": {"vocabulary_map": {"<image>": 96, "<|extra_200|>": 97, "<|visual token 000000|>": 98}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "qk_head_dim": 16},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "4/8"},
    "granite_docling_vision": {"out_hidden_size": 64},
    "hunyuan_vl_text": {"head_dim": 16},
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "inkling2_vision": {"text_hidden_size": 64},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lilt": {"hidden_size": 48},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {"num_hidden_layers": 4, "out_hidden_size": 64},
    "paddleocr_vl_text": _PLANES,
    "radio": {"video_temporal_patch_size": 2},
    "step3p5": {"sliding_window": 5},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 8},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "bailing_hybrid": {"num_expert_group": 1, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "granitemoehybrid": _HYBRID | {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {
        "hidden_size": 128,
        "embedding_dim": 128,
        "num_blocks": 2,
        "chunk_size": 8,
        "head_dim": 32,
        "num_heads": 2,
    },
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cpmant": {"prompt_length": 8, "position_bias_num_buckets": 32, "position_bias_max_distance": 32},
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 99, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "fast_vlm": _CLIP,
    "funnel": {"block_sizes": [2]},  # it cannot pool a sequence of one token
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 99,
        "laurel_rank": 8,
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm5_next": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_loop_text": {"rel_extent": 16, "log_scaling_n_floor": 4},
    "inkling2_text": {"rel_extent": 16, "log_scaling_n_floor": 4},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 96,
    },
    "perception_lm": _CLIP,
    "perceiver": {
        "num_latents": 8,
        "d_latents": 64,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "ple_embed_dim": 16,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 48),
        "axial_pos_shape": (8, 16),
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {"pronunciation_vocab_size": 99, "shape_vocab_size": 99},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


def shrink(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A tiny config of this class, sub-configs included."""
    default = config_class()
    given = default.to_dict()
    changes = {name: value for name, value in _VALUES.items() if type(given.get(name)) in (int, float, bool)}
    if "pad_token_id" in given:
        changes["pad_token_id"] = 0 if given["pad_token_id"] is None else min(given["pad_token_id"], 3)
    changes |= {name: 0.0 for name, value in given.items() if "drop" in name and type(value) is float}
    if "qk_rope_head_dim" in given:  # latent attention: its rotary part has a head dim of its own, and no groups
        changes |= {"head_dim": 8, "qk_head_dim": 24, "num_key_value_heads": 4}
        changes = {name: value for name, value in changes.items() if name in given}
    if given.get("layer_types"):
        kinds = list(dict.fromkeys(given["layer_types"]))
        kinds = kinds if len(kinds) > 1 else kinds * 2
        changes["layer_types"] = kinds
        changes["num_hidden_layers"] = len(kinds)
    for name in getattr(config_class, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig):
            changes[name] = shrink(type(inner)).to_dict()
    own = _OWN.get(default.model_type, {})
    changes |= own
    config = config_class(**changes)
    for parameters in _rope_dicts(getattr(config, "rope_parameters", None)):
        if "original_max_position_embeddings" in parameters:
            parameters["original_max_position_embeddings"] = 8
        planes = "mrope_section" in (getattr(config_class, "ignore_keys_at_rope_validation", None) or ())
        if "rope_parameters" not in own and ("mrope_section" in parameters or (planes and "rope_type" in parameters)):
            half = int(8 * parameters.get("partial_rotary_factor", 1.0))
            parameters["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return config


def _rope_dicts(parameters: object) -> list[dict[str, Any]]:
    if not isinstance(parameters, dict):
        return []
    return [parameters, *(inner for value in parameters.values() for inner in _rope_dicts(value))]


def load(what: Path | str) -> PreTrainedModel:
    """A saved model by its folder or its name on the Hub, or a tiny random one by its model type, in eval mode.

    Raises:
        ValueError: none of the three.
    """
    transformers.logging.set_verbosity_error()
    if isinstance(what, Path):
        if not (what / "config.json").is_file():
            found = "is a file" if what.is_file() else "holds no config.json"
            raise ValueError(
                f"{what} {found}. Give the folder that model.save_pretrained wrote, unpacked, the name of a model on "
                "the Hub (owner/name), or a model type."
            )
        return _saved(what)
    for auto, names in FAMILIES.values():
        if what in names:
            torch.manual_seed(0)
            return getattr(transformers, auto).from_config(shrink(CONFIG_MAPPING[what])).eval()  # type: ignore[no-any-return]
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", what) is None:
        raise ValueError(f"there is no folder {what!r}.")
    try:
        return _saved(what)
    except OSError as error:
        raise ValueError(
            f"{what!r} is neither a folder, nor a model type that transformers registers, nor a model on the Hub that "
            f"can be read from here: {error}"
        ) from error


def _saved(what: Path | str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(what)
    made = getattr(transformers, (config.architectures or [""])[0], AutoModel)
    return made.from_pretrained(what).eval()  # type: ignore[no-any-return]
