"""Base models for tests: small real ones, and the same written in other namings by the tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.checkpoint import open_checkpoint
from adapterkit.errors import Json
from adapterkit.specs.families import Family, family
from adapterkit.specs.names import Network, Row

Tensors = dict[str, Tensor]

# Real single files: prefix -> (component, naming).
SINGLE = {
    "sd1": {
        "model.diffusion_model.": ("unet", "ldm"),
        "cond_stage_model.transformer.": ("text_encoder", "hf"),
    },
    "sd2": {
        "model.diffusion_model.": ("unet", "ldm"),
        "cond_stage_model.model.": ("text_encoder", "openclip"),
    },
    "sdxl": {
        "model.diffusion_model.": ("unet", "ldm"),
        "conditioner.embedders.0.transformer.": ("text_encoder", "hf"),
        "conditioner.embedders.1.model.": ("text_encoder_2", "openclip"),
    },
    "sdxl_refiner": {
        "model.diffusion_model.": ("unet", "ldm"),
        "conditioner.embedders.0.model.": ("text_encoder_2", "openclip"),
    },
    "flux1": {
        "model.diffusion_model.": ("transformer", "bfl"),
        "text_encoders.clip_l.transformer.": ("text_encoder", "hf"),
    },
    "SD 3 medium": {
        "model.diffusion_model.": ("transformer", "mmdit"),
        "text_encoders.clip_g.transformer.": ("text_encoder_2", "hf"),
    },
    "SD 3.5 medium": {"model.diffusion_model.": ("transformer", "mmdit")},
    "SD 3.5 large": {"model.diffusion_model.": ("transformer", "mmdit")},
}


def tensors_of(network: Network, naming: str) -> Iterator[tuple[str, Row, str]]:
    """(native name, row, param) of every tensor that a model has in a naming."""
    for row in network.namings[naming].rows:
        if row.param is not None:
            yield row.native, row, row.param
            continue
        for param in ("weight", "bias"):
            if f"{row.span[0].module}.{param}" in network.shapes:
                yield f"{row.native}.{param}", row, param


def stored_shape(network: Network, row: Row, param: str) -> tuple[int, ...]:
    shape = network.stacked_shape(row.span)
    assert shape is not None
    if param == "bias":
        return shape[:1]
    return shape[::-1] if row.span[0].transposed else shape


def full_size(name: str, parts: Mapping[str, tuple[str, str]] | None = None) -> Tensors:
    """A single file of a family in full size; no tensor takes memory."""
    base: Family = family(name)[0]
    found = {}
    for text, (component, naming) in (parts or SINGLE[name]).items():
        network = base.network(component)
        assert network is not None
        for native, row, param in tensors_of(network, naming):
            found[text + native] = torch.zeros(1).expand(stored_shape(network, row, param))
    return found


def renamed(tensors: Mapping[str, Tensor], name: str, text: str, component: str, naming: str) -> Tensors:
    """One part of a model in another naming, behind a prefix."""
    source = open_checkpoint(tensors, name)
    network = source.family.network(component)
    assert network is not None
    found = {}
    for native, row, param in tensors_of(network, naming):
        tensor = source.tensor(component, row.span, param)
        assert tensor is not None, native
        found[text + native] = tensor.contiguous().clone()
    return found


def save_folder(folder: Path, file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Json]) -> None:
    """A folder of one part, as diffusers and transformers write it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def save_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], count: int = 3) -> None:
    """The same as so many shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    homes = {}
    for index in range(count):
        name = f"{stem}-{index + 1:05}-of-{count:05}.safetensors"
        part = dict(list(tensors.items())[index::count])
        save_file({key: tensor.contiguous() for key, tensor in part.items()}, folder / name)
        homes |= dict.fromkeys(part, name)
    index_file = folder / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": homes}), "utf-8")


def planted(
    tensors: Mapping[str, Tensor], rank: int, size: float, wanted: tuple[str, ...] = (), seed: int = 0
) -> Tensors:
    """Low-rank differences, `size` times the weight in root mean square, of names with one of `wanted`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, weight in tensors.items():
        if weight.ndim >= 2 and (not wanted or any(word in key for word in wanted)):
            o, n = weight.shape[0], weight[0].numel()
            up, down = torch.randn(o, rank, generator=generator), torch.randn(rank, n, generator=generator)
            delta = up @ down
            scale = size * weight.float().square().mean().sqrt() / delta.square().mean().sqrt()
            found[key] = (delta * scale).reshape(weight.shape)
    return found


def plus(
    tensors: Mapping[str, Tensor], deltas: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Tensors:
    """The tuned model, rounded once."""
    return {
        key: (weight.double() + deltas[key].double() if key in deltas else weight).to(dtype or weight.dtype)
        for key, weight in tensors.items()
    }
