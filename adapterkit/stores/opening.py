"""One door for everything tensors are kept in: a file, a folder, an index of shards."""

from __future__ import annotations

from pathlib import Path

from adapterkit.errors import StoreError
from adapterkit.stores.base import DEFAULT_LIMITS, Limits, Store
from adapterkit.stores.files import open_file
from adapterkit.stores.folders import ADAPTER_FILES, CONFIG, open_folder, read_sidecars
from adapterkit.stores.guards import is_folder, require_little_endian, shown
from adapterkit.stores.sharded import INDEX_SUFFIX, open_index


def open_store(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> Store:
    """Open a safetensors file, a file of torch.save, a folder with one of them, or an index of shards.

    Headers are read and checked in full; tensors are read when asked for. Raises StoreError when the path
    holds something else, saying what, and UnsafeFile when reading it would run code or leave its folder.
    """
    require_little_endian()
    path = Path(path)
    if is_folder(path):
        return open_folder(path, limits)
    if path.name.endswith(INDEX_SUFFIX):
        return open_index(path, limits)
    if path.name == CONFIG:
        what = f"{shown(path)}: the configuration of an adapter, not its tensors"
        raise StoreError(what, code="json-file", hint="name the folder it is in")
    store = open_file(path, limits)
    if path.name in ADAPTER_FILES:
        try:
            store.sidecars, warnings = read_sidecars(path.parent, limits)
        except StoreError:
            store.close()
            raise
        store.warnings += warnings
    return store
