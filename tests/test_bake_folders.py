"""Folders of pipelines, and bases whose weights are quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bake_cases import adapter, base_tensors, lora, model_folder, numbers
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapterkit.errors import Refused
from adapterkit.operations.bake import BakeOptions, bake

MODULE = "blocks.0.attn.to_q"


def pipeline(folder: Path) -> dict[str, Tensor]:
    """A pipeline that no table knows: two parts that adapters change, and some that they do not."""
    weights = {f"{MODULE}.weight": numbers(8, 8, seed=1), f"{MODULE}.bias": numbers(8, seed=2)}
    for part, file in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        (folder / part).mkdir(parents=True)
        save_file(weights, folder / part / f"{file}.safetensors")
        (folder / part / "config.json").write_text(json.dumps({"_class_name": part}))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    (folder / "all_in_one.safetensors").write_bytes(b"the base's weights once more")
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"and again")
    return weights


def test_a_pipeline_keeps_its_layout_and_every_other_part(tmp_path: Path) -> None:
    weights = pipeline(tmp_path / "base")
    up, down = numbers(8, 2, seed=5), numbers(2, 8, seed=6)
    front = f"transformer.{MODULE}"
    save_file({f"{front}.lora_A.weight": down, f"{front}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    done = bake(tmp_path / "base", [(tmp_path / "lora.safetensors", 0.5)], tmp_path / "out")
    after = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.allclose(after[f"{MODULE}.weight"], weights[f"{MODULE}.weight"] + 0.5 * up @ down, atol=1e-6)
    left = {"all_in_one.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors"}
    present, written = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "base", tmp_path / "out")
    )
    assert written == present - left
    assert sum("is left behind" in note for note in done.notes) == len(left)
    for name in ("vae/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer/vocab.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_a_quantised_base_is_refused_or_read_as_what_its_codes_mean(tmp_path: Path) -> None:
    tensors = base_tensors(torch.bfloat16)
    name = "model.layers.0.attn.q_proj"
    codes = tensors[f"{name}.weight"].float().div(2.0).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(2.0)}
    base = model_folder(tmp_path / "base", tensors, shards=2)
    path = adapter(tmp_path / "a", lora(1))
    with pytest.raises(Refused) as error:
        bake(base, [path], tmp_path / "out")
    assert error.value.code == "quantized"
    done = bake(base, [path], tmp_path / "out", BakeOptions(dequantize=True))
    after = {k: t for file in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(file).items()}
    assert after.keys() == tensors.keys() - {f"{name}.weight_scale"}
    front = f"base_model.model.{name}"
    added = lora(1)
    delta = 1.5 * added[f"{front}.lora_B.weight"] @ added[f"{front}.lora_A.weight"]
    assert torch.allclose(after[f"{name}.weight"].float(), codes.float() * 2.0 + delta, rtol=2**-7, atol=1e-6)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert "dequantised" in " ".join(done.notes)
