"""What every store offers: names, shapes and bytes, without reading what was not asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from adapterkit.errors import Json, StoreError
from adapterkit.stores.guards import shown
from adapterkit.stores.numbers import first_number

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """A number format: bits per element, and torch's name for it ("" where torch has none)."""

    bits: int
    torch: str


# safetensors' names, in the order of its own list (safetensors/src/tensor.rs, `enum Dtype`, 0.8):
# its writer sorts by this order, the last first.
DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(8, "bool"),
    "F4": Dtype(4, ""),
    "F6_E2M3": Dtype(6, ""),
    "F6_E3M2": Dtype(6, ""),
    "U8": Dtype(8, "uint8"),
    "I8": Dtype(8, "int8"),
    "F8_E5M2": Dtype(8, "float8_e5m2"),
    "F8_E4M3": Dtype(8, "float8_e4m3fn"),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16"),
    "U16": Dtype(16, "uint16"),
    "F16": Dtype(16, "float16"),
    "BF16": Dtype(16, "bfloat16"),
    "I32": Dtype(32, "int32"),
    "U32": Dtype(32, "uint32"),
    "F32": Dtype(32, "float32"),
    "C64": Dtype(64, "complex64"),
    "F64": Dtype(64, "float64"),
    "I64": Dtype(64, "int64"),
    "U64": Dtype(64, "uint64"),
}
NAMES_BY_TORCH: Mapping[str, str] = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.torch}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it; dtype is one of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is read before a file is trusted. Real files stay far below each.

    header_bytes: a safetensors header, an index of shards, or the pickle of a torch file.
    tensors: in one file. dimensions: of one tensor. json_bytes: of one side file.
    inflated_bytes: one compressed member of a torch file. opcodes: of one pickle.
    """

    header_bytes: int = 25_000_000
    tensors: int = 200_000
    dimensions: int = 8
    json_bytes: int = 10_000_000
    inflated_bytes: int = 1 << 30
    opcodes: int = 5_000_000


DEFAULT_LIMITS = Limits()


class Store(ABC):
    """A read-only source of named tensors. Opening reads headers only.

    path: what was opened (None in memory). kind: "safetensors", "pickle", "folder", "sharded" or "memory".
    tensors: in the order their bytes have in the file. metadata: safetensors' `__metadata__`.
    sidecars: JSON files that belong to the tensors, by file name. size: bytes of the tensor files.
    warnings: what is odd but harmless, such as a pickle named .safetensors.
    """

    path: Path | None
    kind: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    sidecars: Mapping[str, Json]
    warnings: tuple[str, ...]
    size: int

    @abstractmethod
    def read(self, name: str) -> memoryview:
        """The little-endian bytes of a tensor, in row-major order, read-only, without a copy where possible.

        Raises StoreError for a name that is not in the store, and for a file changed since it was opened.
        """

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, viewing the file where possible; writing to it never changes the file."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """StoreError if a file that tensors view was changed since it was opened, while it is still open.

        A view of a file that was written over shows the new bytes; of one cut short, touching it ends
        the process.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file. Tensors and views already handed out stay valid."""

    def files(self) -> tuple[tuple[str, Store], ...]:
        """The stores of single files that it is made of, each with what stands before their names here."""
        return (("", self),)

    def release(self) -> None:
        """Let go of the file's pages in memory; tensors that view them read them again when touched.

        For reading more than memory holds. What was written into such tensors is lost.
        """
        return

    def scalar(self, name: str) -> float:
        """The first element as a float, without torch."""
        info = self.info(name)
        if not info.elements:
            raise StoreError(
                f"{self.label}: `{name}` is empty, so it has no first number", code="empty-tensor"
            )
        number = first_number(self.read(name), info.dtype)
        if number is None:
            raise StoreError(f"{self.label}: `{name}` is {info.dtype}, not a real number", code="dtype")
        return number

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor; StoreError when the store has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise StoreError(f"{self.label}: no tensor is called `{name}`", code="no-tensor") from None

    @property
    def label(self) -> str:
        """How messages call this store."""
        return shown(self.path) if self.path is not None else "in memory"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
