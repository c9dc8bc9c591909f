"""Makes a tiny random model of every causal model family in transformers."""

from typing import Any

# A small value for each size in transformers' configs. Names that a config lacks are skipped.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 320),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "lru_width"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
         "dense_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
         "shared_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "global_head_dim",
         "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("mamba_d_state", "mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "ssm_state_size",
         "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "expert_ffn_hidden_size": 24,
    "zero_expert_num": 1,
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    # Shorter than the rows of the tests.
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "local_attention", "attention_chunk_size", "window_size"), 6),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
    # No dropout and no router loss: these are other reasons to leave the fast path.
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "router_aux_loss_coef"), 0.0),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # Large enough that an error shows in the loss.
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
}  # fmt: skip
# If these are unset, the feature is off.
SWITCHES = ("sliding_window", "q_lora_rank", "n_inner", "mamba_d_ssm")
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
# Other settings, so that each kind of layer of a family is present.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8},
}
LARGEST = 10_000_000


def families() -> list[str]:
    """The model types that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family: str) -> Any:
    """A random fp32 model of four layers with each kind of layer of the family, on sdpa if it supports that.

    Raises ValueError where the family's config has no sizes of these names.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_config(family: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[family], OWN.get(family, {}))


def _small(kind: Any, own: dict[str, Any]) -> Any:
    """A config of that class, and of its parts, with small sizes."""
    usual = kind().to_dict()
    sizes = {
        key: size for key, size in SIZES.items() if key in usual and (usual[key] is not None or key not in SWITCHES)
    }
    # Configs are strict about 0 and 0.0.
    sizes = {key: 0 if size == 0 and type(usual[key]) is int else size for key, size in sizes.items()}
    if "qk_rope_head_dim" in usual:
        sizes["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention has as many
    for key in LAYER_KINDS:
        if usual.get(key):
            sizes[key] = (list(dict.fromkeys(usual[key])) * 4)[:4]
    for part, part_kind in kind.sub_configs.items():
        if usual.get(part):
            sizes[part] = _small(part_kind, {})
    return kind(**sizes | own)
