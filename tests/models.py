"""Small real models for oracles: every block of the original, few channels, seeded random weights.

The block structure (how many blocks, which of them attend, how deep) is the published one, so the
names are the real ones, all of them; only widths are small. The widths are those of the "reduced
width" manifests under fixtures/, so a materialised manifest fits the model it was written for.
Language models have two layers, as in their manifests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def sd1_unet(seed: int = 0) -> nn.Module:
    """Stable Diffusion 1.x: one weight for every hundred of the original."""
    return _unet(seed, attention_head_dim=4)


def sd2_unet(seed: int = 0) -> nn.Module:
    """Stable Diffusion 2.x: 1.x with linear projections and heads of one width."""
    return _unet(seed, attention_head_dim=(2, 4, 8, 8), use_linear_projection=True)


def sdxl_unet(seed: int = 0) -> nn.Module:
    """SDXL base: three levels, the deepest with ten transformer blocks."""
    return _unet(
        seed,
        sample_size=32,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def _unet(seed: int, **config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    small = {"sample_size": 16, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 48}
    return _seeded(lambda: UNet2DConditionModel(**{**small, **config}), seed)


def flux_transformer(seed: int = 0) -> nn.Module:
    """FLUX.1 dev: 19 double and 38 single blocks."""
    from diffusers import FluxTransformer2DModel

    def build() -> nn.Module:
        return FluxTransformer2DModel(
            in_channels=16,
            num_attention_heads=4,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )

    return _seeded(build, seed)


def sd3_transformer(seed: int = 0) -> nn.Module:
    """SD 3 medium: 24 joint blocks, no norms on queries and keys."""
    return _sd3(seed, num_layers=24)


def sd35_medium_transformer(seed: int = 0) -> nn.Module:
    """SD 3.5 medium: 24 blocks, a second attention in the first 13."""
    return _sd3(seed, num_layers=24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


def sd35_large_transformer(seed: int = 0) -> nn.Module:
    """SD 3.5 large: 38 blocks."""
    return _sd3(seed, num_layers=38, qk_norm="rms_norm")


def _sd3(seed: int, **config: Any) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    small = {
        "sample_size": 16,
        "pos_embed_max_size": 16,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "caption_projection_dim": 64,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    }
    return _seeded(lambda: SD3Transformer2DModel(**{**small, **config}), seed)


def clip_l(seed: int = 0) -> nn.Module:
    """The text encoder of SD 1.x, the first of SDXL and FLUX.1."""
    from transformers import CLIPTextModel

    return _seeded(lambda: CLIPTextModel(_clip_config(layers=12, act="quick_gelu")), seed)


def clip_h(seed: int = 0) -> nn.Module:
    """The text encoder of SD 2.x: OpenCLIP's ViT-H, less its last layer."""
    from transformers import CLIPTextModel

    return _seeded(lambda: CLIPTextModel(_clip_config(layers=23, act="gelu")), seed)


def clip_g(seed: int = 0) -> nn.Module:
    """The second text encoder of SDXL and SD 3: OpenCLIP's ViT-bigG."""
    from transformers import CLIPTextModelWithProjection

    return _seeded(lambda: CLIPTextModelWithProjection(_clip_config(layers=32, act="gelu")), seed)


def _clip_config(layers: int, act: str) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
    )


def t5_encoder(seed: int = 0) -> nn.Module:
    """The encoder of T5 v1.1 XXL, as FLUX.1 and SD 3 use it."""
    from transformers import T5EncoderModel

    return _seeded(lambda: T5EncoderModel(_t5_config(layers=24)), seed)


def t5(seed: int = 0) -> nn.Module:
    """An encoder and a decoder of two layers each."""
    from transformers import T5ForConditionalGeneration

    return _seeded(lambda: T5ForConditionalGeneration(_t5_config(layers=2)), seed)


def _t5_config(layers: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )


LLM = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(seed: int = 0, *, tied: bool = False) -> nn.Module:
    """Llama; `tied`: its head is its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**LLM, tie_word_embeddings=tied)), seed)


def qwen3(seed: int = 0) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**LLM)), seed)


def mixtral(seed: int = 0) -> nn.Module:
    """Four experts, kept as one parameter of three axes."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return _seeded(lambda: MixtralForCausalLM(MixtralConfig(**LLM, num_local_experts=4)), seed)


def gpt2(seed: int = 0) -> nn.Module:
    """Its linear layers keep their weights as (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return _seeded(lambda: GPT2LMHeadModel(config), seed)


def bert(seed: int = 0) -> nn.Module:
    """With a head of two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = BertConfig(**{name: LLM[name] for name in shared}, max_position_embeddings=64, num_labels=2)
    return _seeded(lambda: BertForSequenceClassification(config), seed)


MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        *(sd1_unet, sd2_unet, sdxl_unet, flux_transformer),
        *(sd3_transformer, sd35_medium_transformer, sd35_large_transformer),
        *(clip_l, clip_h, clip_g, t5_encoder),
        *(llama, qwen3, mixtral, gpt2, bert, t5),
    )
}


def sd1_pipeline(seed: int = 0) -> Any:
    """The parts of the pipeline that adapters change; the others are absent."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=clip_l(seed),
        tokenizer=None,
        unet=sd1_unet(seed),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(seed: int = 0) -> Any:
    """The parts of the pipeline that adapters change; the others are absent."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=clip_l(seed),
        text_encoder_2=clip_g(seed + 1),
        tokenizer=None,
        tokenizer_2=None,
        unet=sdxl_unet(seed),
        scheduler=None,
        add_watermarker=False,
    )


def flux_pipeline(seed: int = 0) -> Any:
    """The parts of the pipeline that adapters change; the others are absent."""
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=clip_l(seed),
        tokenizer=None,
        text_encoder_2=t5_encoder(seed),
        tokenizer_2=None,
        transformer=flux_transformer(seed),
    )


def sd3_pipeline(seed: int = 0) -> Any:
    """The parts of the pipeline that adapters change; the others are absent."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(seed),
        scheduler=None,
        vae=None,
        text_encoder=_seeded(
            lambda: CLIPTextModelWithProjection(_clip_config(layers=12, act="quick_gelu")), seed
        ),
        tokenizer=None,
        text_encoder_2=clip_g(seed + 1),
        tokenizer_2=None,
        text_encoder_3=t5_encoder(seed),
        tokenizer_3=None,
    )
