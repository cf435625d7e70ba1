"""Several stores as one: the folders of a model's components, or the adapters of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.stores.base import Store

if TYPE_CHECKING:
    import torch


class JoinedStore(Store):
    """Tensors and sidecars of every part under the part's name: `unet/adapter_config.json`."""

    kind = "folder"

    def __init__(self, path: Path | None, parts: Mapping[str, Store]) -> None:
        self._parts = dict(parts)
        self.path = path
        self.tensors = {
            f"{part}/{name}": replace(info, name=f"{part}/{name}")
            for part, store in parts.items()
            for name, info in store.tensors.items()
        }
        self.metadata = {key: value for store in parts.values() for key, value in store.metadata.items()}
        self.sidecars = {
            f"{part}/{name}": value for part, store in parts.items() for name, value in store.sidecars.items()
        }
        self.warnings = tuple(f"{part}: {text}" for part, store in parts.items() for text in store.warnings)
        self.size = sum(store.size for store in parts.values())

    def read(self, name: str) -> memoryview:
        part, _, rest = name.partition("/")
        return self._parts[part].read(rest)

    def tensor(self, name: str) -> torch.Tensor:
        part, _, rest = name.partition("/")
        return self._parts[part].tensor(rest)

    def files(self) -> tuple[tuple[str, Store], ...]:
        return tuple(
            (f"{part}/{front}", file) for part, store in self._parts.items() for front, file in store.files()
        )

    def require_unchanged(self) -> None:
        for store in self._parts.values():
            store.require_unchanged()

    def release(self) -> None:
        for store in self._parts.values():
            store.release()

    def close(self) -> None:
        for store in self._parts.values():
            store.close()
