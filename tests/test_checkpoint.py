"""A base model's tensors are found by the rows they hold, whatever file and naming they lie in."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import models
import pytest
import torch
from checkpoints import (
    SINGLE,
    Tensors,
    full_size,
    renamed,
    save_folder,
    save_shards,
    stored_shape,
    tensors_of,
)
from safetensors.torch import save_file

from adapterkit.checkpoint import Checkpoint, open_checkpoint
from adapterkit.errors import Ambiguous, Mismatch, StoreError, Unrecognized, UsageError
from adapterkit.specs.families import families
from adapterkit.specs.names import Piece

UNET = models.sd1_unet().state_dict()
CLIP = models.clip_l().state_dict()
FLUX = models.flux_transformer().state_dict()
Q = "transformer_blocks.0.attn.to_q"


def weight(model: Checkpoint, module: str, component: str = "unet", param: str = "weight") -> torch.Tensor:
    found = model.tensor(component, (Piece(module),), param)
    assert found is not None, module
    return found


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_is_known_by_its_names_and_sizes(name: str) -> None:
    tensors = full_size(name)
    model = open_checkpoint(tensors)
    assert name in (model.family.name, model.family.key)
    assert set(model.components) == {component for component, _ in SINGLE[name].values()}
    assert not model.unknown


@pytest.mark.parametrize("name", SINGLE)
def test_every_naming_finds_all_of_its_tensors_in_any_file(name: str) -> None:
    model = open_checkpoint(full_size(name))
    for component in model.components:
        network = model.family.network(component)
        assert network is not None
        for naming in network.namings.values():
            if naming.partial:
                continue
            for native, row, param in tensors_of(network, naming.name):
                expected = stored_shape(network, row, param)
                assert model.shape(component, row.span, param) == expected, (naming.name, native)


@pytest.mark.parametrize("known", [f for f in families() if not f.open], ids=lambda family: family.key)
def test_the_names_that_checkpoints_are_said_to_have_exist(known: object) -> None:
    for prefix in known.checkpoint:  # type: ignore[attr-defined]
        assert known.names(prefix.component, prefix.naming)  # type: ignore[attr-defined]


def test_what_the_file_has_on_the_lines_that_are_wanted_is_handed_out_as_it_lies_there() -> None:
    model = open_checkpoint(UNET)
    assert weight(model, "conv_in").data_ptr() == UNET["conv_in.weight"].data_ptr()
    fused = renamed(FLUX, "flux1", "", "transformer", "bfl")
    piece = weight(open_checkpoint(fused), Q, "transformer")
    whole = fused["double_blocks.0.img_attn.qkv.weight"]
    assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert torch.equal(piece, FLUX[f"{Q}.weight"])


def test_a_stack_is_put_together_from_its_parts_and_cut_by_rows() -> None:
    model = open_checkpoint(FLUX)
    span = tuple(Piece(f"transformer_blocks.0.attn.to_{x}") for x in "qkv")
    parts = [FLUX[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"]
    fused = model.tensor("transformer", span, "weight")
    assert fused is not None and torch.equal(fused, torch.cat(parts))
    rows = model.tensor("transformer", span, "weight", rows=(50, 150))
    assert rows is not None and torch.equal(rows, torch.cat(parts)[50:150])
    assert len(model.keys("transformer", span, "weight")) == 3
    with pytest.raises(UsageError):
        model.tensor("transformer", span, "weight", rows=(0, 1000))


def test_rows_of_one_tensor_that_follow_on_from_each_other_stay_together() -> None:
    fused = renamed(FLUX, "flux1", "", "transformer", "bfl")
    model = open_checkpoint(fused)
    span = tuple(Piece(f"transformer_blocks.0.attn.to_{x}") for x in "qk")
    found = model.tensor("transformer", span, "weight")
    assert found is not None
    whole = fused["double_blocks.0.img_attn.qkv.weight"]
    assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_swapped_halves_and_transposed_tensors_come_back() -> None:
    fused = renamed(FLUX, "flux1", "model.diffusion_model.", "transformer", "bfl")
    assert torch.equal(
        weight(open_checkpoint(fused), "norm_out.linear", "transformer"), FLUX["norm_out.linear.weight"]
    )
    clip = models.clip_g().state_dict()
    openclip = renamed(clip, "sdxl", "", "text_encoder_2", "openclip")
    assert torch.equal(openclip["text_projection"], clip["text_projection.weight"].T)
    back = renamed(openclip, "sdxl", "", "text_encoder_2", "hf")
    assert all(torch.equal(back[key], clip[key]) for key in back)


def test_a_half_of_a_module_is_its_rows() -> None:
    piece = Piece("norm_out.linear", Fraction(1, 2), Fraction(1))
    found = open_checkpoint(FLUX).tensor("transformer", (piece,), "weight")
    whole = FLUX["norm_out.linear.weight"]
    assert found is not None and torch.equal(found, whole[whole.shape[0] // 2 :])


def test_rows_that_are_missing_are_none() -> None:
    partial = {key: tensor for key, tensor in FLUX.items() if not key.startswith(f"{Q}.")}
    model = open_checkpoint(partial)
    span = tuple(Piece(f"transformer_blocks.0.attn.to_{x}") for x in "qkv")
    assert model.tensor("transformer", span, "weight") is None
    assert model.shape("transformer", span, "weight") is None
    assert model.keys("transformer", span, "weight") == ()
    assert model.tensor("text_encoder", (Piece("shared"),), "weight") is None


def test_parts_that_do_not_fit_on_each_other_are_refused() -> None:
    odd = dict(FLUX)
    odd[f"{Q}.weight"] = odd[f"{Q}.weight"][:, :-1]
    span = tuple(Piece(f"transformer_blocks.0.attn.to_{x}") for x in "qkv")
    with pytest.raises(Mismatch):
        open_checkpoint(odd).tensor("transformer", span, "weight")


def test_tensors_that_no_table_has_are_unknown_and_nothing_else_is() -> None:
    vae = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "model_ema.decay": torch.ones(()),
    }
    single = renamed(UNET, "sd1", "model.diffusion_model.", "unet", "ldm") | vae
    assert open_checkpoint(single).unknown == tuple(vae)


def pipeline(folder: Path) -> Path:
    save_folder(
        folder / "unet", "diffusion_pytorch_model.safetensors", UNET, {"_class_name": "UNet2DConditionModel"}
    )
    save_folder(folder / "text_encoder", "model.safetensors", CLIP, {"architectures": ["CLIPTextModel"]})
    (folder / "model_index.json").write_text("{}", "utf-8")
    return folder


def test_a_folder_of_diffusers_is_one_model(tmp_path: Path) -> None:
    with open_checkpoint(pipeline(tmp_path)) as model:
        assert model.family.name == "sd1"
        assert model.components == ("unet", "text_encoder")
        assert torch.equal(weight(model, "conv_in"), UNET["conv_in.weight"])


def test_the_plain_file_is_read_and_what_stands_beside_it_is_said(tmp_path: Path) -> None:
    folder = pipeline(tmp_path) / "unet"
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
        save_file({"x": torch.zeros(1)}, folder / name)
    with open_checkpoint(tmp_path) as model:
        assert len(model.store.warnings) == 1
        assert "fp16" in model.store.warnings[0] and "non_ema" in model.store.warnings[0]
        assert torch.equal(weight(model, "conv_in"), UNET["conv_in.weight"])


def test_a_single_variant_is_read_and_several_are_asked_about(tmp_path: Path) -> None:
    save_folder(tmp_path / "unet", "diffusion_pytorch_model.fp16.safetensors", UNET, {})
    assert open_checkpoint(tmp_path / "unet").family.name == "sd1"
    save_folder(tmp_path / "unet", "diffusion_pytorch_model.ema.safetensors", UNET, {})
    with pytest.raises(StoreError) as caught:
        open_checkpoint(tmp_path / "unet")
    assert caught.value.code == "several"


def test_shards_are_one_model(tmp_path: Path) -> None:
    save_shards(tmp_path, "diffusion_pytorch_model", UNET)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with open_checkpoint(tmp_path) as model:
        assert len(model.held) == len(UNET)
        assert torch.equal(weight(model, "conv_out"), UNET["conv_out.weight"])


def test_an_old_pickled_checkpoint_is_read_without_its_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(
        {"state_dict": renamed(UNET, "sd1", "model.diffusion_model.", "unet", "ldm"), "epoch": 3}, path
    )
    with open_checkpoint(path) as model:
        assert model.family.name == "sd1"
        assert torch.equal(weight(model, "conv_in"), UNET["conv_in.weight"])


def test_a_part_that_several_models_have_needs_a_word() -> None:
    with pytest.raises(Ambiguous) as caught:
        open_checkpoint(CLIP)
    assert "--family" in caught.value.hint
    assert open_checkpoint(CLIP, "sdxl").components == ("text_encoder",)
    assert open_checkpoint(models.clip_g().state_dict(), "sdxl").components == ("text_encoder_2",)


def test_a_relative_of_a_model_is_not_taken_for_it() -> None:
    # Chroma is FLUX.1 without the layers of its modulation.
    chroma = {
        key: tensor
        for key, tensor in full_size("flux1", {"": ("transformer", "bfl")}).items()
        if "_mod." not in key and "modulation" not in key
    }
    with pytest.raises(Unrecognized) as caught:
        open_checkpoint(chroma)
    assert "flux1" in caught.value.message


@pytest.mark.parametrize("name", ["kohya, SD 1", "PEFT, Llama"])
def test_an_adapter_is_called_one(name: str) -> None:
    stem = (
        "lora_unet_mid_block_attentions_0_proj_in"
        if "kohya" in name
        else "base_model.model.model.layers.0.q_proj"
    )
    down, up = ("lora_down", "lora_up") if "kohya" in name else ("lora_A", "lora_B")
    tensors = {f"{stem}.{down}.weight": torch.zeros(4, 32), f"{stem}.{up}.weight": torch.zeros(32, 4)}
    if "PEFT" in name:
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(5, 32)
    with pytest.raises(Unrecognized) as caught:
        open_checkpoint(tensors)
    assert "an adapter, not a base model" in caught.value.message


@pytest.mark.parametrize("tensors", [{}, {"a.b.weight": torch.zeros(2, 2)}])
def test_what_is_no_model_is_not_recognized(tensors: Tensors) -> None:
    with pytest.raises(Unrecognized):
        open_checkpoint(tensors)


@pytest.mark.parametrize("build", [models.llama, models.qwen3, models.mixtral, models.gpt2, models.bert])
def test_a_language_model_keeps_its_own_names(build: object) -> None:
    tensors = build().state_dict()  # type: ignore[operator]
    model = open_checkpoint(tensors)
    assert model.family.name == "transformers" and not model.unknown
    assert {place.param for place in model.places()} <= {"weight", "bias", ""}


def test_a_model_without_a_table_is_known_by_its_configuration(tmp_path: Path) -> None:
    save_folder(
        tmp_path, "diffusion_pytorch_model.safetensors", {"a.weight": torch.ones(2, 2)}, {"_class_name": "X"}
    )
    assert open_checkpoint(tmp_path).family.name == "diffusers"
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}), "utf-8")
    assert open_checkpoint(tmp_path).family.name == "transformers"


def test_weights_that_are_kept_as_in_by_out_are_turned() -> None:
    tensors = models.gpt2().state_dict()
    model = open_checkpoint(tensors)
    name = "transformer.h.0.attn.c_attn"
    assert torch.equal(weight(model, name, "model"), tensors[f"{name}.weight"].T)
    # GPT-BigCode has linear layers of the same name.
    linear = {
        k: t.T.contiguous() if k.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else t
        for k, t in tensors.items()
    }
    assert torch.equal(weight(open_checkpoint(linear), name, "model"), linear[f"{name}.weight"])
