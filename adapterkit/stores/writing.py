"""Writing safetensors and JSON: one tensor at a time, all of the file or none of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterkit.errors import Json, StoreError
from adapterkit.stores.atomic import replacing
from adapterkit.stores.base import DTYPES, TensorInfo
from adapterkit.stores.direct import writing
from adapterkit.stores.guards import require_little_endian, require_name, shown
from adapterkit.stores.header import LONGEST_HEADER, build_header
from adapterkit.stores.views import bytes_of, dtype_name

if TYPE_CHECKING:
    import torch

Content = Union[bytes, memoryview, "torch.Tensor"]

# Stands in metadata for the hash of the tensors' bytes, which is known only when they are written.
# As long as the 64 digits it gives way to, so that nothing moves.
DATA_SHA256 = "adapterkit:the-sha256-of-the-data-section-that-follows-goes-here"
_CHUNK = 16 * 1024 * 1024
_WAITING = 2
_GATHERED = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file. sha256: of all of it, "" if it was not wanted. size: in bytes.

    data_sha256: of the tensors' bytes alone, where the metadata asked for it.
    """

    sha256: str
    data_sha256: str | None
    size: int


class _NoHasher:
    """Stands in for a hasher where no hash is wanted."""

    def update(self, chunk: bytes | memoryview) -> None:
        return

    def hexdigest(self) -> str:
        return ""


class _Hasher:
    """A SHA-256 fed by a thread of its own: hashing takes longer than writing, and waits for nothing.

    Small chunks are gathered: handing each over would cost the two threads more than hashing it.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._hash = hashlib.sha256()
        self._gathered = bytearray()
        self._pending: deque[Future[None]] = deque()

    def update(self, chunk: bytes | memoryview) -> None:
        if len(chunk) < _GATHERED:
            self._gathered += chunk
            if len(self._gathered) >= _GATHERED:
                self._hand_over()
        else:
            self._hand_over()
            self._submit(chunk)

    def hexdigest(self) -> str:
        self._hand_over()
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()

    def _hand_over(self) -> None:
        if self._gathered:
            self._submit(self._gathered)
            self._gathered = bytearray()

    def _submit(self, chunk: bytes | bytearray | memoryview) -> None:
        self._pending.append(self._pool.submit(self._hash.update, chunk))
        # What waits here is held in memory.
        while len(self._pending) > _WAITING:
            self._pending.popleft().result()


def write_safetensors(
    path: Path,
    header: Sequence[TensorInfo],
    produce: Iterable[tuple[str, Content]],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
    hashed: bool = True,
) -> Written:
    """Write one file, or nothing.

    header: the tensors in the order of the file (`canonical_order` gives the order of safetensors' own
    writer, in which every tensor is aligned). produce: the same names in the same order, each with its
    bytes or its tensor. metadata: a value may hold DATA_SHA256, which becomes the hash of the tensors'
    bytes. check: called with the finished file before it takes its place; if it raises, nothing is left.
    hashed: whether its SHA-256 is wanted, which takes longer than all else where the processor has no
    instructions for it.

    The same arguments give the same bytes. StoreError for a header no reader would accept, for contents
    that do not fit it, and for a place that cannot be written.
    """
    require_little_endian()
    _require_valid(path, header, metadata)
    raw = build_header(header, metadata)
    if len(raw) - 8 > LONGEST_HEADER:
        raise StoreError(
            f"{shown(path)}: a header of {len(raw)} bytes, which no reader accepts", code="limit"
        )
    size = len(raw) + sum(info.nbytes for info in header)
    # One thread, so that chunks are hashed in the order of the file.
    with ThreadPoolExecutor(max_workers=1) as pool:
        with replacing(path, size, overwrite=overwrite, check=check) as file:
            data = _Hasher(pool) if hashed else _NoHasher()
            waiting = hashed and any(DATA_SHA256 in text for text in metadata.values())
            if not waiting:
                data.update(raw)
            # What is to be read again at once had better stay in the cache.
            with writing(file, 0 if waiting else size) as out:
                out.write(raw)
                for chunk in _chunks(header, produce, path):
                    out.write(chunk)
                    data.update(chunk)
            if not waiting:
                return Written(data.hexdigest(), None, size)
            _fill_in(file, header, metadata, data.hexdigest())
            whole = pool.submit(_digest, os.dup(file.fileno()))
        return Written(whole.result(), data.hexdigest(), size)


def write_json(path: Path, value: Json, *, overwrite: bool = False) -> None:
    """Write a JSON file, indented, or nothing. StoreError for a place that cannot be written."""
    raw = (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
    with replacing(path, len(raw), overwrite=overwrite) as file:
        file.write(raw)


def _require_valid(path: Path, header: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
    """Nothing is written that a weaker reader could trip over."""
    where = shown(path)
    names: set[str] = set()
    for info in header:
        require_name(info.name, where)
        if info.name in names or info.name == "__metadata__":
            raise StoreError(f"{where}: `{info.name}` cannot be written twice", code="duplicate-key")
        names.add(info.name)
        if info.dtype not in DTYPES:
            raise StoreError(f"{where}: `{info.name}`: unknown dtype `{shown(info.dtype)}`", code="dtype")
        if any(size < 0 for size in info.shape) or info.elements * DTYPES[info.dtype].bits % 8:
            raise StoreError(f"{where}: `{info.name}`: impossible shape {info.shape}", code="header")
    for key, text in metadata.items():
        require_name(key, where)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise StoreError(f"{where}: metadata `{key}` holds half a character", code="header") from None


def _fill_in(
    file: BufferedRandom, header: Sequence[TensorInfo], metadata: Mapping[str, str], digest: str
) -> None:
    """Put the hash of the tensors' bytes into the header, which does not change its length."""
    filled = {key: text.replace(DATA_SHA256, digest) for key, text in metadata.items()}
    file.seek(0)
    file.write(build_header(header, filled))
    file.flush()


def _digest(descriptor: int) -> str:
    """The SHA-256 of an open file to which nothing more is written; the descriptor is closed."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chunks(
    header: Sequence[TensorInfo], produce: Iterable[tuple[str, Content]], path: Path
) -> Iterator[memoryview]:
    """The data section in pieces, each tensor held against its place in the header."""
    produced = iter(produce)
    for info in header:
        name, content = next(produced, (None, b""))
        if name != info.name:
            raise _out_of_step(path, f"expected `{info.name}`, was given `{shown(name)}`")
        data = _checked_bytes(info, content, path)
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]
    if (extra := next(produced, None)) is not None:
        raise _out_of_step(path, f"was given `{shown(extra[0])}` after the last tensor")


def _checked_bytes(info: TensorInfo, content: Content, path: Path) -> memoryview:
    if isinstance(content, bytes | memoryview):
        data = memoryview(content).cast("B")
    else:
        given = (dtype_name(content.dtype), tuple(content.shape))
        if given != (info.dtype, info.shape):
            raise _out_of_step(path, f"`{info.name}` is {given}, the header says {(info.dtype, info.shape)}")
        data = bytes_of(content)
    if len(data) != info.nbytes:
        raise _out_of_step(path, f"`{info.name}` has {len(data)} bytes, the header says {info.nbytes}")
    return data


def _out_of_step(path: Path, what: str) -> StoreError:
    return StoreError(f"{shown(path)}: contents do not follow the header: {what}", code="out-of-step")
