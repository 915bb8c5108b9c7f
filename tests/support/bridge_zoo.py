"""Tiny checkpoints of every architecture that stock's TransformerBridge boots and runs.

The zoo's own cases are here under their names; the others are made in the same way, mostly from
the small sizes of `_SMALL`. `NOT_BOOTED` says of every other architecture why stock cannot run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version

from tests.support import zoo
from tests.support.zoo import Case

_SMALL: dict[str, Any] = {
    **{"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    # Six heads of eight; two for keys and values.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 6),
    **{"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40},
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 29),
    "sliding_window": 4,
    # Experts
    **{"num_local_experts": 3, "num_experts": 3, "moe_num_experts": 3, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    "first_k_dense_replace": 1,
    # Latent attention
    **{"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4},
    "v_head_dim": 8,
    # State spaces
    "state_size": 4,
}
"""Sizes under all the names that they go by: a configuration gets those that it has. Rows of
experts are whole 16 bytes in bfloat16, which their grouped product wants."""

_AS_IT_IS = object()
"""The configuration's own default."""

_TEXT = {
    **{"vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
    **{"max_position_embeddings": 29, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_VISION = {
    **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
}
_HEARING = {
    **{"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 16},
}
_BOTH_SIDES = {
    **{"encoder_layers": 2, "encoder_attention_heads": 6, "encoder_ffn_dim": 44},
    **{"decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 44},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": 2, "pad_token_id": 0},
}
_T5 = {"d_ff": 44, "d_kv": 8, "num_decoder_layers": 2, "decoder_start_token_id": 0}
_LATENT = {"num_key_value_heads": 6, "head_dim": _AS_IT_IS}
_MAMBA = {
    **{"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1},
    **{"mamba_expand": 2, "mamba_chunk_size": 8},
}
_DELTA = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 3},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
_GEMMA_4 = {
    **{"vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 6, "global_head_dim": 8},
    **{"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
}
_WAVES = {
    **{"conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3]},
    **{"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "num_key_value_heads": _AS_IT_IS},
}


def _with(model_type: str, **part: Any) -> dict[str, Any]:
    return {"text_config": {**_TEXT, "model_type": model_type}, **part}


# case -> architecture, what `_SMALL` does not say
_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    # Decoders
    "afmoe": ("AfmoeForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
    "bamba": ("BambaForCausalLM", {**_MAMBA, "attn_layer_indices": [1]}),
    "bitnet": ("BitNetForCausalLM", {}),
    "bloom-bare": ("BloomModel", {}),
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "deepseek2": ("DeepseekV2ForCausalLM", _LATENT),
    "deepseek3": ("DeepseekV3ForCausalLM", _LATENT),
    "deepseek4": ("DeepseekV4ForCausalLM", {}),
    "ernie": ("Ernie4_5ForCausalLM", {}),
    "ernie-moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie-moe-square": ("Ernie4_5_MoeForCausalLM", {"moe_intermediate_size": 24}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "falcon-alibi": (
        "FalconForCausalLM",
        {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False},
    ),
    "falcon-h1": (
        "FalconH1ForCausalLM",
        {**_MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8}
        | {"num_key_value_heads": 6},
    ),
    "falcon-h1-gqa": (
        "FalconH1ForCausalLM",
        {**_MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8},
    ),
    "falcon-mamba": ("FalconMambaForCausalLM", {}),
    "flex-olmo": ("FlexOlmoForCausalLM", {}),
    "gemma4": ("Gemma4ForCausalLM", _GEMMA_4),
    "glm": ("GlmForCausalLM", {}),
    "glm4": ("Glm4ForCausalLM", {}),
    "glm4-moe": ("Glm4MoeForCausalLM", {}),
    "glm4-moe-lite": (
        "Glm4MoeLiteForCausalLM",
        {**_LATENT, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "glm-dsa": (
        "GlmMoeDsaForCausalLM",
        {**_LATENT, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 5},
    ),
    "gpt-oss": ("GptOssForCausalLM", {}),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "granite-moe": ("GraniteMoeForCausalLM", {}),
    "granite-hybrid": (
        "GraniteMoeHybridForCausalLM",
        {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
        | {"position_embedding_type": "rope"},
    ),
    "hrm": ("HrmTextForCausalLM", {}),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "jais2": ("Jais2ForCausalLM", {}),
    "jamba": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 44}),
    "lfm2-moe": (
        "Lfm2MoeForCausalLM",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "llama4": ("Llama4ForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {}),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"expand": 2, "num_heads": 12, "n_groups": 1, "chunk_size": 8, "state_size": 8},
    ),
    "minimax-m2": ("MiniMaxM2ForCausalLM", {}),
    "ministral3": ("Ministral3ForCausalLM", {}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "nanochat": ("NanoChatForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "nemotron-h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
        | {"chunk_size": 8, "moe_shared_expert_intermediate_size": 32},
    ),
    "olmoe": ("OlmoeForCausalLM", {}),
    "olmo-hybrid": ("OlmoHybridForCausalLM", {}),
    "gpt1": ("OpenAIGPTLMHeadModel", {}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3-next": ("Qwen3NextForCausalLM", _DELTA),
    "qwen3.5": ("Qwen3_5ForCausalLM", _DELTA),
    "qwen3.5-moe": ("Qwen3_5MoeForCausalLM", _DELTA),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        {"lru_width": 48, "attention_window_size": 4, "num_hidden_layers": 3}
        | {"block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "rwkv": ("RwkvForCausalLM", {}),
    "seed-oss": ("SeedOssForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "vaultgemma": ("VaultGemmaForCausalLM", {}),
    "xglm": ("XGLMForCausalLM", {"ffn_dim": 44, "attention_heads": 6}),
    "youtu": ("YoutuForCausalLM", _LATENT),
    "zamba2": (
        "Zamba2ForCausalLM",
        {"layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"]}
        | {"mamba_d_state": 8, "mamba_expand": 2, "n_mamba_heads": 12, "mamba_headdim": 8}
        | {"mamba_ngroups": 1, "num_mem_blocks": 1, "adapter_rank": 4, "chunk_size": 8}
        | {"num_key_value_heads": 6, "attention_head_dim": 16, "attention_hidden_size": 96}
        | {"hybrid_layer_ids": [1], "use_mem_eff_path": False},
    ),
    # Encoders
    "bert": ("BertForMaskedLM", {}),
    "bert-decoder": ("BertLMHeadModel", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "vit": ("ViTModel", _VISION),
    "vit-classes": ("ViTForImageClassification", _VISION),
    "deit": ("DeiTModel", _VISION),
    "deit-classes": ("DeiTForImageClassification", _VISION),
    "ast": (
        "ASTForAudioClassification",
        {"max_length": 16, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8}
        | {"time_stride": 8, "num_key_value_heads": _AS_IT_IS},
    ),
    "hubert": ("HubertModel", _WAVES),
    "hubert-ctc": ("HubertForCTC", _WAVES),
    "wav2vec2": ("Wav2Vec2Model", _WAVES),
    "wav2vec2-ctc": ("Wav2Vec2ForCTC", _WAVES),
    "wav2vec2-pretraining": (
        "Wav2Vec2ForPreTraining",
        {**_WAVES, "num_codevectors_per_group": 8, "codevector_dim": 16}
        | {"proj_codevector_dim": 16},
    ),
    # Encoders with decoders
    "bart": ("BartForConditionalGeneration", _BOTH_SIDES),
    "blenderbot": ("BlenderbotForConditionalGeneration", _BOTH_SIDES),
    "led": (
        "LEDForConditionalGeneration",
        {**_BOTH_SIDES, "max_encoder_position_embeddings": 32, "attention_window": 4}
        | {"max_decoder_position_embeddings": 32},
    ),
    "longt5": ("LongT5ForConditionalGeneration", {**_T5, "local_radius": 4}),
    "m2m100": ("M2M100ForConditionalGeneration", _BOTH_SIDES),
    "marian": ("MarianMTModel", _BOTH_SIDES),
    "mbart": ("MBartForConditionalGeneration", _BOTH_SIDES),
    "mt5": ("MT5ForConditionalGeneration", _T5),
    "pegasus": ("PegasusForConditionalGeneration", _BOTH_SIDES),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {**_T5, "expert_capacity": 64, "num_sparse_encoder_layers": 1}
        | {"num_sparse_decoder_layers": 1},
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5gemma": (
        "T5GemmaForConditionalGeneration",
        {side: {**_TEXT, "sliding_window": 4} for side in ("encoder", "decoder")},
    ),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration",
        {
            "encoder": {
                "text_config": {**_TEXT, "sliding_window": 4},
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
            },
            "decoder": {**_TEXT, "sliding_window": 4},
        },
    ),
    # With an eye or an ear, run on text
    "audio-flamingo": (
        "AudioFlamingo3ForConditionalGeneration",
        _with("qwen2", audio_config=_HEARING, audio_token_id=99),
    ),
    "emu3": (
        "Emu3ForConditionalGeneration",
        {
            "text_config": _TEXT,
            "vq_config": {
                **{"codebook_size": 32, "embed_dim": 4, "latent_channels": 4, "base_channels": 32},
                **{"channel_multiplier": [1], "num_res_blocks": 1, "hidden_size": 16},
                "attn_resolutions": [],
            },
            "vocabulary_map": {"<image>": 99},
        },
    ),
    "florence2": (
        "Florence2ForConditionalGeneration",
        {
            "text_config": {
                **_BOTH_SIDES,
                **{"model_type": "bart", "vocab_size": 101, "d_model": 48},
                "max_position_embeddings": 29,
            },
            "vision_config": {
                **{"embed_dim": [8, 16], "depths": [1, 1], "num_heads": [2, 2]},
                **{"num_groups": [2, 2], "patch_size": [3, 3], "patch_stride": [2, 2]},
                **{"patch_padding": [1, 1], "patch_prenorm": [False, True], "window_size": 2},
                **{"projection_dim": 16, "max_temporal_embeddings": 4},
                "max_position_embeddings": 8,
            },
            "image_token_id": 99,
        },
    ),
    "gemma4-vision": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": {**_TEXT, **_GEMMA_4},
            "vision_config": {
                **_VISION,
                **{"head_dim": 8, "num_key_value_heads": 2, "global_head_dim": 8},
                "position_embedding_size": 16,
            },
            "audio_config": None,
            **{"image_token_id": 99, "audio_token_id": 98, "video_token_id": 97},
        },
    ),
    "gemma4-unified": (
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {**_TEXT, **_GEMMA_4, "hidden_size_per_layer_input": 0},
            **{"image_token_id": 99, "audio_token_id": 98, "video_token_id": 97},
        },
    ),
    "glm-asr": (
        "GlmAsrForConditionalGeneration",
        _with(
            "llama",
            audio_config={
                **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                **{"num_key_value_heads": 2, "intermediate_size": 64, "num_mel_bins": 8},
                "max_position_embeddings": 16,
            },
            audio_token_id=99,
        ),
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        _with("llama", vision_config=_VISION, image_token_id=99, scale_factor=2),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        _with(
            "llama",
            vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=99,
        ),
    ),
    "llava-next": (
        "LlavaNextForConditionalGeneration",
        _with(
            "llama",
            vision_config={**_VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=99,
        ),
    ),
    "llava-onevision": (
        "LlavaOnevisionForConditionalGeneration",
        _with(
            "qwen2",
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            image_token_index=99,
            video_token_index=98,
        ),
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        _with(
            "mistral",
            vision_config={**_VISION, "model_type": "pixtral", "head_dim": 8},
            image_token_index=99,
        ),
    ),
    "muse-glimmer": (
        "MuseGlimmerForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "layer_types": ["sliding_attention", "full_attention"],
                "layer_rope_theta": [10000.0, 0],
            },
            "vision_config": _VISION,
            **{"out_hidden_size": 64, "projector_hidden_size": 20, "image_token_id": 99},
        },
    ),
    "music-flamingo": (
        "MusicFlamingoForConditionalGeneration",
        _with(
            "qwen2",
            audio_config={**_HEARING, "model_type": "audioflamingo3_encoder"},
            audio_token_id=99,
        ),
    ),
    "qwen2-audio": (
        "Qwen2AudioForConditionalGeneration",
        _with(
            "qwen2",
            audio_config={
                **{"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2},
                **{"encoder_ffn_dim": 20, "num_mel_bins": 8, "max_source_positions": 16},
            },
            audio_token_index=99,
        ),
    ),
}
_FOR_PYTORCH_FILES = ("switch",)
"""Cases whose adapter has `use_safetensors=False`."""


_IN_OLDER_ONES = (
    *("gpt2", "neox", "llama-gqa", "llama-gqa1-tied", "gemma2", "gemma3", "mixtral", "phi3"),
    *("bloom", "opt", "qwen3", "qwen2-moe", "llama4", "mamba", "bert", "vit"),
)
"""One of each kind, for TransformerLens 3 and 4.0 to 4.2, whose own bridges fail at some others
beside a newer transformers."""


def _cases() -> dict[str, Case]:
    cases = {name: case for name, case in zoo.CASES.items() if case.kind == "hf"}
    del cases["olmoe-gqa"]  # rows of experts that are no whole 16 bytes
    for name, (architecture, config) in _OWN.items():
        text = config.get("text_config", config)
        d_vocab = text.get("vocab_size", _SMALL["vocab_size"])
        cases[name] = Case(architecture, "hf", config, f"somebody/tiny-{name}", d_vocab)
    if Version(metadata.version("transformer_lens")) < Version("4.3"):
        return {name: case for name, case in cases.items() if name in _IN_OLDER_ONES}
    return cases


CASES: dict[str, Case] = _cases()
Value = TypeVar("Value")


def _of_these(table: dict[str, Value]) -> dict[str, Value]:
    """The rows of the cases that there are in this TransformerLens."""
    return {name: value for name, value in table.items() if name in CASES}


def _because(reason: str, architectures: str) -> dict[str, str]:
    return dict.fromkeys(architectures.split(), reason)


NOT_BOOTED: dict[str, str] = {
    **_because(
        "its code is not part of transformers",
        """BaiChuanForCausalLM BaichuanForCausalLM BD3LM DreamModel ExaoneForCausalLM
        GiddForDiffusionLM GPT2LMHeadCustomModel HyenaDNAForCausalLM InternLM2ForCausalLM
        LLaDA2MoeModelLM LLaDAModelLM OpenELMForCausalLM OuroForCausalLM PhiMoEForCausalLM
        QwenForCausalLM RavenForCausalLM RWKV7ForCausalLM""",
    ),
    **_because(
        "no model of transformers has this name, which stands for another in the table",
        """Gemma1ForCausalLM JetMoEForCausalLM MPTForCausalLM NeoForCausalLM NeoXForCausalLM
        T5WithLMHeadModel""",
    ),
    **_because(
        "TransformerLens' own checkpoints, which `boot_tl_legacy` loads",
        "MinGPTForCausalLM NanoGPTForCausalLM NeelSoluOldForCausalLM",
    ),
    **_because(
        "models without a checkpoint, which `boot_native` makes",
        "TransformerLensNative TransformerLensPretrain",
    ),
    **_because(
        "its adapter wants torchvision",
        """Glm4vForConditionalGeneration Qwen2_5_VLForConditionalGeneration
        Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
        Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration""",
    ),
    "Gemma3nForConditionalGeneration": "its vision tower wants timm",
    "CodeGenForCausalLM": "forward: 'CodeGenAttention' object has no attribute 'embed_positions'",
    "Llama4ForConditionalGeneration": (
        "forward: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'"
    ),
}
"""Architectures that stock has an adapter for and cannot boot or run here, and why."""

_AUDIO = "is not supported for audio encoder models"
_NO_UNEMBEDDING = "Unembed weight not found"
_NO_EMBEDDING = "embedding key 'embed.weight' not found"
RAW_ONLY: dict[str, str] = _of_these(
    {
        "vaultgemma": "does not support compatibility mode",
        "falcon-h1-gqa": "The size of tensor a",
        **dict.fromkeys(("ast", "hubert", "hubert-ctc"), _AUDIO),
        **dict.fromkeys(("wav2vec2", "wav2vec2-ctc", "wav2vec2-pretraining"), _AUDIO),
        **dict.fromkeys(("vit", "deit"), _NO_UNEMBEDDING),
        **dict.fromkeys(("vit-classes", "deit-classes"), _NO_EMBEDDING),
    }
)
"""Cases for which stock's compatibility mode raises, and a part of the message."""

STUMBLES: tuple[str, ...] = tuple(_of_these({"falcon-h1-gqa": None}))
"""Of these, those that fail in a step which is wrong for them and may be left out."""

WRONG_WHEN_PROCESSED: dict[str, tuple[float, str]] = _of_these(
    {
        "bitnet": (2.8, "norms are folded into what is quantized on the way"),
        "ernie-moe-square": (1.8, "folds the norm into the wrong side of square experts"),
        "falcon-h1": (5.3, "folds the norm into attention alone; the state space reads it as well"),
        "gpt-oss": (
            1.2,
            "attention sinks make pattern rows sum to less than one, so b_V does not fold",
        ),
    }
)
"""Cases whose log-probabilities stock's compatibility mode moves: by how much, in nats, and why."""

_MASK = "stock's mask is float32: the product of pattern and values meets two dtypes"
NO_FORWARD_IN_BFLOAT16: dict[str, str] = _of_these(
    dict.fromkeys(("olmo", "olmo-clip", "olmo2", "olmo3", "olmo3-gqa", "flex-olmo"), _MASK)
)
"""Cases that stock boots and processes in bfloat16 and cannot run there, and why."""


def _config(case: Case) -> dict[str, Any]:
    """The keywords of a case's configuration: of `_SMALL`, those that the configuration has."""
    config_class = getattr(transformers, case.architecture).config_class
    known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", None) or {})
    config = {name: value for name, value in _SMALL.items() if name in known}
    config.update(case.config)
    return {name: value for name, value in config.items() if value is not _AS_IT_IS}


def build(
    case_id: str, folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write the checkpoint of a case, with a tokenizer, into `folder` and return it.

    dtype: of the weights in the file. overrides: other values for keywords of the configuration.
    """
    case = CASES[case_id]
    if case_id in _OWN:
        case = Case(case.architecture, "hf", _config(case), case.repo, case.d_vocab)
    as_torch_file = case_id in _FOR_PYTORCH_FILES
    zoo.build_case(case, case_id, folder, dtype=dtype, bin=as_torch_file, **overrides)
    return zoo.add_tokenizer(folder, case.d_vocab)


def inputs(
    case_id: str, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the bridge's forward gets: the first argument and keywords, the same on every call.

    Token ids `[2, 11]`, pixels `[2, 3, 8, 8]`, filter banks `[2, 16, 16]` or waves `[2, 60]`; an
    encoder-decoder gets the first five tokens as `decoder_input`.
    """
    case = CASES[case_id]
    generator = torch.Generator().manual_seed(case.d_vocab)
    if case.architecture.startswith(("ViT", "DeiT")):
        return torch.randn(2, 3, 8, 8, generator=generator).to(dtype), {}
    if case.architecture.startswith("AST"):
        return torch.randn(2, 16, 16, generator=generator).to(dtype), {}
    if case.architecture.startswith(("Wav2Vec2", "Hubert")):
        return torch.randn(2, 60, generator=generator).to(dtype), {}
    # Below the ids that stand for pictures, sounds and films.
    shape = (2, zoo.SEQUENCE_LENGTH)
    tokens = torch.randint(3, case.d_vocab - 5, shape, generator=generator)
    both_sides = case_id in _OWN and {"decoder_layers", "num_decoder_layers", "decoder"} & {
        *case.config,
        *case.config.get("text_config", ()),
    }
    return tokens, {"decoder_input": tokens[:, :5]} if both_sides else {}


def hf_inputs(case_id: str) -> Mapping[str, torch.Tensor]:
    """The same inputs under the names that transformers has for them."""
    first, others = inputs(case_id)
    name = "input_ids" if first.dtype == torch.long else "input_values"
    named = {"pixel_values" if first.ndim == 4 else name: first}
    if "decoder_input" in others:
        named["decoder_input_ids"] = others["decoder_input"]
    return named
