"""The tables of Stable Diffusion's UNets against diffusers, its converter and the original code."""

from __future__ import annotations

from typing import Any

import pytest
from network_mutants import lowered, survivors
from oracle_rows import Checkpoint, row_map, rows_of, shapes_of

from adapterkit.specs.names import network

XL_COMMON = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
# The configurations on the hub: runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1,
# stabilityai/stable-diffusion-xl-base-1.0 and -refiner-1.0, unet/config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "unet_sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "unet_sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "unet_sdxl": {
        **XL_COMMON,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
    },
    "unet_sdxl_refiner": {
        **XL_COMMON,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
    },
}


def real_unet(name: str) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name])


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_the_inventory_is_the_model_that_diffusers_builds(name: str) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in real_unet(name).state_dict().items()}
    assert dict(network(name).shapes) == expected


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_names_are_what_the_converter_of_diffusers_reads(name: str) -> None:
    from diffusers.loaders.single_file_utils import LDM_UNET_KEY, convert_ldm_unet_checkpoint

    def convert(checkpoint: Checkpoint) -> Checkpoint:
        prefixed = {LDM_UNET_KEY + key: tensor for key, tensor in checkpoint.items()}
        return convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": 2, **CONFIGS[name]})

    small = lowered(network(name), 64)
    theirs, ours = row_map(convert, shapes_of(small, "ldm")), rows_of(small, "ldm")
    assert ours.keys() == theirs.keys()
    assert [tensor for tensor in ours if ours[tensor] != theirs[tensor]] == []


# The converter passes leaves it does not know through as they are, so it cannot vouch for a native
# name alone. The original code can: what follows is its constructor, read for names only.
ATTENTION_DEPTHS = {  # of each level, widest picture first, and of the middle
    "unet_sd1": ((1, 1, 1, 0), 1),
    "unet_sd2": ((1, 1, 1, 0), 1),
    "unet_sdxl": ((0, 2, 10), 10),
    "unet_sdxl_refiner": ((0, 4, 4, 0), 4),
}
BLOCK = [f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
BLOCK += ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]


def resnet(at: str, *, narrows: bool) -> set[str]:
    leaves = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    return {f"{at}.{leaf}" for leaf in ([*leaves, "skip_connection"] if narrows else leaves)}


def transformer(at: str, depth: int) -> set[str]:
    blocks = {f"{at}.transformer_blocks.{n}.{leaf}" for n in range(depth) for leaf in BLOCK}
    return blocks | {f"{at}.{leaf}" for leaf in ("norm", "proj_in", "proj_out")}


def original_modules(depths: tuple[int, ...], middle_depth: int, widths: tuple[int, ...]) -> set[str]:
    """UNetModel of Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py."""
    names = {"time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"}
    number, width = 1, widths[0]
    for level, depth in enumerate(depths):
        for _ in range(2):
            names |= resnet(f"input_blocks.{number}.0", narrows=width != widths[level])
            names |= transformer(f"input_blocks.{number}.1", depth) if depth else set()
            number, width = number + 1, widths[level]
        if level < len(depths) - 1:
            names.add(f"input_blocks.{number}.0.op")
            number += 1
    names |= resnet("middle_block.0", narrows=False) | resnet("middle_block.2", narrows=False)
    names |= transformer("middle_block.1", middle_depth)
    number = 0
    for level, depth in reversed(list(enumerate(depths))):
        for place in range(3):
            names |= resnet(f"output_blocks.{number}.0", narrows=True)
            names |= transformer(f"output_blocks.{number}.1", depth) if depth else set()
            if level and place == 2:
                names.add(f"output_blocks.{number}.{2 if depth else 1}.conv")
            number += 1
    return names


@pytest.mark.parametrize("name", CONFIGS)
def test_the_original_names_are_what_the_original_code_builds(name: str) -> None:
    depths, middle_depth = ATTENTION_DEPTHS[name]
    widths = tuple(CONFIGS[name].get("block_out_channels", (320, 640, 1280, 1280)))
    expected = original_modules(depths, middle_depth, widths)
    if "addition_embed_type" in CONFIGS[name]:
        expected |= {"label_emb.0.0", "label_emb.0.2"}
    assert {row.native for row in network(name).namings["ldm"].rows} == expected


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_processors_are_those_of_the_real_model(name: str) -> None:
    """A LoRAAttnProcessor has to_q_lora, to_k_lora, to_v_lora and to_out_lora for the layers it serves."""
    expected = {
        f"{processor}.{leaf}": f"{processor.removesuffix('.processor')}.{layer}"
        for processor in real_unet(name).attn_processors
        for leaf, layer in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"))
    }
    rows = network(name).namings["attn_processor"].rows
    assert {row.native: row.span[0].module for row in rows} == expected
    assert all(row.param is None and len(row.span) == 1 for row in rows)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["unet_sd1", "unet_sd2"])
def test_cloneofsimo_counts_the_layers_in_the_order_of_registration(name: str) -> None:
    """Blocks are registered as they were; inside one, v0.8.0 to v0.14.0 went attn1, ff, attn2."""
    from diffusers.models.attention import BasicTransformerBlock

    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj"]
    layers += ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
    blocks = [at for at, m in real_unet(name).named_modules() if isinstance(m, BasicTransformerBlock)]
    expected = {str(n): at for n, at in enumerate(f"{block}.{layer}" for block in blocks for layer in layers)}
    rows = network(name).namings["cloneofsimo"].rows
    assert {row.native: row.span[0].module for row in rows} == expected


def test_cloneofsimo_shapes_are_those_of_a_real_file() -> None:
    """(rows of `up`, columns of `down`) in cloneofsimo/lora example_loras/lora_disney.safetensors."""
    first = [(320, 320)] * 4 + [(2560, 320), (320, 320), (320, 768), (320, 768), (320, 320)]
    last = [(1280, 1280)] * 4 + [(10240, 1280), (1280, 1280), (1280, 768), (1280, 768), (1280, 1280)]
    sd1 = network("unet_sd1")
    naming = sd1.namings["cloneofsimo"]
    for numbers, shapes in ((range(9), first), (range(135, 144), last)):
        rows = [naming.find(str(number)) for number in numbers]
        assert [sd1.weight_shape(row.span[0].module) for row in rows if row is not None] == shapes


@pytest.mark.parametrize(
    ("file", "naming", "width"),
    [
        ("unet_sd.toml", "ldm", 320),
        ("unet_sd.toml", "attn_processor", 320),
        ("unet_sd.toml", "cloneofsimo", 320),
        ("unet_sdxl.toml", "ldm", 320),
        ("unet_sdxl.toml", "attn_processor", 320),
        ("unet_sdxl_refiner.toml", "ldm", 384),
        ("unet_sdxl_refiner.toml", "attn_processor", 384),
    ],
)
def test_no_single_mistake_in_a_table_goes_unnoticed(file: str, naming: str, width: int) -> None:
    assert survivors(file, naming, width) == []
