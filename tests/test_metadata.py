"""Metadata is carried; what a conversion makes untrue is made true again or left out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.errors import Unrepresentable
from adapterkit.operations.convert import ConvertOptions, convert
from adapterkit.operations.sources import load

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"


def lora(name: str, rank: int, alpha: float, *kernel: int) -> dict[str, Tensor]:
    ones = [1] * len(kernel)
    return {
        f"{name}.lora_up.weight": torch.randn(320, rank, *ones),
        f"{name}.lora_down.weight": torch.randn(rank, 320, *kernel),
        f"{name}.alpha": torch.tensor(alpha),
    }


def loha(name: str, rank: int, alpha: float) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {f"{name}.alpha": torch.tensor(alpha)}
    for factor in ("w1", "w2"):
        tensors[f"{name}.hada_{factor}_a"] = torch.randn(320, rank)
        tensors[f"{name}.hada_{factor}_b"] = torch.randn(rank, 320)
    return tensors


def converted(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    folder: Path,
    to: str = "kohya",
    options: ConvertOptions | None = None,
) -> dict[str, str]:
    """The metadata of the output."""
    save_file(tensors, folder / "before.safetensors", metadata)
    convert(folder / "before.safetensors", to, folder / "after.safetensors", options)
    return metadata_of(folder / "after.safetensors")


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_what_nobody_knows_is_carried_as_it_is(tmp_path: Path) -> None:
    given = {"ss_output_name": "näme", "made by": "a friend", "modelspec.title": ""}
    assert converted(lora(ATTENTION, 4, 2.0), given, tmp_path, "comfyui") == {**given, "format": "pt"}


def test_hashes_of_tensors_are_those_of_the_written_tensors(tmp_path: Path) -> None:
    """kohya writes digits, ModelSpec and LyCORIS put 0x before; kohya's older hash cannot be made again."""
    given = {
        "sshs_model_hash": "0" * 64,
        "modelspec.hash_sha256": "0x" + "0" * 64,
        "sshs_legacy_hash": "1234",
    }
    found = converted(lora(ATTENTION, 4, 2.0), given, tmp_path)
    data = (tmp_path / "after.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    digits = hashlib.sha256(data[8 + size :]).hexdigest()
    assert found == {"sshs_model_hash": digits, "modelspec.hash_sha256": f"0x{digits}", "format": "pt"}


@pytest.mark.parametrize("dim", ["4", "Dynamic", "2"])
def test_a_summary_of_ranks_stays_while_the_ranks_stay(dim: str, tmp_path: Path) -> None:
    """kohya gives the rank of linear layers, even where convolutions have another."""
    tensors = lora(ATTENTION, 4, 2.0) | lora(CONVOLUTION, 2, 1.0, 3, 3)
    found = converted(tensors, {"ss_network_dim": dim, "ss_network_alpha": "2.0"}, tmp_path)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == (dim, "2.0")


@pytest.mark.parametrize("second, dim, alpha", [(2, "4", "2"), (3, "Dynamic", "Dynamic")])
def test_a_summary_of_ranks_is_renewed_when_they_change(
    second: int, dim: str, alpha: str, tmp_path: Path
) -> None:
    """A LoHa of rank r is a LoRA of rank r²; the scale stays, so alpha grows by the same."""
    tensors = loha(ATTENTION, 2, 1.0) | loha(ATTENTION.replace("to_q", "to_k"), second, 1.0)
    given = {"ss_network_dim": "2", "ss_network_alpha": "1.0"}
    found = converted(tensors, given, tmp_path, options=ConvertOptions(as_lora=True))
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == (dim, alpha)


def test_alpha_over_rank_is_the_scale_of_a_glora_that_was_stabilised(tmp_path: Path) -> None:
    """LyCORIS keeps the alpha it was given for GLoRA alone, and an argument says what to make of it."""
    tensors = {
        f"{ATTENTION}.{role}.weight": torch.randn(*shape)
        for role, shape in {"a1": (320, 4), "a2": (4, 320), "b1": (320, 4), "b2": (4, 320)}.items()
    }
    tensors[f"{ATTENTION}.alpha"] = torch.tensor(2.0)
    given = {"ss_network_args": json.dumps({"algo": "glora", "rs_lora": True})}
    found = converted(tensors, given, tmp_path)
    assert json.loads(found["ss_network_args"]) == {"algo": "glora", "rs_lora": False}
    for name in ("before", "after"):
        (scale,) = load(tmp_path / f"{name}.safetensors").scales.values()
        assert scale.value == 1.0
    with safe_open(tmp_path / "after.safetensors", "pt") as file:
        assert float(file.get_tensor(f"{ATTENTION}.alpha")) == 4.0


def test_the_configuration_of_diffusers_goes_with_its_format_only(tmp_path: Path) -> None:
    found = converted(lora(ATTENTION, 4, 2.0), {}, tmp_path, "diffusers")
    config = json.loads(found["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 2)
    convert(tmp_path / "after.safetensors", "kohya", tmp_path / "back.safetensors")
    assert metadata_of(tmp_path / "back.safetensors") == {"format": "pt"}
    convert(tmp_path / "after.safetensors", "diffusers", tmp_path / "same.safetensors")
    again = metadata_of(tmp_path / "same.safetensors")["lora_adapter_metadata"]
    assert json.loads(again) == config


def test_magnitudes_of_some_modules_only_are_refused_where_one_switch_is_for_all(tmp_path: Path) -> None:
    tensors = lora(ATTENTION, 4, 2.0) | lora(CONVOLUTION, 2, 1.0, 3, 3)
    tensors[f"{ATTENTION}.dora_scale"] = torch.rand(320, 1)
    with pytest.raises(Unrepresentable) as refused:
        converted(tensors, {}, tmp_path, "diffusers")
    assert refused.value.code == "partial-dora"
    converted(tensors, {}, tmp_path, "comfyui")


def test_token_rows_are_refused_where_nothing_says_which_they_are(tmp_path: Path) -> None:
    model = "base_model.model.model"
    tensors = {
        f"{model}.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(4, 64),
        f"{model}.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(64, 4),
        f"{model}.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, 64),
    }
    with pytest.raises(Unrepresentable) as refused:
        convert(tensors, "peft", tmp_path / "folder")
    assert refused.value.code == "config-needed"


def test_the_change_of_a_bias_alone_is_refused_where_it_lies_in_a_lora(tmp_path: Path) -> None:
    tensors = lora(ATTENTION, 4, 2.0) | {f"{CONVOLUTION}.diff_b": torch.randn(320)}
    with pytest.raises(Unrepresentable) as refused:
        converted(tensors, {}, tmp_path, "diffusers")
    assert refused.value.code == "bias-alone"
    converted(tensors, {}, tmp_path, "comfyui")
