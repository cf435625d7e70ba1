"""Tensors that are in memory already, offered like a file's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.errors import Json
from adapterkit.stores.base import Store, TensorInfo
from adapterkit.stores.views import bytes_of, dtype_name

if TYPE_CHECKING:
    import torch


class MemoryStore(Store):
    kind = "memory"
    path = None
    warnings = ()

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], sidecars: Mapping[str, Json]
    ) -> None:
        self._held = dict(tensors)
        self.tensors = {
            name: TensorInfo(name, dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in self._held.items()
        }
        self.metadata = dict(metadata)
        self.sidecars = dict(sidecars)
        self.size = sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> memoryview:
        return bytes_of(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        self.info(name)
        return self._held[name]

    def require_unchanged(self) -> None:
        """Nothing is known of who changes tensors in memory."""

    def close(self) -> None:
        """Nothing to let go of: the caller owns the tensors."""


def memory_store(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    sidecars: Mapping[str, Json] | None = None,
) -> Store:
    """A store over a state dict. StoreError for a dtype that safetensors has no name for."""
    return MemoryStore(tensors, metadata or {}, sidecars or {})
