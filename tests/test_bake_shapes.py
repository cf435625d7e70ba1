"""Input layers that adapters widen, for control and inpainting, and what that does to a base."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import models
import pytest
import torch
from bake_cases import numbers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.errors import Mismatch
from adapterkit.operations.bake import BakeOptions, bake, plan_baking

pytestmark = pytest.mark.oracle
pytest.importorskip("diffusers")

INPUT, OTHER = "x_embedder", "transformer_blocks.0.attn.to_q"
RANK = 2


@cache
def flux() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in models.flux_transformer().state_dict().items()}


def factors(name: str, factor: int = 1) -> tuple[Tensor, Tensor]:
    """down and up for an input that is so many times as wide as the base's."""
    o, i = flux()[f"{name}.weight"].shape
    return numbers(RANK, factor * i, seed=len(name)), numbers(o, RANK, seed=len(name) + 1)


def silent(factor: int = 2) -> dict[str, Tensor]:
    """diffusers' way: the layer is widened without a word."""
    tensors = {}
    for name, wide in ((INPUT, factor), (OTHER, 1)):
        down, up = factors(name, wide)
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return tensors


def told(factor: int = 2) -> dict[str, Tensor]:
    """ComfyUI's way: the shape stands beside it."""
    (down, up), (o, i) = factors(INPUT, factor), flux()[f"{INPUT}.weight"].shape
    front = "lora_unet_img_in"
    return {
        f"{front}.lora_down.weight": down,
        f"{front}.lora_up.weight": up,
        f"{front}.alpha": torch.tensor(float(RANK)),
        f"{front}.reshape_weight": torch.tensor([o, factor * i]),
    }


def wide(strength: float) -> Tensor:
    """The base in the first corner of zeros, and what is added: the definition, in double."""
    (down, up), weight = factors(INPUT, 2), flux()[f"{INPUT}.weight"].double()
    return torch.cat([weight, torch.zeros_like(weight)], 1) + strength * up.double() @ down.double()


@pytest.mark.parametrize("make", [silent, told])
def test_a_wider_input_is_the_base_beside_zeros_and_the_change(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "base" / "transformer"
    folder.mkdir(parents=True)
    save_file(flux(), folder / "diffusion_pytorch_model.safetensors")
    before = flux()[f"{INPUT}.weight"].shape[1]
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": before}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model_index.json").write_text("{}")
    save_file(make(), tmp_path / "a.safetensors")
    options = BakeOptions(family="flux1")
    done = bake(tmp_path / "base", [(tmp_path / "a.safetensors", 0.7)], tmp_path / "out", options)
    after = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.allclose(after[f"{INPUT}.weight"].double(), wide(0.7), atol=1e-6)
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert written == {**config, "in_channels": 2 * before}
    assert any("padded with zeros" in note for note in done.plan.notes)
    assert all(
        torch.equal(after[name], tensor) for name, tensor in flux().items() if name[:2] not in ("x_", "tr")
    )


@pytest.mark.parametrize("make", [silent, told])
def test_an_input_is_not_widened_at_strength_0(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file(make(), tmp_path / "a.safetensors")
    done = bake(flux(), [(tmp_path / "a.safetensors", 0.0)], options=BakeOptions(family="flux1"))
    assert set(done.plan.outcomes) == {"at strength 0"}
    assert not done.plan.tensors
    assert not done.plan.edits


@pytest.mark.parametrize("make", [silent, told])
def test_two_adapters_that_widen_an_input_alike_are_summed(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file(make(), tmp_path / "a.safetensors")
    given = [(tmp_path / "a.safetensors", 0.7), (tmp_path / "a.safetensors", -0.2)]
    done = bake(flux(), given, options=BakeOptions(family="flux1"))
    assert torch.allclose(done.tensors[f"{INPUT}.weight"].double(), wide(0.5), atol=1e-6)


def test_two_widths_of_one_input_are_refused(tmp_path: Path) -> None:
    for factor in (2, 3):
        save_file(told(factor), tmp_path / f"{factor}.safetensors")
    paths = [tmp_path / f"{factor}.safetensors" for factor in (2, 3)]
    with pytest.raises(Mismatch):
        plan_baking(flux(), paths, BakeOptions(family="flux1"))


def test_an_input_does_not_get_narrower(tmp_path: Path) -> None:
    tensors = told()
    o, i = flux()[f"{INPUT}.weight"].shape
    tensors["lora_unet_img_in.reshape_weight"] = torch.tensor([o, i // 2])
    tensors["lora_unet_img_in.lora_down.weight"] = numbers(RANK, i // 2, seed=1)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(Mismatch):
        plan_baking(flux(), [tmp_path / "a.safetensors"], BakeOptions(family="flux1"))
