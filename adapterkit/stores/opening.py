"""One door for all files: what a path holds is told by its content, never by its name alone."""

from __future__ import annotations

from pathlib import Path

from adapterkit.stores.base import DEFAULT_LIMITS, Limits, Store
from adapterkit.stores.guards import require_little_endian
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.safetensors_file import SafetensorsStore
from adapterkit.stores.sniffing import SNIFFED, looks_like_safetensors, not_a_tensor_file


def open_store(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Store:
    """Open a tensor file."""
    require_little_endian()
    file = MappedFile(Path(path))
    try:
        return _store_of(file, limits)
    except BaseException:
        file.close()
        raise


def _store_of(file: MappedFile, limits: Limits) -> Store:
    head = bytes(file.window(0, min(SNIFFED, file.size)))
    if looks_like_safetensors(head, file.size):
        return SafetensorsStore(file, limits)
    raise not_a_tensor_file(file.path, head, file.size)
