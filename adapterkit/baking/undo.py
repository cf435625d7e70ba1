"""Taking a bake back: the bits it changed are written beside the output, and applied they give the base.

Subtracting an adapter from what was rounded does not give the base again; this does, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from adapterkit.baking.undo_format import (
    INDEX,
    Block,
    Buffer,
    FileRecord,
    Identity,
    blocks_name,
    damaged,
    head_name,
    index_of,
    pack,
    records_of,
    unpack,
)
from adapterkit.errors import StoreError
from adapterkit.stores import Store, TensorInfo, Written, filling, open_store, write_safetensors
from adapterkit.stores.atomic import destination, replacing
from adapterkit.stores.base import DEFAULT_LIMITS, DTYPES
from adapterkit.stores.guards import is_folder, shown, strict_json, system_failure
from adapterkit.stores.header import parse_header

if TYPE_CHECKING:
    from adapterkit.baking.undo_format import Bytes

_CHUNK = 16 * 1024 * 1024


class UndoWriter:
    """Collects what a bake changes, and writes it to one file that gives the base back.

    `begin` each tensor file of the base, `add` every block of bytes that is written otherwise than it was,
    `keep` side files that are rewritten, then `finish`, while the base is still there. Blocks may come in
    any order and from several threads; the file is the same. Use it as a context manager: what is collected
    lies in a nameless temporary file in the folder of `path`, which nothing outlives.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        folder = destination(path, overwrite).parent
        self._path = path
        self._overwrite = overwrite
        self._bases: dict[str, _Base] = {}
        self._lock = threading.Lock()
        try:
            self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise system_failure(path, "cannot be written", error) from error

    def begin(self, name: str, base: Path) -> None:
        """Take a safetensors file of the base. name: its path from the folder of the model, with slashes.

        StoreError for another kind of file, which could not be put together again byte for byte.
        """
        with open_store(base) as store:
            if store.kind != "safetensors":
                raise StoreError(
                    f"{store.label}: bits can be put back into safetensors files only",
                    code="undo-base",
                    hint="bake without --keep-undo and keep the base",
                )
            tensors = store.tensors
        self._bases[name] = _Base(base, self._packed(_head_of(base), 1, 0, xor=False), tensors)

    def add(self, name: str, tensor: str, old: Buffer, new: Buffer, start: int = 0) -> None:
        """Bytes from `start` of a tensor of the base's file `name`: as they were, and as they are written.

        Nothing is kept of bytes that are the same. Where they are not equally many (another dtype), the old
        ones are kept whole.
        """
        before, after = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
        base = self._bases[name]
        width = max(1, DTYPES[base.tensors[tensor].dtype].bits // 8)
        xor = before.size == after.size
        changed = before ^ after if xor else before
        packed = self._packed(changed, width, start, xor=xor) if changed.any() or not xor else None
        with self._lock:
            base.seen[tensor] += before.size
            if packed is not None:
                base.blocks.setdefault(tensor, []).append(packed)

    def keep(self, name: str, old: bytes | None) -> None:
        """A side file that is rewritten or left out, as it was; None: one that the base does not have."""
        if old is None:
            self._bases[name] = _Base(None, None)
        else:
            head = self._packed(np.frombuffer(old, np.uint8), 1, 0, xor=False)
            self._bases[name] = _Base(Identity(hashlib.sha256(old).hexdigest(), len(old)), head)

    def finish(self, baked: Mapping[str, Path]) -> Written:
        """Write the undo file. baked: where each file lies that baking made, by name.

        StoreError when a tensor was written otherwise and not added: the base would not come back.
        """
        records: list[FileRecord] = []
        spooled: dict[str, list[_Spooled]] = {}
        for position, name in enumerate(sorted(self._bases)):
            base = self._bases[name]
            blocks = {
                key: sorted(found, key=lambda one: one.block.start) for key, found in base.blocks.items()
            }
            blocks = dict(sorted(blocks.items()))
            records.append(_record(name, base, blocks, baked.get(name), self._path))
            if base.head is not None:
                spooled[head_name(position)] = [base.head]
            spooled |= {blocks_name(position, key): found for key, found in blocks.items()}
        index = json.dumps(index_of(records), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        sizes = {INDEX: len(index)} | {
            key: sum(one.block.packed for one in found) for key, found in spooled.items()
        }
        header = [TensorInfo(key, "U8", (size,)) for key, size in sizes.items()]
        contents = chain([(INDEX, index)], ((key, self._read(found)) for key, found in spooled.items()))
        return write_safetensors(
            self._path, header, contents, {"format": "adapterkit-undo"}, overwrite=self._overwrite
        )

    def close(self) -> None:
        """Let go of what was collected."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _packed(self, data: Bytes, width: int, start: int, *, xor: bool) -> _Spooled:
        packed = pack(data, width)
        try:
            with self._lock:
                offset = self._spool.seek(0, os.SEEK_END)
                self._spool.write(packed)
        except OSError as error:
            raise system_failure(self._path, "cannot be written", error) from error
        return _Spooled(Block(start, data.size, len(packed), width, xor), offset)

    def _read(self, found: list[_Spooled]) -> bytes:
        parts = []
        for one in found:
            self._spool.seek(one.offset)
            parts.append(self._spool.read(one.block.packed))
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class _Spooled:
    block: Block
    offset: int


@dataclass
class _Base:
    """A file of the base. source: where it lies, or what it was. seen: bytes added of each tensor."""

    source: Path | Identity | None
    head: _Spooled | None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    blocks: dict[str, list[_Spooled]] = field(default_factory=dict)


def _record(
    name: str, base: _Base, blocks: Mapping[str, list[_Spooled]], baked: Path | None, undo: Path
) -> FileRecord:
    _require_whole(base, baked, undo)
    return FileRecord(
        name,
        _identity(baked) if baked else None,
        _identity(base.source) if isinstance(base.source, Path) else base.source,
        base.head.block if base.head else None,
        {key: tuple(one.block for one in found) for key, found in blocks.items()},
    )


def _require_whole(base: _Base, baked: Path | None, undo: Path) -> None:
    """StoreError if bytes of the base were not added and stand nowhere in the baked file either."""
    written: Mapping[str, TensorInfo] = {}
    if baked and base.tensors:
        with open_store(baked) as store:
            written = store.tensors
    for name, old in base.tensors.items():
        new = written.get(name, TensorInfo(name, "", ()))
        carried = (new.dtype, new.shape[1:]) == (old.dtype, old.shape[1:]) and new.elements >= old.elements
        if not carried and base.seen[name] < old.nbytes:
            raise StoreError(
                f"{shown(undo)}: `{name}` was written otherwise, and what it was is not here",
                code="undo",
                hint="add every block of a tensor whose dtype or shape changes",
            )


def _identity(path: Path) -> Identity:
    try:
        with path.open("rb") as file:
            return Identity(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise system_failure(path, "cannot be read", error) from error


def _head_of(path: Path) -> Bytes:
    """The header of a safetensors file as it stands there, its length before it."""
    try:
        with path.open("rb") as file:
            length = file.read(8)
            return np.frombuffer(length + file.read(int.from_bytes(length, "little")), np.uint8)
    except OSError as error:
        raise system_failure(path, "cannot be read", error) from error


def apply_undo(baked: Path, undo: Path, output: Path, *, overwrite: bool = False) -> Mapping[str, Written]:
    """Write the base that was baked into, byte for byte: what was restored, by name.

    baked: the file or folder that baking wrote, unchanged since. output: a file, or for a folder a folder;
    what baking left as it was is copied. StoreError where `undo` does not belong to `baked` or is damaged;
    nothing is kept then.
    """
    with open_store(undo) as store:
        records = _records(store)
        if is_folder(baked):
            return _restored_folder(records, store, baked, output, overwrite)
        if len(records) != 1:
            raise StoreError(
                f"{store.label}: undoes {len(records)} files, and `{shown(baked)}` is one",
                code="undo-other",
                hint="name the folder that was written together with it",
            )
        return {records[0].name: _restored(records[0], 0, store, baked, output, overwrite)}


def _records(store: Store) -> tuple[FileRecord, ...]:
    if INDEX not in store.tensors:
        raise damaged(store.label, "it has no index")
    records = records_of(strict_json(bytes(store.read(INDEX)), store.label), store.label)
    for position, record in enumerate(records):
        parts = {blocks_name(position, key): blocks for key, blocks in record.blocks.items()}
        parts |= {head_name(position): (record.head,)} if record.head else {}
        for key, blocks in parts.items():
            if key not in store.tensors or store.info(key).nbytes != sum(block.packed for block in blocks):
                raise damaged(store.label, f"what its index says of `{key}` is not there")
    return records


def _restored_folder(
    records: tuple[FileRecord, ...], store: Store, baked: Path, output: Path, overwrite: bool
) -> Mapping[str, Written]:
    known = {record.name for record in records}
    present = sorted(path for path in baked.rglob("*") if path.is_file())
    copied = {
        path.relative_to(baked).as_posix(): path
        for path in present
        if store.path is None or not path.samefile(store.path)
    }
    copied = {name: path for name, path in copied.items() if name not in known}
    restored = {}
    names = [*copied, *(record.name for record in records if record.base is not None)]
    with filling(output, names, overwrite=overwrite) as folder:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for name, path in copied.items():
            shutil.copyfile(path, folder / name)
        for position, record in enumerate(records):
            if record.base is not None:
                place = folder / record.name
                restored[record.name] = _restored(record, position, store, baked / record.name, place, False)
    return restored


def _restored(
    record: FileRecord, position: int, store: Store, baked: Path, output: Path, overwrite: bool
) -> Written:
    """One file of the base, held against its hash before it takes its place."""
    if record.base is None:
        raise damaged(store.label, f"`{record.name}` is no file of the base")
    if record.baked is not None and _identity(baked) != record.baked:
        raise StoreError(
            f"{shown(baked)}: not the file that {store.label} was written with, or changed since",
            code="undo-other",
            hint="give the file as baking left it, and the undo file that stands beside it",
        )
    digest = hashlib.sha256()
    with replacing(output, record.base.size, overwrite=overwrite) as file:
        for chunk in _contents(record, position, store, baked):
            file.write(chunk)
            digest.update(chunk)
        if digest.hexdigest() != record.base.sha256:
            raise damaged(store.label, f"it does not give the bytes that `{record.name}` had")
    return Written(record.base.sha256, None, record.base.size)


def _contents(record: FileRecord, position: int, store: Store, baked: Path) -> Iterator[Buffer]:
    """The bytes of the base's file: its head, then its tensors in their order there."""
    assert record.head is not None
    assert record.base is not None
    head = unpack(store.read(head_name(position)), record.head, store.label).tobytes()
    yield head
    if record.base.size == len(head):
        return
    header = parse_header(head[8:], record.base.size - len(head), store.label, DEFAULT_LIMITS)
    with open_store(baked) as new:
        for name, info in header.tensors.items():
            blocks = record.blocks.get(name, ())
            packed = store.read(blocks_name(position, name)) if blocks else memoryview(b"")
            yield from _tensor(info, blocks, packed, new, store.label)


def _tensor(
    info: TensorInfo, blocks: tuple[Block, ...], packed: memoryview, new: Store, where: str
) -> Iterator[Buffer]:
    """The bytes that a tensor had: the blocks, and between them what the baked file has."""
    present = new.read(info.name) if info.name in new.tensors else memoryview(b"")
    position = offset = 0
    for block in (*blocks, Block(info.nbytes, 0, 0, 1, False)):
        needed = block.stop if block.xor else block.start if block.start > position else 0
        if block.stop > info.nbytes or len(present) < needed:
            raise damaged(where, f"`{info.name}` is not as long as its index says")
        for start in range(position, block.start, _CHUNK):
            yield present[start : min(start + _CHUNK, block.start)]
        if block.length:
            data = unpack(packed[offset : offset + block.packed], block, where)
            if block.xor:
                data = data ^ np.frombuffer(present[block.start : block.stop], np.uint8)
            yield data.data
        position, offset = block.stop, offset + block.packed
