"""Hugging Face's transformers: language, vision and speech, from small configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import Case, Sample

WORDS = 64


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, WORDS, (length,))


def _case(
    kind: str, model: str, settings: Mapping[str, Any], sample: Callable[[], Sample] | None = None, **more: Any
) -> Case:
    def make() -> nn.Module:
        import transformers

        configuration = getattr(transformers, f"{kind}Config")(**settings)
        made: nn.Module = getattr(transformers, model)(configuration)
        return made

    return Case(f"HF {model}", make, sample or (lambda: {"input_ids": tokens()}), **more)


_ENCODER = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_DECODER = {
    **_ENCODER,
    "use_cache": False,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BOTH = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
_IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def _pair() -> Sample:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(6)}


def _picture() -> Sample:
    return {"pixel_values": torch.randn(3, 32, 32)}


def _speech() -> Sample:
    return {"input_features": torch.randn(16, 40), "decoder_input_ids": tokens(6)}


def _sound() -> Sample:
    return {"input_values": torch.randn(800)}


_WHISPER = {**_BOTH, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20}
del _WHISPER["max_position_embeddings"]
_WAVES = {
    **_ENCODER,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 6),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
del _WAVES["max_position_embeddings"]

CASES = [
    _case("Bert", "BertForMaskedLM", _ENCODER),
    _case("Roberta", "RobertaForSequenceClassification", {**_ENCODER, "pad_token_id": 0}),
    _case("Albert", "AlbertForMaskedLM", {**_ENCODER, "embedding_size": 16}),
    _case(
        "DistilBert",
        "DistilBertForMaskedLM",
        {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    _case(
        "DebertaV2",
        "DebertaV2ForMaskedLM",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    _case(
        "GPT2",
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False},
    ),
    _case("Llama", "LlamaForCausalLM", _DECODER),
    _case("Qwen2", "Qwen2ForCausalLM", _DECODER),
    _case("Gemma", "GemmaForCausalLM", {**_DECODER, "head_dim": 8}),
    _case("Mixtral", "MixtralForCausalLM", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    _case(
        "T5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
        _pair,
    ),
    _case("Bart", "BartForConditionalGeneration", _BOTH, _pair),
    _case(
        "ViT",
        "ViTForImageClassification",
        {**_IMAGE, "intermediate_size": 64},
        _picture,
        share=0.97,
        why="positions are added and the token of the class is put in front",
    ),
    _case(
        "Swin",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        _picture,
        share=0.98,
        why="tables of relative positions are added to scores",
    ),
    _case(
        "ConvNext", "ConvNextForImageClassification", {"hidden_sizes": (8, 16, 24, 32), "depths": (1,) * 4}, _picture
    ),
    _case(
        "Whisper",
        "WhisperForConditionalGeneration",
        _WHISPER,
        _speech,
        share=0.98,
        why="positions are cut from a table and added",
    ),
    _case("Wav2Vec2", "Wav2Vec2ForCTC", _WAVES, _sound),
    _case(
        "Mamba",
        "MambaForCausalLM",
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "state_size": 4,
            "num_hidden_layers": 2,
            "use_mambapy": False,
            "use_cache": False,
        },
        share=0.97,
        why="decays are exponents of a table",
    ),
]
