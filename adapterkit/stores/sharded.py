"""Tensors split over several files, with an index that says which file holds which tensor.

The index is a file like any other and may lie: `weight_map` names files, and a reader that trusts it
opens whatever it names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import Json, StoreError, UnsafeFile
from adapterkit.stores.base import Limits, Store, TensorInfo
from adapterkit.stores.files import open_file
from adapterkit.stores.guards import is_file, shown
from adapterkit.stores.json_files import read_json

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".index.json"


class ShardedStore(Store):
    """All shards of an index, as one store: tensors in the order of the index's shards."""

    kind = "sharded"

    def __init__(self, path: Path, weight_map: dict[str, str], limits: Limits) -> None:
        self.path = path
        with ExitStack() as opened:
            shards = {
                name: opened.enter_context(open_file(file, limits))
                for name, file in _shard_files(path, weight_map.values()).items()
            }
            self._homes = _homes(path, weight_map, shards)
            opened.pop_all()
        self._shards = tuple(shards.values())
        self.tensors: dict[str, TensorInfo] = {
            name: info for shard in self._shards for name, info in shard.tensors.items()
        }
        self.metadata, clashes = _merged(self._shards)
        self.sidecars = {}
        self.size = sum(shard.size for shard in self._shards)
        unmapped = [name for name in self.tensors if name not in weight_map]
        self.warnings = (
            *(warning for shard in self._shards for warning in shard.warnings),
            *(f"metadata `{key}` differs between shards; the first one's is used" for key in clashes),
            *(f"`{name}` stands in a shard, but not in the index" for name in unmapped),
        )

    def read(self, name: str) -> memoryview:
        self.info(name)
        return self._homes[name].read(name)

    def tensor(self, name: str) -> torch.Tensor:
        self.info(name)
        return self._homes[name].tensor(name)

    def files(self) -> tuple[tuple[str, Store], ...]:
        return tuple(("", shard) for shard in self._shards)

    def require_unchanged(self) -> None:
        for shard in self._shards:
            shard.require_unchanged()

    def release(self) -> None:
        for store in self._shards:
            store.release()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


def open_index(path: Path, limits: Limits) -> Store:
    """Open the shards an index names. StoreError for what is missing, UnsafeFile for a path that leaves."""
    weight_map = weight_map_of(read_json(path, limits.header_bytes))
    if weight_map is None:
        raise StoreError(f"{shown(path)}: no `weight_map` from tensors to files", code="index")
    return ShardedStore(path, weight_map, limits)


def weight_map_of(index: Json) -> dict[str, str] | None:
    """The map from tensors to files, if this is the JSON of an index."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict):
        return None
    files = {name: file for name, file in found.items() if isinstance(file, str)}
    return files if len(files) == len(found) else None


def _shard_files(index: Path, names: Iterable[str]) -> dict[str, Path]:
    """The shards' files in the index's order, none of them outside, none missing."""
    folder = index.parent
    files = {name: _inside(folder, name, index) for name in dict.fromkeys(names)}
    missing = [name for name, file in files.items() if not is_file(file)]
    if missing:
        raise StoreError(
            f"{shown(index)}: {len(missing)} of {len(files)} shards are missing: "
            + ", ".join(f"`{shown(name)}`" for name in missing),
            code="missing-shards",
            hint="download the missing files into the same folder",
            details={"missing": list(missing)},
        )
    return files


def _inside(folder: Path, name: str, index: Path) -> Path:
    """A shard's path, unless its name or a link in it leads out of the folder."""
    relative = Path(name)
    file = folder / relative
    leaves = not name.isprintable() or "\\" in name or ":" in name or relative.is_absolute()
    if leaves or ".." in relative.parts or not _allowed(Path(os.path.realpath(file)), folder):
        raise UnsafeFile(
            f"{shown(index)}: refused: the shard `{shown(name)}` lies outside the folder",
            hint="the index was tampered with; get it from its source again",
            details={"shard": name},
        )
    return file


def _allowed(target: Path, folder: Path) -> bool:
    """Whether a resolved path is in the folder, or in the blobs that huggingface_hub's cache links to.

    The cache keeps snapshots/REVISION/FILE as links to ../../blobs/HASH (huggingface_hub's documentation,
    "Understand caching").
    """
    if target.is_relative_to(os.path.realpath(folder)):
        return True
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and target.parent == Path(
        os.path.realpath(snapshots.parent / "blobs")
    )


def _homes(index: Path, weight_map: dict[str, str], shards: dict[str, Store]) -> dict[str, Store]:
    """The shard of each tensor: where the index says, and nowhere else."""
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise StoreError(
                f"{shown(index)}: `{shown(name)}` should be in `{shown(file)}`, and is not",
                code="index",
                details={"tensor": name, "shard": file},
            )
    homes: dict[str, Store] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in homes:
                raise StoreError(
                    f"{shown(index)}: `{name}` stands in two shards, the second is `{shown(file)}`",
                    code="duplicate-key",
                    details={"tensor": name, "shard": file},
                )
            homes[name] = shard
    return homes


def _merged(shards: Iterable[Store]) -> tuple[dict[str, str], list[str]]:
    """Metadata of all shards, the first to say something being right, and the keys they disagree about."""
    merged: dict[str, str] = {}
    clashes: dict[str, None] = {}
    for shard in shards:
        for key, text in shard.metadata.items():
            if merged.setdefault(key, text) != text:
                clashes[key] = None
    return merged, list(clashes)
