"""Small adapters on disk, and the command line called on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from adapterkit.cli.app import app
from adapterkit.errors import Json

QKV = "lora_unet_double_blocks_{}_img_attn_qkv"
PROJ = "lora_unet_double_blocks_{}_img_attn_proj"
# sha256 of nothing, which some trainers write for the hash of the tensors.
HASH_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def lora(name: str, out: int, width: int, alpha: float | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """A kohya LoRA of rank 2 for one module."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        f"{name}.lora_up.weight": torch.randn(out, 2, generator=generator),
        f"{name}.lora_down.weight": torch.randn(2, width, generator=generator),
    }
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(alpha)}


def flux(path: Path, *, alpha: float | None = 1.0, seed: int = 0, **metadata: str) -> Path:
    """A FLUX.1 adapter of two blocks, each with a fused weight and a plain one."""
    tensors = {}
    for block in (0, 1):
        tensors |= lora(QKV.format(block), 9216, 3072, alpha, seed + block)
        tensors |= lora(PROJ.format(block), 3072, 3072, alpha, seed + block + 7)
    save_file(tensors, path, metadata or None)
    return path


def dora(path: Path) -> Path:
    """A FLUX.1 adapter with a DoRA magnitude."""
    name = PROJ.format(0)
    save_file({**lora(name, 3072, 3072, 1.0), f"{name}.dora_scale": torch.ones(3072, 1)}, path)
    return path


def with_stranger(path: Path) -> Path:
    """A FLUX.1 adapter with one tensor that no table knows."""
    save_file({**lora(PROJ.format(0), 3072, 3072, 1.0), "odd.thing": torch.ones(3)}, path)
    return path


def unknown(path: Path, **metadata: str) -> Path:
    """Tensors that no table explains."""
    tensors = {f"stages.{stage}.mixer.kernel": torch.ones(3, 2) for stage in range(4)}
    save_file(tensors, path, metadata or None)
    return path


def web_page(path: Path) -> Path:
    path.write_text("<!doctype html><title>Log in</title>", encoding="utf-8")
    return path


def run(
    *arguments: str | Path,
    columns: int = 80,
    env: Mapping[str, str] | None = None,
    charset: str = "utf-8",
) -> Result:
    """The command line's result, with a terminal of so many columns and such an encoding."""
    runner = CliRunner(charset=charset, env={"COLUMNS": str(columns), **(env or {})})
    return runner.invoke(app, [str(argument) for argument in arguments])


def document(result: Result) -> dict[str, Json]:
    """The JSON document on stdout, which must be the only thing there."""
    found = json.loads(result.stdout)
    assert found["schema"] == 1
    return cast(dict[str, Json], found)
