"""Strengths mean what people write, and a change at a strength is exactly so many times its delta."""

from __future__ import annotations

import re

import pytest
import torch
from deltas_cases import CASES, numbers

from adapterkit.blocks import blocks_of
from adapterkit.deltas import LowRank, Magnitude, Reshape, Scaling, TLora, Vera
from adapterkit.deltas.strength import at_strength
from adapterkit.errors import Unrepresentable, UsageError
from adapterkit.selection import Module
from adapterkit.specs.families import Family, Place, family
from adapterkit.specs.names import Piece
from adapterkit.strengths import Strengths, at_strengths, parse_strengths

NOT_LINEAR = {"set", "oft", "boft", "oft_input", "oft_embedding", "boft_input", "tokens", "magnitude"}
ATTENTION = "transformer_blocks.0.attn2.to_q"


def one(name: str) -> Family:
    return family(name)[0]


def in_block(owner: Family, label: str) -> Module:
    """Some module of the block."""
    blocks = blocks_of(owner)
    assert blocks is not None
    for component, its_network in owner.components.items():
        if blocks.components.get(component) == label:
            return Module(component, "text_model.encoder.layers.0.mlp.fc1")
        if its_network in blocks.networks:
            for module, block in blocks.by_module(its_network).items():
                if block == label:
                    return Module(component, module)
    raise AssertionError(label)


# --- changes at a strength


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strength", [0.5, -2.0, 0.3])
def test_the_delta_is_so_many_times_what_it_was(name: str, strength: float) -> None:
    case = CASES[name]()
    if case.change.kind in NOT_LINEAR:
        with pytest.raises(Unrepresentable, match="not linear") as caught:
            at_strength(case.change, strength)
        assert caught.value.hint
        return
    scaled = at_strength(case.change, strength)
    assert scaled is not None
    expected = strength * case.change.dense(case.base, torch.float64)
    found = scaled.dense(case.base, torch.float64)
    if strength in (0.5, -2.0) and not isinstance(case.change, Scaling):
        assert torch.equal(found, expected)
    assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_strength_one_is_the_change_itself_and_zero_is_none(name: str) -> None:
    change = CASES[name]().change
    assert at_strength(change, 1.0) is change
    assert at_strength(change, 0.0) is None


def test_no_tensor_is_touched_where_there_is_a_scale() -> None:
    for name in CASES:
        change = CASES[name]().change
        if change.kind in NOT_LINEAR or isinstance(change, Scaling | Vera):
            continue
        scaled = at_strength(change, 0.3)
        assert scaled is not None
        before, after = change.tensors(), scaled.tensors()
        assert all(before[role] is after[role] for role in before)


def test_a_widened_base_stays_so_wide() -> None:
    change = Reshape(torch.tensor([4, 6]))
    assert at_strength(change, 0.5) is change


def test_what_cannot_be_computed_can_be_scaled() -> None:
    change = TLora(torch.ones(4, 2), torch.ones(2, 3), torch.ones(2), scale=0.5)
    scaled = at_strength(change, 0.5)
    assert isinstance(scaled, TLora) and scaled.scale == 0.25


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_is_a_finite_number(strength: float) -> None:
    with pytest.raises(UsageError, match="is no number"):
        at_strength(LowRank(torch.ones(2, 1), torch.ones(1, 2)), strength)


# --- strengths as people write them

# Presets of sd-webui-lora-block-weight (DEF_WEIGHT_PRESET) and Inspire Pack (lbw-preset.txt).
SEVENTEEN = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "MIDD0.2": "1,0,0,0,0,0,0.2,0.4,0.4,0.2,0,0,0,0,0,0,0",
    "MIDD0.8": "1,0,0,0,0,0.5,0.8,0.8,0.4,0,0,0,0,0,0,0,0",
    "MOUT": "1,0,0,0,0,0,1,1,1,1,1,1,1,1,0.5,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": "0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5",
}
TWELVE = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1",
    "INALL": "1,1,1,1,1,0,0,0,0,0,0,0",
    "MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0",
    "OUTALL": "1,0,0,0,0,0,1,1,1,1,1,1",
    "INS": "1,1,1,0,0,0,0,0,0,0,0,0",
    "MID": "1,0,0,0,0,1,0,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,1,1,1,0,0,0",
}


@pytest.mark.parametrize(
    "name, preset, weights",
    [
        *(("sd1", preset, weights) for preset, weights in SEVENTEEN.items()),
        *(("sd2", preset, weights) for preset, weights in SEVENTEEN.items()),
        *(("sdxl", preset, weights) for preset, weights in TWELVE.items()),
        ("flux1", "FLUXALL", ",".join(["1"] * 61)),
    ],
)
def test_a_preset_is_what_the_community_means_by_it(name: str, preset: str, weights: str) -> None:
    owner, numbers = one(name), [float(number) for number in weights.split(",")]
    blocks = blocks_of(owner)
    assert blocks is not None
    order = blocks.order(len(numbers))
    assert order is not None
    strengths = parse_strengths(preset, owner)
    assert [strengths.of(in_block(owner, label)) for label in order] == numbers


def test_a_list_is_read_by_its_length_and_what_it_lacks_gets_zero() -> None:
    owner = one("sdxl")
    strengths = parse_strengths("1,0.5,0.25,0,-1,2,1,1,1,1,1,0.75", owner)
    expected = {"BASE": 1, "IN04": 0.5, "IN05": 0.25, "IN07": 0, "IN08": -1, "M00": 2, "OUT05": 0.75}
    expected |= {"IN01": 0, "OUT08": 0}
    assert {label: strengths.of(in_block(owner, label)) for label in expected} == expected


@pytest.mark.parametrize(
    "text, component, name, expected",
    [
        ("", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 1.0),
        ("0.5", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 0.5),
        ("0.5", "text_encoder", "text_model.encoder.layers.0.mlp.fc1", 0.5),
        ("IN04=0.5", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 0.5),
        ("IN04=0.5", "unet", f"down_blocks.1.attentions.1.{ATTENTION}", 1.0),
        ("IN*=0.5", "unet", f"down_blocks.1.attentions.1.{ATTENTION}", 0.5),
        ("IN07-IN04=0.5", "unet", f"down_blocks.1.attentions.1.{ATTENTION}", 0.5),
        ("IN07-OUT08=0.5", "unet", f"down_blocks.1.attentions.1.{ATTENTION}", 1.0),
        ("*.attn2.*=0.5", "unet", f"mid_block.attentions.0.{ATTENTION}", 0.5),
        ("*.attn1.*=0.5", "unet", f"mid_block.attentions.0.{ATTENTION}", 1.0),
        ("mid_block=0.5", "unet", f"mid_block.attentions.0.{ATTENTION}", 0.5),
        ("unet.mid_block.*=0.5", "unet", f"mid_block.attentions.0.{ATTENTION}", 0.5),
        ("input_blocks.4=0.5", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 0.5),
        ("text_encoder=0", "text_encoder", "text_model.encoder.layers.0.mlp.fc1", 0.0),
        ("text_encoder=0", "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", 1.0),
        ("text_encoder*=0", "text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", 0.0),
        ("IN04=0.5, IN*=0.25", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 0.25),
        ("IN*=0.25,IN04=-0.5", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", -0.5),
        ("ALL0.5,M00=2", "unet", f"mid_block.attentions.0.{ATTENTION}", 2.0),
        ("ALL0.5,M00=2", "unet", f"down_blocks.1.attentions.0.{ATTENTION}", 0.5),
    ],
)
def test_a_strength_is_that_of_the_last_entry_that_means_the_module(
    text: str, component: str, name: str, expected: float
) -> None:
    assert parse_strengths(text, one("sdxl")).of(Module(component, name)) == expected


def test_one_tensor_of_a_module_can_be_meant() -> None:
    strengths = parse_strengths("*.bias=0", one("sd1"))
    assert strengths.of(Module("unet", "conv_in", "bias")) == 0.0
    assert strengths.of(Module("unet", "conv_in", "weight")) == 1.0


def test_names_of_a_model_without_a_table_are_taken_as_they_are() -> None:
    strengths = parse_strengths("layers.1=0.5,*.mlp.*=0", one("transformers"))
    assert strengths.of(Module("model", "model.layers.1.self_attn.q_proj")) == 0.5
    assert strengths.of(Module("model", "model.layers.10.self_attn.q_proj")) == 1.0
    assert strengths.of(Module("model", "model.layers.1.mlp.up_proj")) == 0.0


@pytest.mark.parametrize(
    "name, text, message, hint",
    [
        ("sdxl", "in04=1", "`in04` matches nothing", "`IN04`"),
        ("sdxl", "OUTDD", "`OUTDD` matches nothing", "`OUTD`"),
        ("sdxl", "text_encodr=1", "`text_encodr` matches nothing", "`text_encoder`"),
        ("sdxl", "down_blocks.7=1", "`down_blocks.7` matches nothing", "`down_blocks.2`"),
        ("sdxl", "1,1,1", "3 numbers are no list", "give 20 .* or 12 "),
        ("flux1", "1,1", "2 numbers are no list", "give 61 "),
        ("transformers", "1,1", "2 numbers are no list", "no lists are known"),
        ("sdxl", "IN04=much", "`much` in `IN04=much` is not a number", "NAME=NUMBER"),
        ("sdxl", "IN04=1,0.5", "`0.5` stands alone", "numbers only"),
        ("sdxl", "IN04=nan", "is no number", "finite"),
        ("sdxl", "inf", "is no number", "finite"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_way_on(
    name: str, text: str, message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_strengths(text, one(name))
    assert re.search(hint, caught.value.hint), caught.value.hint


# --- places that hold several modules

QKV = Place(
    "transformer", tuple(Piece(f"transformer_blocks.0.attn.to_{letter}") for letter in "qkv"), "weight"
)


def test_a_place_whose_parts_agree_has_one_strength() -> None:
    assert parse_strengths("D00=0.5", one("flux1")).at(QKV) == 0.5
    with pytest.raises(Unrepresentable, match="strengths of their own") as caught:
        parse_strengths("*.to_q=0.5", one("flux1")).at(QKV)
    assert "diffusers" in caught.value.hint


def test_a_fused_tensor_is_cut_where_its_parts_differ() -> None:
    change = LowRank(numbers(12, 2, seed=1), numbers(2, 6, seed=2))
    found = at_strengths({QKV: (change,)}, parse_strengths("*.to_q=0.5,*.to_v=0", one("flux1")), {})
    assert [place.span for place in found] == [QKV.span[:1], QKV.span[1:2]]
    whole = change.dense(dtype=torch.float64)
    parts = [one.dense(dtype=torch.float64) for (one,) in found.values()]
    assert torch.equal(parts[0], 0.5 * whole[:4])
    assert torch.equal(parts[1], whole[4:8])


def test_a_place_is_not_touched_where_nothing_is_asked_of_it() -> None:
    change = LowRank(numbers(12, 2, seed=1), numbers(2, 6, seed=2))
    assert at_strengths({QKV: (change,)}, Strengths(), {}) == {QKV: (change,)}


def test_what_cannot_be_scaled_says_where_it_is() -> None:
    inner = LowRank(numbers(12, 2, seed=1), numbers(2, 6, seed=2))
    changes = {QKV: (Magnitude(inner, torch.ones(12)),)}
    with pytest.raises(Unrepresentable, match=r"^`the_name`: DoRA"):
        at_strengths(changes, parse_strengths("0.5", one("flux1")), {QKV: "the_name"})
