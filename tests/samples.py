"""Files as their writers write them, in the widths of the real model, each with what it means.

No tensor takes memory: each is one number, expanded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from adapters import File
from torch import Tensor

from adapterkit.detect import Explanation, explain

Tensors = dict[str, Tensor]
ZERO = torch.zeros(1)


def lora(
    stem: str, rows: int, columns: int, up: str, down: str, *, alpha: bool = False, kernel: int = 0
) -> Tensors:
    ones, sides = ((1, 1), (kernel, kernel)) if kernel else ((), ())
    made = {stem + up: ZERO.expand(rows, 4, *ones), stem + down: ZERO.expand(4, columns, *sides)}
    return made | ({f"{stem}.alpha": torch.tensor(4.0)} if alpha else {})


def kohya(stem: str, rows: int, columns: int, kernel: int = 0) -> Tensors:
    return lora(stem, rows, columns, ".lora_up.weight", ".lora_down.weight", alpha=True, kernel=kernel)


def peft(stem: str, rows: int, columns: int, slot: str = "") -> Tensors:
    return lora(stem, rows, columns, f".lora_B{slot}.weight", f".lora_A{slot}.weight")


def down_up(stem: str, rows: int, columns: int) -> Tensors:
    return lora(stem, rows, columns, ".up.weight", ".down.weight")


@dataclass(frozen=True)
class Sample:
    """A file, and what it is.

    means: (component, canonical module) of each module of the file, parts of a fused one by "+".
    """

    tensors: Tensors
    family: str
    layout: str
    means: set[tuple[str, str]]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def explain(self, **options: str) -> Explanation:
        return explain(File(self.tensors, dict(self.metadata)).store(), **options)


FLUX_Q = ("transformer", "transformer_blocks.0.attn.to_q")
FLUX_QKV = ("transformer", "+".join(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"))
D = "transformer_blocks.0.attn.to_q"
CLIP_FC1 = ("text_encoder", "text_model.encoder.layers.3.mlp.fc1")
XL_K = ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k")
XL = "down_blocks.1.attentions.0.transformer_blocks.1.attn2"
SD_K = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
SD = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
SD_FLAT = "lora_unet_" + SD.replace(".", "_")
SD3_QKV = ("transformer", "+".join(f"transformer_blocks.5.attn.to_{x}" for x in "qkv"))

BFL_CONTROL = (
    peft("img_in", 3072, 128)
    | peft("double_blocks.0.img_attn.qkv", 9216, 3072)
    | peft("final_layer.linear", 64, 3072)
    | {f"{stem}.lora_B.bias": ZERO.expand(n) for stem, n in (("img_in", 3072), ("final_layer.linear", 64))}
    | {"double_blocks.0.img_attn.norm.query_norm.scale": ZERO.expand(128)}
)

SAMPLES: dict[str, Sample] = {
    # Stable Diffusion: which of the four UNets, by the width of the text and the kernel of proj_in.
    "kohya, SD 1": Sample(kohya(f"{SD_FLAT}_to_k", 320, 768), "sd1", "kohya", {SD_K}),
    "kohya, SD 2": Sample(kohya(f"{SD_FLAT}_to_k", 320, 1024), "sd2", "kohya", {SD_K}),
    "kohya, SD 1 by a kernel": Sample(
        kohya("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320, 1),
        "sd1",
        "kohya",
        {("unet", "down_blocks.0.attentions.0.proj_in")},
    ),
    "kohya, SD 2 by no kernel": Sample(
        kohya("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320),
        "sd2",
        "kohya",
        {("unet", "down_blocks.0.attentions.0.proj_in")},
    ),
    "kohya, SD 1 in its original names": Sample(
        kohya("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", 320, 768), "sd1", "kohya", {SD_K}
    ),
    "kohya, SDXL": Sample(
        kohya("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 640, 2048),
        "sdxl",
        "kohya",
        {XL_K},
    ),
    "kohya, SDXL in diffusers names": Sample(
        kohya("lora_unet_" + XL.replace(".", "_") + "_to_k", 640, 2048), "sdxl", "kohya", {XL_K}
    ),
    "kohya, SDXL refiner": Sample(
        kohya("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 768, 1280),
        "sdxl_refiner",
        "kohya",
        {XL_K},
    ),
    "kohya, one text encoder of SD 1": Sample(
        kohya("lora_te_text_model_encoder_layers_3_mlp_fc1", 3072, 768), "sd1", "kohya", {CLIP_FC1}
    ),
    "kohya, one text encoder of SD 2": Sample(
        kohya("lora_te_text_model_encoder_layers_3_mlp_fc1", 4096, 1024), "sd2", "kohya", {CLIP_FC1}
    ),
    "kohya, one text encoder of the refiner": Sample(
        kohya("lora_te_text_model_encoder_layers_3_mlp_fc1", 5120, 1280),
        "sdxl_refiner",
        "kohya",
        {("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1")},
    ),
    # Sizes of Stable Diffusion 3.
    "SD 3 medium": Sample(
        kohya("lora_unet_joint_blocks_5_x_block_attn_qkv", 4608, 1536), "SD 3 medium", "kohya", {SD3_QKV}
    ),
    "SD 3.5 medium": Sample(
        kohya("lora_unet_joint_blocks_5_x_block_attn2_qkv", 4608, 1536),
        "SD 3.5 medium",
        "kohya",
        {("transformer", SD3_QKV[1].replace(".attn.", ".attn2."))},
    ),
    "SD 3.5 large": Sample(
        kohya("lora_unet_joint_blocks_5_x_block_attn_qkv", 7296, 2432), "SD 3.5 large", "kohya", {SD3_QKV}
    ),
    "SD 3.5 large by its last block": Sample(
        peft("transformer.transformer_blocks.37.attn.to_q", 2432, 2432),
        "SD 3.5 large",
        "diffusers",
        {("transformer", "transformer_blocks.37.attn.to_q")},
    ),
    # In medium the context of block 23 ends after two modulations, in large it has all six.
    "SD 3 medium by its last context": Sample(
        kohya("lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", 3072, 1536),
        "SD 3 medium",
        "kohya",
        {
            (
                "transformer",
                "transformer_blocks.23.norm1_context.linear+transformer_blocks.23.norm1_context.linear",
            )
        },
    ),
    "SD 3.5 large by the same context": Sample(
        kohya("lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", 14592, 2432),
        "SD 3.5 large",
        "kohya",
        {("transformer", "transformer_blocks.23.norm1_context.linear")},
    ),
    # FLUX.1 by its writers.
    "kohya, FLUX.1": Sample(
        kohya("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072)
        | kohya("lora_te1_text_model_encoder_layers_3_mlp_fc1", 3072, 768)
        | kohya("lora_te3_encoder_block_7_layer_1_DenseReluDense_wi_0", 10240, 4096),
        "flux1",
        "kohya",
        {FLUX_QKV, CLIP_FC1, ("text_encoder_2", "encoder.block.7.layer.1.DenseReluDense.wi_0")},
    ),
    "OneTrainer, whose T5 is te2": Sample(
        kohya(f"lora_transformer_{D.replace('.', '_')}", 3072, 3072)
        | kohya("lora_te1_text_model_encoder_layers_3_mlp_fc1", 3072, 768)
        | kohya("lora_te2_encoder_block_7_layer_0_SelfAttention_q", 4096, 4096),
        "flux1",
        "kohya",
        {FLUX_Q, CLIP_FC1, ("text_encoder_2", "encoder.block.7.layer.0.SelfAttention.q")},
    ),
    "OMI": Sample(
        kohya("transformer.double_blocks.0.img_attn.qkv.0", 3072, 3072)
        | kohya("transformer.single_blocks.4.linear1.3", 12288, 3072)
        | kohya("clip_l.text_model.encoder.layers.3.mlp.fc1", 3072, 768)
        | kohya("t5.encoder.block.7.layer.0.SelfAttention.q", 4096, 4096),
        "flux1",
        "omi",
        {
            FLUX_Q,
            CLIP_FC1,
            ("transformer", "single_transformer_blocks.4.proj_mlp"),
            ("text_encoder_2", "encoder.block.7.layer.0.SelfAttention.q"),
        },
    ),
    "TheLastBen, with a stray underscore": Sample(
        kohya("lora_unet_single_transformer_blocks_7_attn_to_k_", 3072, 3072)
        | kohya("lora_unet_single_transformer_blocks_7_proj_out_", 3072, 15360),
        "flux1",
        "kohya",
        {
            ("transformer", "single_transformer_blocks.7.attn.to_k"),
            ("transformer", "single_transformer_blocks.7.proj_out"),
        },
    ),
    "LyCORIS without kohya": Sample(
        kohya(f"lycoris_{D.replace('.', '_')}", 3072, 3072), "flux1", "kohya", {FLUX_Q}
    ),
    "XLabs": Sample(
        down_up("double_blocks.0.processor.qkv_lora1", 9216, 3072)
        | down_up("double_blocks.0.processor.proj_lora2", 3072, 3072),
        "flux1",
        "xlabs",
        {FLUX_QKV, ("transformer", "transformer_blocks.0.attn.to_add_out")},
    ),
    "BFL control, whose input is twice as wide": Sample(
        BFL_CONTROL,
        "flux1",
        "bfl",
        {
            FLUX_QKV,
            ("transformer", "x_embedder"),
            ("transformer", "proj_out"),
            ("transformer", "transformer_blocks.0.attn.norm_q"),
        },
    ),
    "diffusers": Sample(peft(f"transformer.{D}", 3072, 3072), "flux1", "diffusers", {FLUX_Q}),
    "diffusers, its text encoder without text_model": Sample(
        peft(f"transformer.{D}", 3072, 3072) | peft("text_encoder.encoder.layers.3.mlp.fc1", 3072, 768),
        "flux1",
        "diffusers",
        {FLUX_Q, CLIP_FC1},
    ),
    "ai-toolkit, LoKr in dotted names": Sample(
        {
            f"transformer.{D}.lokr_w1": ZERO.expand(8, 8),
            f"transformer.{D}.lokr_w2": ZERO.expand(384, 384),
            f"transformer.{D}.alpha": torch.tensor(4.0),
        },
        "flux1",
        "diffusers",
        {FLUX_Q},
    ),
    "PEFT": Sample(peft(f"base_model.model.{D}", 3072, 3072), "flux1", "peft", {FLUX_Q}),
    "PEFT in original names": Sample(
        peft("base_model.model.double_blocks.0.img_attn.qkv", 9216, 3072), "flux1", "peft", {FLUX_QKV}
    ),
    "PEFT behind diffusers' prefix": Sample(
        peft(f"transformer.base_model.model.{D}", 3072, 3072), "flux1", "diffusers", {FLUX_Q}
    ),
    "ComfyUI": Sample(
        kohya("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072)
        | kohya("text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1", 3072, 768),
        "flux1",
        "comfyui",
        {FLUX_QKV, CLIP_FC1},
    ),
    "ComfyUI with PEFT's suffixes and an alpha": Sample(
        peft("diffusion_model.double_blocks.0.img_attn.qkv", 9216, 3072)
        | {"diffusion_model.double_blocks.0.img_attn.qkv.alpha": torch.tensor(4.0)},
        "flux1",
        "comfyui",
        {FLUX_QKV},
    ),
    # What frameworks leave around names.
    **{
        f"wrapped: {name}": Sample(peft(f"{name}transformer.{D}", 3072, 3072), "flux1", "diffusers", {FLUX_Q})
        for name in (
            "module.",
            "_orig_mod.",
            "state_dict.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "state_dict.module.",
            "module.state_dict.",
        )
    },
    "wrapped inside": Sample(
        peft(
            "transformer._fsdp_wrapped_module.transformer_blocks.0._checkpoint_wrapped_module.attn.to_q",
            3072,
            3072,
        ),
        "flux1",
        "diffusers",
        {FLUX_Q},
    ),
    "an adapter's name: default": Sample(peft(D, 3072, 3072, ".default"), "flux1", "diffusers", {FLUX_Q}),
    "an adapter's name: another": Sample(
        peft(f"transformer.{D}", 3072, 3072, ".lightx2v_t1"), "flux1", "diffusers", {FLUX_Q}
    ),
    "an adapter's name before the suffix": Sample(
        peft(f"transformer.{D}.default", 3072, 3072), "flux1", "diffusers", {FLUX_Q}
    ),
    "suffixes without weight": Sample(
        lora(f"transformer.{D}", 3072, 3072, ".lora_B", ".lora_A"), "flux1", "diffusers", {FLUX_Q}
    ),
    # diffusers before PEFT.
    "attention processors": Sample(
        down_up(f"unet.{SD}.processor.to_k_lora", 320, 768)
        | down_up(f"unet.{SD}.processor.to_out_lora", 320, 320),
        "sd1",
        "diffusers_2023",
        {SD_K, ("unet", f"{SD}.to_out.0")},
    ),
    "attention processors under no prefix, from Replicate": Sample(
        down_up(f"{XL}.processor.to_k_lora", 640, 2048)
        | {"text_encoders_0": ZERO.expand(2, 768), "text_encoders_1": ZERO.expand(2, 1280)},
        "sdxl",
        "diffusers_2023",
        {XL_K},
    ),
    "diffusers of 2023": Sample(
        down_up(f"unet.{XL}.to_k.lora", 640, 2048)
        | down_up("text_encoder.text_model.encoder.layers.3.mlp.fc1.lora_linear_layer", 3072, 768),
        "sdxl",
        "diffusers_2023",
        {XL_K, CLIP_FC1},
    ),
    "a text encoder spelled as a UNet": Sample(
        down_up(f"unet.{SD}.processor.to_k_lora", 320, 768)
        | down_up("text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora", 768, 768)
        | down_up("text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora", 768, 768),
        "sd1",
        "diffusers_2023",
        {
            SD_K,
            ("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj"),
            ("text_encoder", "text_model.encoder.layers.3.self_attn.out_proj"),
        },
    ),
    # Others.
    "AUTOMATIC1111, with a scale and an embedding": Sample(
        kohya(f"{SD_FLAT}_to_k", 320, 768)
        | {
            f"{SD_FLAT}_to_k.scale": torch.tensor(0.5),
            "bundle_emb.cat.string_to_param.*": ZERO.expand(2, 768),
        },
        "sd1",
        "kohya",
        {SD_K},
    ),
    "cloneofsimo, by numbers": Sample(
        # In the order of registration: to_q, to_k, to_v, to_out, ff, and only then the second attention.
        lora("unet:4", 2560, 320, ":up", ":down") | lora("unet:6", 320, 768, ":up", ":down"),
        "sd1",
        "cloneofsimo",
        {("unet", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"), SD_K},
    ),
}
