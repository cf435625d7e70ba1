"""Folders: a PEFT adapter, or any folder with one tensor file in it.

PEFT's names for the files of an adapter are in peft/utils/constants.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import Json, StoreError
from adapterkit.stores.base import Limits, Store
from adapterkit.stores.files import PICKLE_SUFFIXES, open_file
from adapterkit.stores.guards import is_file, is_folder, shown, system_failure
from adapterkit.stores.json_files import read_json
from adapterkit.stores.sharded import INDEX_SUFFIX, open_index

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
# diffusers/loaders/lora_base.py: what its `save_lora_weights` writes.
_DIFFUSERS_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


class FolderStore(Store):
    """The one tensor file (or set of shards) of a folder, with the JSON that belongs to it."""

    kind = "folder"

    def __init__(
        self, path: Path, inner: Store, sidecars: Mapping[str, Json], warnings: tuple[str, ...]
    ) -> None:
        self._inner = inner
        self.path = path
        self.tensors = inner.tensors
        self.metadata = inner.metadata
        self.sidecars = sidecars
        self.warnings = inner.warnings + warnings
        self.size = inner.size

    def read(self, name: str) -> memoryview:
        return self._inner.read(name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._inner.tensor(name)

    def files(self) -> tuple[tuple[str, Store], ...]:
        return self._inner.files()

    def require_unchanged(self) -> None:
        self._inner.require_unchanged()

    def release(self) -> None:
        self._inner.release()

    def close(self) -> None:
        self._inner.close()


def open_folder(folder: Path, limits: Limits) -> Store:
    """Open the one tensor file of a folder. StoreError when it has none, or several to choose from."""
    chosen = _choose(folder, _names(folder))
    sidecars, warnings = read_sidecars(folder, limits)
    if chosen.name in ADAPTER_FILES and not sidecars:
        warnings += (f"no {CONFIG}: the adapter's scale and kind can only be guessed",)
    inner = open_index(chosen, limits) if chosen.name.endswith(INDEX_SUFFIX) else open_file(chosen, limits)
    return FolderStore(folder, inner, sidecars, warnings)


def read_sidecars(folder: Path, limits: Limits) -> tuple[dict[str, Json], tuple[str, ...]]:
    """The adapter's configuration, by file name, and what is odd about it; nothing if there is none."""
    path = folder / CONFIG
    if not is_file(path):
        return {}, ()
    config = read_json(path, limits.json_bytes)
    if not isinstance(config, dict):
        raise StoreError(f"{shown(path)}: not a JSON object", code="json")
    if config.get("base_model_name_or_path") is None:
        return {CONFIG: config}, (f"{CONFIG} names no base model",)
    return {CONFIG: config}, ()


def _names(folder: Path) -> list[str]:
    """What lies in a folder, in order, without the hidden files that some systems add."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise system_failure(folder, "cannot be read", error) from error


def _choose(folder: Path, names: list[str]) -> Path:
    for known in (*ADAPTER_FILES, *_DIFFUSERS_FILES):
        if known in names:
            return folder / known
    for suffixes in ((INDEX_SUFFIX,), (".safetensors",), PICKLE_SUFFIXES):
        found = [name for name in names if name.lower().endswith(suffixes)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise _several(folder, found)
    inside = [name for name in names if _holds_tensors(folder / name)]
    if inside:
        raise StoreError(
            f"{shown(folder)}: no tensor file here, but in its folders {_listed(inside)}",
            code="several",
            hint=f"name one of them: {shown(folder / inside[0])}",
            details={"candidates": list(inside)},
        )
    what = f"holds {CONFIG}, but no adapter_model.safetensors" if CONFIG in names else "no tensor file in it"
    raise StoreError(f"{shown(folder)}: {what}", code="no-file", hint="download the rest of the folder")


def _several(folder: Path, found: list[str]) -> StoreError:
    return StoreError(
        f"{shown(folder)}: {len(found)} tensor files: {_listed(found)}",
        code="several",
        hint="name one of them",
        details={"candidates": list(found)},
    )


def _holds_tensors(folder: Path) -> bool:
    wanted = (CONFIG, ".safetensors", *PICKLE_SUFFIXES)
    return is_folder(folder) and any(name.endswith(wanted) for name in _names(folder))


def _listed(names: list[str]) -> str:
    more = ", …" if len(names) > 5 else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:5]) + more
