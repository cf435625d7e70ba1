"""Folders that hold a base model: one part of it, or a pipeline with a folder for each part.

The names of the files are those of diffusers (utils/constants.py: WEIGHTS_NAME) and transformers
(utils/__init__.py: WEIGHTS_NAME), with a variant before the ending and an index where there are shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from adapterkit.errors import Json, StoreError
from adapterkit.stores.base import DEFAULT_LIMITS, Limits, Store
from adapterkit.stores.files import open_file
from adapterkit.stores.folders import FolderStore
from adapterkit.stores.guards import is_file, is_folder, shown, system_failure
from adapterkit.stores.joined import JoinedStore
from adapterkit.stores.json_files import read_json
from adapterkit.stores.opening import open_store
from adapterkit.stores.sharded import INDEX_SUFFIX, open_index

CONFIG = "config.json"

# The first that is there is read: whole numbers before rounded ones, plain files before pickles.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDS = (f".safetensors{INDEX_SUFFIX}", ".safetensors", f".bin{INDEX_SUFFIX}", ".bin")
_WEIGHTS = re.compile(rf"({'|'.join(_STEMS)})(\.[\w-]+)?({'|'.join(map(re.escape, _ENDS))})")
_SHARD = re.compile(r".*-\d+-of-\d+.*")


def open_model(path: str | Path, parts: Iterable[str], limits: Limits = DEFAULT_LIMITS) -> Store:
    """Open a base model: a file, an index of shards, or a folder.

    parts: the names that folders of a pipeline's parts may have. Of several files of the same weights
    the plain one is read, and `warnings` say what stands beside it. Keys of a pipeline's parts begin
    with the folder's name and a slash. Raises what `open_store` raises.
    """
    path = Path(path)
    if not is_folder(path):
        return open_store(path, limits)
    found = [part for part in dict.fromkeys(parts) if _weights(path / part)]
    if not found:
        return _open_part(path, limits)
    with ExitStack() as opened:
        stores = {part: opened.enter_context(_open_part(path / part, limits)) for part in found}
        opened.pop_all()
    return JoinedStore(path, stores)


def _open_part(folder: Path, limits: Limits) -> Store:
    names = _weights(folder)
    if not names:
        return open_store(folder, limits)
    chosen = min(names, key=_preference)
    plain = _preference(chosen)[0] == 0
    if not plain and len(names) > 1:
        raise StoreError(
            f"{shown(folder)}: variants of the weights only: {', '.join(f'`{shown(n)}`' for n in names)}",
            code="several",
            hint="name one of them",
            details={"candidates": list[Json](names)},
        )
    inner = (open_index if chosen.endswith(INDEX_SUFFIX) else open_file)(folder / chosen, limits)
    others = [name for name in names if name != chosen]
    beside = (
        (f"`{chosen}` is read, not {', '.join(f'`{shown(name)}`' for name in others)}",) if others else ()
    )
    return FolderStore(folder, inner, _sidecars(folder, limits), beside)


def _preference(name: str) -> tuple[int, int, int]:
    found = _WEIGHTS.fullmatch(name)
    assert found is not None
    return (int(found[2] is not None), _STEMS.index(found[1]), _ENDS.index(found[3]))


def _weights(folder: Path) -> list[str]:
    """The files of weights in a folder, shards left out: their index stands for them."""
    if not is_folder(folder):
        return []
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise system_failure(folder, "cannot be read", error) from error
    return [
        name
        for name in names
        if _WEIGHTS.fullmatch(name) and (name.endswith(INDEX_SUFFIX) or not _SHARD.fullmatch(name))
    ]


def _sidecars(folder: Path, limits: Limits) -> Mapping[str, Json]:
    path = folder / CONFIG
    return {CONFIG: read_json(path, limits.json_bytes)} if is_file(path) else {}
