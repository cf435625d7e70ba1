"""Write full-shaped adapters with random weights, from the specs: material for demo and benchmarks.

    python benchmarks/make_files.py FOLDER [--rank 16]

The names and shapes are those of real trainers' files; the numbers are seeded noise of a trained
adapter's size.
"""

from __future__ import annotations

import argparse
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
    path: Path, base: Family, rank: int, alpha: float, keep: tuple[str, ...], metadata: dict[str, str]
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
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for info in infos:
            if not info.shape:
                yield info.name, torch.tensor(alpha)
            else:
                yield info.name, torch.randn(info.shape, generator=generator).mul_(0.02).to(torch.bfloat16)

    write_safetensors(path, infos, tensors(), metadata, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    common = {"ss_network_module": "networks.lora", "ss_output_name": "demo", "sshs_model_hash": "0" * 64}
    for name, base, keep, version in (
        ("sdxl", family("sdxl")[0], SDXL, "sdxl_base_v1-0"),
        ("flux", family("flux1")[0], ("blocks",), "flux1"),
    ):
        write(
            arguments.folder / f"{name}_kohya.safetensors",
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
        )


if __name__ == "__main__":
    main()
