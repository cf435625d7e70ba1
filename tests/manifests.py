"""The manifests under fixtures/: names, dtypes and shapes of files as real libraries wrote them.

A manifest holds facts and no weights; `materialise` gives it weights, seeded, so that a test can
write the file, load it with the library that wrote it, or change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from adapterkit.errors import Json

FOLDER = Path(__file__).parent.parent / "fixtures" / "manifests"

TENSOR = re.compile(r"(\S+) ([A-Z][A-Z0-9_]*) (scalar|\d+(?:x\d+)*)")
METADATA = re.compile(r"# metadata (\S+) = (.*)", re.DOTALL)
SIDECAR = re.compile(r"# (\S+\.json) = (.*)", re.DOTALL)
CUT = "…"  # a metadata value that ends so was too long to keep in full

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "BOOL": "bool",
}

# Roles that multiply a weight or its rows: a value near one, as training starts from.
NEAR_ONE = (
    ".dora_scale",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".rescale",
    ".boft_s",
    ".ia3_l",
)
# LyCORIS' IA³ scales the input of these modules and the output of all others.
ON_INPUT = ("_ff_net_2.on_input", "_mlp_fc2.on_input")
ALPHA = 2.0


@dataclass(frozen=True)
class TensorLine:
    """One tensor of a manifest; dtype as safetensors spells it (`F32`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """One file that a library wrote, without its weights.

    header: the first line, who wrote it and for which model.
    metadata: the file's own, less the values that the manifest holds only in part.
    sidecars: the JSON files beside it, by file name.
    """

    name: str
    header: str
    metadata: dict[str, str]
    sidecars: dict[str, Json]
    tensors: tuple[TensorLine, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(line.name for line in self.tensors)


def manifests() -> list[Path]:
    """Every manifest, in the order of their names."""
    return sorted(FOLDER.glob("*.txt"))


def read_manifest(path: Path | str) -> Manifest:
    """The manifest at `path`, or the one called `path` (with or without `.txt`) under fixtures/."""
    path = path if isinstance(path, Path) else FOLDER / f"{path.removesuffix('.txt')}.txt"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    metadata: dict[str, str] = {}
    sidecars: dict[str, Json] = {}
    tensors: list[TensorLine] = []
    for entry in _entries(lines):
        if match := TENSOR.fullmatch(entry):
            tensors.append(TensorLine(match[1], match[2], _shape(match[3])))
        elif match := METADATA.fullmatch(entry):
            if not match[2].endswith(CUT):
                metadata[match[1]] = match[2]
        elif match := SIDECAR.fullmatch(entry):
            sidecars[match[1]] = json.loads(match[2])
        else:
            raise ValueError(f"{path.name}: cannot read {entry[:80]!r}")
    return Manifest(path.stem, header.removeprefix("# "), metadata, sidecars, tuple(tensors))


def _entries(lines: list[str]) -> Iterator[str]:
    """Lines joined where a value goes on over several."""
    entry: list[str] = []
    for line in lines:
        if entry and (line.startswith("# ") or TENSOR.fullmatch(line)):
            yield "\n".join(entry)
            entry = []
        if entry or line:
            entry.append(line)
    if entry:
        yield "\n".join(entry).rstrip("\n")


def _shape(text: str) -> tuple[int, ...]:
    return () if text == "scalar" else tuple(map(int, text.split("x")))


def materialise(
    manifest: Manifest, seed: int = 0, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """A state dict of the manifest's names and shapes, the same for the same seed.

    Weights are normal with deviation 0.02; `dtype` replaces the dtype of the floating ones.
    Alphas are 2, flags are 0 or 1, multipliers of rows lie near 1, and integers are small.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {line.name: _values(line, generator, dtype) for line in manifest.tensors}


def _values(line: TensorLine, generator: torch.Generator, dtype: torch.dtype | None) -> torch.Tensor:
    import torch

    stored: torch.dtype = getattr(torch, DTYPES[line.dtype])
    if not stored.is_floating_point:
        return torch.randint(0, 2, line.shape, generator=generator).to(stored)
    stored = dtype or stored
    if line.name.endswith(".alpha"):
        return torch.full(line.shape, ALPHA, dtype=stored)
    if line.name.endswith(".on_input"):
        return torch.full(line.shape, float(line.name.endswith(ON_INPUT)), dtype=stored)
    values = torch.randn(line.shape, generator=generator) * 0.02
    return (values + 1 if line.name.endswith(NEAR_ONE) else values).to(stored)
