"""Write full-shaped adapters with random weights, from the specs: material for demo and benchmarks.

    python benchmarks/make_files.py FOLDER [--rank 16]

The names and shapes are those of real trainers' files. The numbers are seeded noise of a trained
adapter's size; as in trained ones, each rank counts for less than the one before, and modules differ
in strength. `base` and `tuned` are a small language model and itself with a change of rank 8.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from adapterkit.specs.families import Family, family
from adapterkit.specs.layouts import layouts
from adapterkit.stores import TensorInfo, canonical_order, write_safetensors

# What sd-scripts trains by default: the linear layers inside attention blocks, all of the encoders'.
SDXL = ("attentions.", "transformer_blocks")
SKIPPED = ("embed", "shared", "relative_attention_bias", "text_projection")


def modules(base: Family, layout: str, keep: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """(native name with prefix, out, in) of every linear layer that a trainer would adapt."""
    for component, prefix in base.target(layout).prefixes.items():
        network = base.network(component)
        assert network is not None
        for row in network.namings[prefix.naming].rows:
            shapes = [network.weight_shape(piece.module) for piece in row.span]
            first = shapes[0]
            if row.param is not None or first is None or len(first) != 2:
                continue
            name = row.span[0].module
            if any(word in name for word in SKIPPED):
                continue
            if component in {"unet", "transformer"} and not any(word in name for word in keep):
                continue
            out = sum(shape[0] for shape in shapes if shape)
            yield prefix.text + row.native.replace(".", layouts()[layout].dot), out, first[1]


def write(
    path: Path,
    base: Family,
    rank: int,
    alpha: float,
    keep: tuple[str, ...],
    metadata: dict[str, str],
    seed: int = 0,
) -> None:
    """A kohya file in bf16: up (out, rank), down (rank, in) and alpha of each module."""
    found = list(modules(base, "kohya", keep))
    infos, shapes = [], {}
    for name, out, width in found:
        shapes[f"{name}.lora_down.weight"] = (rank, width)
        shapes[f"{name}.lora_up.weight"] = (out, rank)
        shapes[f"{name}.alpha"] = ()
    infos = canonical_order(
        [TensorInfo(key, "BF16" if shape else "F32", shape) for key, shape in shapes.items()]
    )
    generator = torch.Generator().manual_seed(seed)
    decay = 1 / torch.arange(1, rank + 1)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for info in infos:
            if not info.shape:
                yield info.name, torch.tensor(alpha)
                continue
            tensor = torch.randn(info.shape, generator=generator).mul_(0.02)
            if info.shape[1] == rank:
                tensor *= decay * torch.randn(1, generator=generator).exp()
            yield info.name, tensor.to(torch.bfloat16)

    write_safetensors(path, infos, tensors(), metadata, overwrite=True)


def write_models(folder: Path, layers: int = 4, width: int = 512, rank: int = 8) -> None:
    """A language model in bf16 with names as Llama has them, and itself with a low-rank change."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {"model.embed_tokens": (4000, width), "lm_head": (4000, width)}
    for layer in range(layers):
        front = f"model.layers.{layer}."
        shapes |= {f"{front}self_attn.{side}_proj": (width, width) for side in "qkvo"}
        shapes |= {f"{front}mlp.{side}_proj": (4 * width, width) for side in ("gate", "up")}
        shapes[f"{front}mlp.down_proj"] = (width, 4 * width)
    base = {f"{name}.weight": (noise(*shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    tuned = dict(base)
    for name, weight in base.items():
        if "layers" in name:
            change = noise(weight.shape[0], rank) @ noise(rank, weight.shape[1]) * 0.001
            tuned[name] = (weight.float() + change).bfloat16()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        infos = canonical_order([TensorInfo(key, "BF16", tuple(t.shape)) for key, t in tensors.items()])
        path = folder / name / "model.safetensors"
        write_safetensors(path, infos, ((i.name, tensors[i.name]) for i in infos), {}, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    common = {"ss_network_module": "networks.lora", "ss_output_name": "demo", "sshs_model_hash": "0" * 64}
    for name, base, keep, version, seed in (
        ("sdxl_kohya", family("sdxl")[0], SDXL, "sdxl_base_v1-0", 0),
        ("sdxl_other", family("sdxl")[0], SDXL, "sdxl_base_v1-0", 1),
        ("flux_kohya", family("flux1")[0], ("blocks",), "flux1", 0),
    ):
        write(
            arguments.folder / f"{name}.safetensors",
            base,
            arguments.rank,
            arguments.rank / 2,
            keep,
            {
                **common,
                "ss_base_model_version": version,
                "ss_network_dim": str(arguments.rank),
                "ss_network_alpha": str(arguments.rank / 2),
            },
            seed,
        )
    write_models(arguments.folder)


if __name__ == "__main__":
    main()
