"""Blocks are those that people weigh, and every module is in one of them."""

from __future__ import annotations

import pytest

from adapterkit.blocks import Blocks, all_blocks, block_of, blocks_of, parse_blocks
from adapterkit.errors import SpecError
from adapterkit.specs.families import Family, families, family
from adapterkit.specs.names import network

# The lists of sd-webui-lora-block-weight, as its README counts them.
SIXTY_ONE = [
    *("CLIP", "T5", "IN"),
    *(f"D{number:02}" for number in range(19)),
    *(f"S{number:02}" for number in range(38)),
    "OUT",
]
ORDERS = {
    ("sd1", 26): [
        "BASE",
        *(f"IN{number:02}" for number in range(12)),
        "M00",
        *(f"OUT{number:02}" for number in range(12)),
    ],
    ("sd1", 17): [
        "BASE",
        *(f"IN{number:02}" for number in (1, 2, 4, 5, 7, 8)),
        "M00",
        *(f"OUT{number:02}" for number in range(3, 12)),
    ],
    ("sdxl", 20): [
        "BASE",
        *(f"IN{number:02}" for number in range(9)),
        "M00",
        *(f"OUT{number:02}" for number in range(9)),
    ],
    ("sdxl", 12): [
        "BASE",
        *(f"IN{number:02}" for number in (4, 5, 7, 8)),
        "M00",
        *(f"OUT{number:02}" for number in range(6)),
    ],
    ("flux1", 61): SIXTY_ONE,
}
ORDERS |= {("sd2", length): ORDERS["sd1", length] for length in (17, 26)}

# The 17 and 12 blocks of a LoRA without convolutions, by the names of diffusers in their order
# (haofanwang/lora-block-weight-diffusers README.md; for SDXL from the structure of its UNet).
TRANSFORMERS = {
    ("sd1", 17): [
        *(f"down_blocks.{block}.attentions.{index}" for block in range(3) for index in range(2)),
        "mid_block.attentions.0",
        *(f"up_blocks.{block}.attentions.{index}" for block in range(1, 4) for index in range(3)),
    ],
    ("sdxl", 12): [
        *(f"down_blocks.{block}.attentions.{index}" for block in (1, 2) for index in range(2)),
        "mid_block.attentions.0",
        *(f"up_blocks.{block}.attentions.{index}" for block in range(2) for index in range(3)),
    ],
}


def one(name: str) -> Family:
    return family(name)[0]


@pytest.mark.parametrize("name, length", ORDERS)
def test_an_order_is_the_list_of_the_community(name: str, length: int) -> None:
    blocks = blocks_of(one(name))
    assert blocks is not None
    assert list(blocks.order(length) or ()) == ORDERS[name, length]


def test_there_are_no_other_orders() -> None:
    found = {
        (known.name, len(order))
        for known in families()
        if (blocks := blocks_of(known)) is not None
        for order in blocks.orders.values()
    }
    assert found == set(ORDERS)


@pytest.mark.parametrize("name, length", TRANSFORMERS)
def test_the_blocks_of_a_lora_are_the_transformers_in_their_order(name: str, length: int) -> None:
    owner = one(name)
    labels = [
        block_of(owner, "unet", f"{beginning}.transformer_blocks.0.attn1.to_q")
        for beginning in TRANSFORMERS[name, length]
    ]
    assert ["BASE", *labels] == ORDERS[name, length]


@pytest.mark.parametrize(
    "name, component, module, block",
    [
        ("sd1", "unet", "conv_in", "IN00"),
        ("sd1", "unet", "down_blocks.0.downsamplers.0.conv", "IN03"),
        ("sd1", "unet", "down_blocks.3.resnets.1.conv1", "IN11"),
        ("sd1", "unet", "mid_block.resnets.1.conv2", "M00"),
        ("sd1", "unet", "up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("sd1", "unet", "time_embedding.linear_1", "BASE"),
        ("sd1", "unet", "conv_out", "BASE"),
        ("sd1", "text_encoder", "text_model.encoder.layers.3.self_attn.q_proj", "BASE"),
        ("sdxl", "unet", "add_embedding.linear_1", "BASE"),
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.30.mlp.fc1", "BASE"),
        ("flux1", "transformer", "transformer_blocks.7.attn.add_q_proj", "D07"),
        ("flux1", "transformer", "single_transformer_blocks.30.proj_mlp", "S30"),
        ("flux1", "transformer", "context_embedder", "IN"),
        ("flux1", "transformer", "time_text_embed.guidance_embedder.linear_1", "IN"),
        ("flux1", "transformer", "norm_out.linear", "OUT"),
        ("flux1", "text_encoder", "text_model.encoder.layers.0.mlp.fc1", "CLIP"),
        ("flux1", "text_encoder_2", "encoder.block.5.layer.0.SelfAttention.q", "T5"),
        ("SD 3.5 large", "transformer", "transformer_blocks.37.attn.to_q", "J37"),
        ("SD 3.5 large", "transformer", "proj_out", "BASE"),
        ("transformers", "model", "model.layers.12.self_attn.q_proj", "layers.12"),
        ("transformers", "model", "transformer.h.3.mlp.c_fc", "h.3"),
        ("transformers", "model", "lm_head", "model"),
        ("diffusers", "transformer", "blocks.10.attn1.to_q", "blocks.10"),
    ],
)
def test_a_module_is_in_the_block_that_people_count_it_in(
    name: str, component: str, module: str, block: str
) -> None:
    assert block_of(one(name), component, module) == block


@pytest.mark.parametrize("blocks", all_blocks(), ids=lambda blocks: blocks.name)
def test_every_block_has_modules_and_every_module_a_block(blocks: Blocks) -> None:
    found: set[str] = set()
    for name in blocks.networks:
        known = network(name)
        by_module = blocks.by_module(name)
        found |= set(by_module.values())
        rows = known.namings[known.canonical].rows
        assert not {row.span[0].module for row in rows} - by_module.keys()
    assert set(blocks.starts.values()) <= found


def table(**changed: object) -> dict[str, object]:
    return {
        "summary": "an example",
        "source": "nowhere",
        "networks": ["unet_sdxl"],
        "naming": "ldm",
        "blocks": {"IN0{0..8}": "input_blocks.{0..8}", "M00": "middle_block"},
        "orders": {"full": ["IN0{0..8}", "M00"]},
        "presets": {"NONE": "0,0,0,0,0,0,0,0,0,0"},
        **changed,
    }


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"colour": "red"}, "`colour` is not known"),
        ({"naming": None}, "naming must be a text"),
        ({"blocks": {"IN0{0..8}": "input_blocks.{0..9}"}}, "do not walk together"),
        ({"orders": {"full": ["IN0{0..9}"]}}, "which are no blocks"),
        ({"orders": {"full": ["IN00", "IN00"]}}, "lists a block twice"),
        ({"orders": {"one": ["IN00"], "two": ["M00"]}, "presets": {}}, "of one length"),
        ({"presets": {"NONE": "0,0"}}, "has 2 numbers"),
        ({"presets": {"NONE": "0,a"}}, "not a list of numbers"),
    ],
)
def test_a_wrong_table_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_blocks("example", table(**changed), "example.toml")


def test_a_right_table_is_not_refused() -> None:
    assert parse_blocks("example", table(), "example.toml").labels[-1] == "M00"
