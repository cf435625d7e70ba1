"""One tensor file: what it is, is told by its content, never by its name alone."""

from __future__ import annotations

from pathlib import Path

from adapterkit.stores.base import Limits, Store
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.safetensors_file import SafetensorsStore
from adapterkit.stores.sniffing import (
    SNIFFED,
    looks_like_pickle,
    looks_like_safetensors,
    looks_like_zip,
    not_a_tensor_file,
)

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def open_file(path: Path, limits: Limits) -> Store:
    """Open a safetensors file or a file of torch.save. Raises StoreError, and UnsafeFile."""
    file = MappedFile(path)
    try:
        store = _store_of(file, limits)
    except BaseException:
        file.close()
        raise
    store.warnings += _misnamed(store.kind, path)
    return store


def _store_of(file: MappedFile, limits: Limits) -> Store:
    head = bytes(file.window(0, min(SNIFFED, file.size)))
    if looks_like_safetensors(head):
        return SafetensorsStore(file, limits)
    if looks_like_zip(head) or looks_like_pickle(head):
        # Imported where it is needed: most files are no pickles, and it takes a while.
        from adapterkit.stores.pickle_file import PickleStore

        return PickleStore(file, limits)
    raise not_a_tensor_file(file.path, head, file.size)


def _misnamed(kind: str, path: Path) -> tuple[str, ...]:
    suffix = path.suffix.lower()
    if kind == "pickle" and suffix == ".safetensors":
        return ("a pickle named .safetensors: other programs will not read it",)
    if kind == "safetensors" and suffix in PICKLE_SUFFIXES:
        return (f"safetensors named {suffix}: other programs will not read it",)
    return ()
