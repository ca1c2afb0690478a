"""A tiny random checkpoint of every model family, as it is published.

    FAMILIES[family] -> what its configuration needs besides SMALL, by section     make(folder, family) -> the folder

The class that is saved is the published one: ``ForConditionalGeneration`` with all its towers for a multimodal family.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = 101

#: Every configuration takes the entries of these that it knows, under the names of its attribute map, too.
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=45,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    image_token_id=97,
    image_token_index=97,
    video_token_id=98,
    vision_start_token_id=95,
    vision_end_token_id=96,
    image_size=28,
    patch_size=14,
    depth=2,
    num_heads=4,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=4,
    num_kv_shared_layers=0,
    out_hidden_size=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    moe_intermediate_size=24,
    num_experts=4,
    num_experts_per_tok=2,
    mamba_n_heads=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_dt_rank=4,
    state_size=8,
    ssm_state_size=8,
    mamba_chunk_size=4,
    chunk_size=4,
    **dict.fromkeys(
        (
            "attention_dropout",
            "hidden_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "dropout",
            "activation_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "residual_dropout",
        ),
        0.0,
    ),
)

MROPE = dict(text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])))

MLA = dict(
    num_key_value_heads=4,
    kv_lora_rank=8,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    head_dim=None,
)

#: Overrides of the configuration, those of a sub-configuration under its name.
FAMILIES: dict[str, dict[str, Any]] = {
    # dense decoders
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=4),
    "gemma2": dict(sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": dict(sliding_window=4),
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=4),
    "cohere": {},
    "cohere2": dict(sliding_window=4),
    "granite": {},
    "glm4": {},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "exaone4": dict(sliding_window=4),
    "nemotron": {},
    "minicpm3": dict(
        num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, head_dim=None
    ),
    "hunyuan_v1_dense": {},
    "ernie4_5": {},
    "seed_oss": {},
    "apertus": {},
    "helium": {},
    "persimmon": {},
    "vaultgemma": {},
    "gemma3n_text": dict(laurel_rank=4, sliding_window=4),
    "gemma4_text": {},
    # older decoders
    "gpt2": {},
    "gptj": dict(rotary_dim=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], window_size=4),
    "gpt_neox": {},
    "gpt_bigcode": {},
    "codegen": dict(rotary_dim=4),
    "falcon": {},
    "bloom": {},
    "mpt": dict(n_heads=4, attn_config=dict(attn_pdrop=0)),
    "opt": dict(ffn_dim=45, word_embed_proj_dim=20),
    "xglm": dict(ffn_dim=45),
    "biogpt": {},
    "openai-gpt": {},
    "ctrl": dict(dff=45),
    # experts, of which each has its matrices in the checkpoint
    "qwen2_moe": dict(shared_expert_intermediate_size=24),
    "qwen3_moe": {},
    "mixtral": dict(intermediate_size=24, num_local_experts=4),
    "mixtral_of_five": dict(model_type="mixtral", intermediate_size=24, num_local_experts=5),
    "deepseek_v2": dict(MLA, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, topk_method="greedy"),
    "deepseek_v3": dict(
        MLA, head_dim=4, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=2, topk_group=1
    ),
    "glm4_moe": dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "olmoe": dict(intermediate_size=24),
    "hunyuan_v1_moe": dict(intermediate_size=24, moe_topk=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "minimax_m2": dict(intermediate_size=24, num_local_experts=4),
    "phimoe": dict(intermediate_size=24, num_local_experts=4),
    "flex_olmo": dict(intermediate_size=24),
    "afmoe": dict(sliding_window=4, num_dense_layers=1),
    "lfm2_moe": dict(num_dense_layers=1, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "qwen3_5_moe_text": dict(shared_expert_intermediate_size=24),
    "solar_open": dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1),
    "minimax": dict(
        intermediate_size=24, num_local_experts=4, layer_types=["full_attention", "linear_attention"] * 2, block_size=4
    ),
    "qwen3_next_moe": dict(model_type="qwen3_next", shared_expert_intermediate_size=24),
    "jamba_moe": dict(model_type="jamba", intermediate_size=24, attn_layer_period=2, attn_layer_offset=1),
    "nemotron_h_moe": dict(
        model_type="nemotron_h",
        layers_block_type=["mamba", "moe", "attention", "moe"],
        n_groups=2,
        n_routed_experts=4,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=None,
        n_group=1,
        topk_group=1,
    ),
    "deepseek_v32": dict(
        MLA,
        head_dim=4,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=64,
    ),
    "glm_moe_dsa": dict(
        MLA,
        head_dim=4,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=64,
    ),
    # experts that the checkpoint holds together
    "granitemoehybrid_moe": dict(
        model_type="granitemoehybrid",
        intermediate_size=24,
        num_local_experts=4,
        shared_intermediate_size=45,
        layer_types=["mamba", "mamba", "attention", "mamba"],
    ),
    "granitemoe": dict(intermediate_size=24, num_local_experts=4),
    "gpt_oss": dict(intermediate_size=24, num_local_experts=4, sliding_window=4),
    "gemma4_moe": dict(model_type="gemma4_text", enable_moe_block=True, top_k_experts=2),
    "llama4_moe": dict(model_type="llama4", text_config=dict(num_local_experts=4, intermediate_size=24)),
    # hybrids of attention with convolutions or recurrences
    "qwen3_next": dict(mlp_only_layers=[0, 1, 2, 3]),
    "qwen3_5_text": {},
    "lfm2": {},
    "granitemoehybrid": dict(
        num_local_experts=0, shared_intermediate_size=45, layer_types=["mamba", "mamba", "attention", "mamba"]
    ),
    "bamba": dict(attn_layer_indices=[1]),
    "falcon_h1": dict(mamba_d_ssm=64),
    "jamba": dict(num_experts=1, attn_layer_period=2, attn_layer_offset=1),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp", "mamba"], n_groups=2),
    "mamba": {},
    "mamba2": dict(num_heads=8, n_groups=2),
    "falcon_mamba": {},
    "zamba": dict(
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        attention_head_dim=16,
        num_key_value_heads=4,
        intermediate_size=46,
    ),
    "zamba2": dict(
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        adapter_rank=4,
        num_key_value_heads=4,
    ),
    "recurrent_gemma": {},
    "olmo_hybrid": {},
    "rwkv": {},
    "xlstm": dict(
        chunk_size=1, mode="train", ffn_round_up_to_multiple_of=8, num_heads=4, autocast_kernel_dtype="float32"
    ),
    # language models of multimodal checkpoints
    "gemma3": {},
    "gemma3n": dict(vision_config=dict(architecture="test_efficientnet")),
    "gemma4": {},
    "mistral3": {},
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen3_vl": MROPE,
    "qwen3_vl_moe": MROPE,
    "qwen3_vl_moe_resaved": dict(MROPE, model_type="qwen3_vl_moe"),
    "ernie4_5_vl_moe": dict(text_config=dict(MROPE["text_config"], moe_intermediate_size=[24, 24])),
    "qwen3_5": {},
    "llama4": dict(text_config=dict(moe_layers=[], intermediate_size_mlp=45, attention_chunk_size=8)),
    "internvl": {},
    "llava": {},
    "llava_next": {},
    "llava_onevision": {},
    "smolvlm": {},
    "idefics2": {},
    "idefics3": {},
    "paligemma": {},
    "aya_vision": {},
    "cohere2_vision": {},
    "got_ocr2": {},
    "glm4v": MROPE,
    "mllama": {},
    "lfm2_vl": {},
    "ovis2": {},
    "perception_lm": dict(
        vision_config=dict(
            architecture="vit_pe_core_tiny_patch16_384", model_args=dict(embed_dim=32, depth=2, num_heads=4)
        )
    ),
    "qwen2_audio": {},
    "voxtral": {},
    "phi4_multimodal": {},
    "qwen2_5_omni_thinker": MROPE,
    "fuyu": {},
    "aria": dict(text_config=dict(intermediate_size=24)),
    "minicpmv4_6": {},
}

#: Tensors whose last two dimensions the publisher has the other way round than transformers, which saves its own.
TRANSPOSED = {"qwen3_vl_moe": ("experts.gate_up_proj", "experts.down_proj")}

#: Families that are compared only where timm is installed.
OF_TIMM = ("gemma3n", "perception_lm")

#: Families that transformers itself cannot build or run here, or that are refused, and why.
NOT_HERE = {
    **dict.fromkeys(OF_TIMM, "needs timm; compared where that is installed"),
    "paligemma": "reads text in both directions",
    "phimoe": "draws experts at random in training",
}


def config(family: str) -> PreTrainedConfig:
    """The small configuration of a family."""
    overrides = {"model_type": family} | FAMILIES[family]
    return _small(type(AutoConfig.for_model(overrides.pop("model_type"))), overrides)


def _small(kind: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of class ``kind`` with the entries of ``SMALL`` that it knows, and ``overrides``, in all its sections."""
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    settings = {key: value for key, value in SMALL.items() if key in known}
    default = kind()
    for section in kind.sub_configs:
        own = overrides.get(section, {})
        if (part := getattr(default, section)) is not None:
            kind_of_part = type(AutoConfig.for_model(own["model_type"])) if "model_type" in own else type(part)
            settings[section] = _small(kind_of_part, own)
    return kind(**(settings | {key: value for key, value in overrides.items() if key not in kind.sub_configs}))


def published_class(settings: PreTrainedConfig) -> Any:
    """The auto class that loads a checkpoint with everything that it holds."""
    multimodal = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return modeling_auto.AutoModelForMultimodalLM if settings.model_type in multimodal else AutoModelForCausalLM


def make(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model; no tensor is zero or one throughout, as a bias or a norm would be."""
    torch.manual_seed(0)
    settings = config(family)
    model = published_class(settings).from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param += 0.05 * torch.randn_like(param)
    model.to(dtype).save_pretrained(folder)
    if endings := TRANSPOSED.get(family):
        file = folder / "model.safetensors"
        stored = load_file(file)
        turned = {name: tensor.mT.contiguous() for name, tensor in stored.items() if name.endswith(endings)}
        assert turned
        save_file(stored | turned, file, {"format": "pt"})
    return folder


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The published class of a folder, loaded as transformers does."""
    settings = AutoConfig.from_pretrained(folder)
    model: PreTrainedModel = published_class(settings).from_pretrained(folder, dtype=dtype)
    return model
