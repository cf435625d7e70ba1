"""What a file is: the family, the layout, and the rows each of its names means.

Every sample is written as its writers write it, in the widths of the real model (the tensors are one number,
expanded), and what it means stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from adapters import File, converted
from samples import FLUX_Q, SAMPLES, SD_FLAT, ZERO, D, kohya, peft
from torch import Tensor

from adapterkit.adapter import read_adapter
from adapterkit.detect import Explanation, explain
from adapterkit.errors import Ambiguous, Conflict, Refused, Unrecognized
from adapterkit.operations.convert import plan_conversion
from adapterkit.operations.inspect import inspect
from adapterkit.specs.families import family
from adapterkit.specs.layouts import layouts
from adapterkit.stores import open_store

KEY = "ss_base_model_version"


def meanings(explanation: Explanation) -> set[tuple[str, str]]:
    return {
        (entry.place.component, "+".join(piece.module for piece in entry.place.span))
        for entry in explanation.entries
    }


def check_explained(explanation: Explanation) -> None:
    assert explanation.share == 1.0
    assert explanation.unclaimed == () and explanation.incomplete == ()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_is_explained_in_full_by_what_wrote_it(name: str) -> None:
    sample = SAMPLES[name]
    found = sample.explain()
    check_explained(found)
    assert (found.family.key, found.layouts) == (sample.family, (sample.layout,))
    assert meanings(found) == sample.means


@pytest.mark.parametrize("name", SAMPLES)
def test_every_tensor_is_accounted_for_once(name: str) -> None:
    found = SAMPLES[name].explain()
    keys = [key for entry in found.entries for key in entry.keys] + list(found.passengers)
    assert sorted(keys) == sorted(SAMPLES[name].tensors)
    adapter = read_adapter(File(SAMPLES[name].tensors).store())
    assert adapter.receipt.balances and not adapter.receipt.dropped


PLAIN = [name for name in SAMPLES if not name.startswith(("wrapped", "an adapter's name"))]


@pytest.mark.parametrize("name", PLAIN)
def test_one_layout_of_the_family_and_no_other_knows_every_key(name: str) -> None:
    sample = SAMPLES[name]
    (owner,) = {f.name: f for f in family(sample.family)}.values()
    assert [layout for layout in owner.spelling if _knows(layout, owner.key, sample.tensors)] == [
        sample.layout
    ]


def _knows(name: str, family_name: str, keys: Mapping[str, Tensor]) -> bool:
    layout, owner = layouts()[name], family(family_name)[0]
    for key in keys:
        parted = layout.split(key)
        known = parted is not None and owner.locate(name, layout.dot, parted[0])
        bare = layout.bare and owner.locate(name, layout.dot, key)
        if not (known or bare or layout.passenger(key)):
            return False
    return True


def test_names_in_slots_and_wrappers_are_reported() -> None:
    assert SAMPLES["an adapter's name: another"].explain().adapter_names == ("lightx2v_t1",)
    assert SAMPLES["diffusers"].explain().adapter_names == ()
    assert SAMPLES["wrapped: module."].explain().stripped == 2
    assert SAMPLES["diffusers"].explain().stripped == 0


def test_wrappers_and_metadata_that_names_another_base_are_problems() -> None:
    """Chroma has FLUX.1's blocks, so only the metadata tells."""
    wrapped = SAMPLES["wrapped: module."].tensors
    assert [problem.code for problem in inspect(wrapped).problems] == ["wrapped"]
    found = {
        base: [p.code for p in inspect(File(SAMPLES["diffusers"].tensors, {KEY: base}).store()).problems]
        for base in ("flux1", "chroma", "")
    }
    assert found == {"flux1": [], "chroma": ["other-base"], "": []}


def test_embeddings_travel_along() -> None:
    found = SAMPLES["AUTOMATIC1111, with a scale and an embedding"].explain()
    assert list(found.passengers) == ["bundle_emb.cat.string_to_param.*"]
    assert set(SAMPLES["attention processors under no prefix, from Replicate"].explain().passengers) == {
        "text_encoders_0",
        "text_encoders_1",
    }


def test_a_list_of_ups_and_downs_is_read_by_their_numbers(tmp_path: Path) -> None:
    """cloneofsimo's .pt is a bare list; shapes prove the order: the sixth module reads the text."""
    sides = [(320, 320)] * 4 + [(2560, 320), (320, 320), (320, 768), (320, 768), (320, 320)]
    torch.save(
        [t for rows, columns in sides for t in (torch.ones(rows, 4), torch.ones(4, columns))],
        tmp_path / "a.pt",
    )
    with open_store(tmp_path / "a.pt") as store:
        found = explain(store)
        check_explained(found)
        assert (found.family.key, found.layouts, found.shapes) == ("sd1", ("cloneofsimo",), 1.0)
        assert len(read_adapter(store, found)) == 9


# --- files of several kinds, in part, or of nobody --------------------------------------------------


def test_a_file_in_two_layouts_is_explained_by_both() -> None:
    tensors = kohya("lora_unet_single_blocks_0_linear2", 3072, 15360) | peft(f"transformer.{D}", 3072, 3072)
    found = explain(File(tensors).store())
    check_explained(found)
    assert set(found.layouts) == {"kohya", "diffusers"}
    assert meanings(found) == {FLUX_Q, ("transformer", "single_transformer_blocks.0.proj_out")}
    after = converted(File(tensors), None, "omi")
    assert {key.partition(".lora")[0] for key in after.tensors if "lora_up" in key} == {
        "transformer.double_blocks.0.img_attn.qkv.0",
        "transformer.single_blocks.0.linear2",
    }


def test_one_module_twice_is_a_conflict() -> None:
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072) | peft(
        f"transformer.{D}", 3072, 3072
    )
    with pytest.raises(Conflict) as caught:
        read_adapter(File(tensors).store())
    assert caught.value.code == "duplicate-module"
    assert all(name in caught.value.message for name in ("lora_unet_double_blocks_0_img_attn_qkv", D))


def test_a_part_of_a_file_is_explained_and_its_loose_ends_are_named() -> None:
    loose = f"transformer.{D.replace('to_q', 'to_k')}.lora_A.weight"
    tensors = peft(f"transformer.{D}", 3072, 3072) | {loose: ZERO.expand(4, 3072)}
    found = explain(File(tensors).store())
    assert [incomplete.keys for incomplete in found.incomplete] == [(loose,)]
    with pytest.raises(Refused, match="make no whole change") as caught:
        read_adapter(File(tensors).store())
    assert caught.value.code == "incomplete" and "--allow incomplete" in caught.value.hint
    adapter = read_adapter(File(tensors).store(), allow=["incomplete"])
    assert adapter.receipt.dropped == {loose: "incomplete"} and adapter.receipt.balances


def test_an_alpha_alone_is_no_change() -> None:
    alone = f"{SD_FLAT}_to_v.alpha"
    found = explain(File(kohya(f"{SD_FLAT}_to_k", 320, 768) | {alone: torch.tensor(1.0)}).store())
    assert [incomplete.keys for incomplete in found.incomplete] == [(alone,)]


def test_what_a_table_does_not_know_is_unclaimed_and_refused() -> None:
    strange = kohya("lora_unet_no_such_block", 320, 320)
    tensors = strange
    for block in range(4):
        tensors = tensors | kohya(f"lora_unet_single_blocks_{block}_linear2", 3072, 15360)
    found = explain(File(tensors).store())
    assert found.family.key == "flux1" and set(found.unclaimed) == set(strange)
    with pytest.raises(Refused) as caught:
        read_adapter(File(tensors).store())
    assert caught.value.code == "unclaimed" and "--allow unclaimed" in caught.value.hint
    adapter = read_adapter(File(tensors).store(), allow=["unclaimed"])
    assert set(adapter.receipt.dropped) == set(strange) and adapter.receipt.balances


def double_block(width: int, mlp: tuple[str, str]) -> dict[str, Tensor]:
    """One stream of a block as kohya names FLUX.2's (mlp 6 widths up, 3 down) and HunyuanVideo's."""
    stem = "lora_unet_double_blocks_0_img"
    tensors = kohya(f"{stem}_attn_qkv", 3 * width, width) | kohya(f"{stem}_attn_proj", width, width)
    up, down = (4 * width, 4 * width) if mlp[0].startswith("fc") else (6 * width, 3 * width)
    tensors |= kohya(f"{stem}_mlp_{mlp[0]}", up, width) | kohya(f"{stem}_mlp_{mlp[1]}", width, down)
    linear1 = 7 if mlp[0].startswith("fc") else 9
    return tensors | kohya("lora_unet_single_blocks_0_linear1", linear1 * width, width)


RELATIVES: dict[str, dict[str, Tensor]] = {
    "FLUX.2 klein 9B: all of FLUX.1's names, none of its sizes": double_block(4096, ("0", "2")),
    "FLUX.2 klein 4B: all of FLUX.1's names, some of its sizes": double_block(3072, ("0", "2")),
    "HunyuanVideo: some of FLUX.1's names, in its sizes": double_block(3072, ("fc1", "fc2")),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_of_a_known_model_is_not_taken_for_it(name: str) -> None:
    with pytest.raises(Unrecognized):
        explain(File(RELATIVES[name]).store())
    assert explain(File(RELATIVES[name]).store(), family_name="flux1").family.key == "flux1"


def test_a_relative_in_dotted_names_is_a_model_without_a_table() -> None:
    stem = "diffusion_model.double_blocks.0.img_attn"
    tensors = peft(f"{stem}.qkv", 18432, 6144) | peft(f"{stem}.proj", 6144, 6144)
    assert explain(File(tensors).store()).family.key == "diffusers"


UNKNOWN = {
    "a flattened name of an unknown model": kohya("lora_unet_blocks_0_cross_attn_k", 64, 64),
    "a flattened name of an unknown part": kohya("lora_prior_unet_down_blocks_0_x", 64, 64),
    "names without a change": {"foo.weight": torch.zeros(3)},
    "a checkpoint of a UNet": {"model.diffusion_model.input_blocks.0.0.weight": ZERO.expand(320, 4, 3, 3)},
    "a checkpoint of an unknown model": {f"blocks.{n}.norm.weight": torch.zeros(3) for n in range(4)},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nothing_explains_is_said_to_be_so(name: str) -> None:
    with pytest.raises(Unrecognized) as caught:
        explain(File(UNKNOWN[name]).store())
    assert caught.value.hint and next(iter(UNKNOWN[name])) in caught.value.message


# --- more than one answer ---------------------------------------------------------------------------

CLIP_L_ALONE = {
    key: tensor
    for n in range(12)
    for x in "qkv"
    for key, tensor in kohya(f"lora_te1_text_model_encoder_layers_{n}_self_attn_{x}_proj", 768, 768).items()
}


def test_a_text_encoder_alone_may_belong_to_several_models() -> None:
    found = explain(File(CLIP_L_ALONE).store())
    check_explained(found)
    everyone = {found.family.name, *(other.family.name for other in found.equals)}
    assert everyone == {"flux1", "sd1", "sd3", "sdxl"}


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "peft", "omi"])
def test_where_all_would_write_the_same_nothing_is_ambiguous(to: str) -> None:
    assert len(plan_conversion(CLIP_L_ALONE, to).modules) == 36


@pytest.mark.parametrize("to, others", [("kohya", {"sd1"}), ("bfl", {"sd1", "sd3", "sdxl"})])
def test_where_one_would_write_something_else_the_user_decides(to: str, others: set[str]) -> None:
    """Stable Diffusion 1 has but one text encoder, `lora_te_`; only FLUX.1 has BFL's format."""
    with pytest.raises(Ambiguous) as caught:
        plan_conversion(CLIP_L_ALONE, to)
    assert "--family" in caught.value.hint
    assert set(caught.value.details["families"]) == others | {"flux1"}  # type: ignore[arg-type]


def test_shapes_that_decide_nothing_leave_it_to_the_user_or_the_metadata() -> None:
    tensors = kohya("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", 1280, 1280)
    found = explain(File(tensors).store())
    assert {found.family.name, *(other.family.name for other in found.equals)} == {"sd1", "sd2", "sdxl"}
    told = explain(File(tensors, {"ss_base_model_version": "sd_v2"}).store())
    assert told.family.name == "sd2" and not told.equals
    asked = explain(File(tensors).store(), family_name="sd2")
    assert asked.family.name == "sd2" and not asked.equals


def test_metadata_decides_nothing_against_shapes() -> None:
    wrong = SAMPLES["kohya, SD 1"].tensors
    assert explain(File(wrong, {"ss_base_model_version": "sd_v2"}).store()).family.name == "sd1"


@pytest.mark.parametrize("name", ["SD 3 medium", "SD 3.5 large"])
def test_sizes_of_one_model_are_not_ambiguous(name: str) -> None:
    assert SAMPLES[name].explain().equals == ()
