"""What an undo file is made of: an index, and blocks of bits that changed.  docs/undo.md describes it.

Numbers change in their low bits and seldom in their sign and exponent. So old and new bytes are combined
by exclusive or, the first bytes of all numbers are put before the second ones, and runs of zeros are left
to zlib: of the strategies tried it is the smallest and the fastest (bf16, changes of 1/200: 27 %).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Union

from adapterkit.errors import Json, StoreError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

VERSION = 1
INDEX = "index"
Buffer = Union[bytes, bytearray, memoryview]


@dataclass(frozen=True, slots=True)
class Identity:
    """A file as it was: the SHA-256 of its bytes, and how many there were."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes [start, start + length) of the old tensor, packed into so many bytes.

    width: bytes of one number. xor: combined with the new tensor's bytes at the same place; else plain.
    """

    start: int
    length: int
    packed: int
    width: int
    xor: bool

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class FileRecord:
    """How one file comes back.

    name: its path from the folder of the model. baked: the file as baking left it. base: as it was, None if
    there was none. head: the bytes it began with (a safetensors header, or all of a small file).
    blocks: what changed of each tensor; where a tensor has no block it is as it was.
    """

    name: str
    baked: Identity | None
    base: Identity | None
    head: Block | None = None
    blocks: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)


def head_name(position: int) -> str:
    """The tensor of the undo file that holds the head of the n-th file."""
    return f"{position}/head"


def blocks_name(position: int, tensor: str) -> str:
    """The tensor of the undo file that holds the blocks of a tensor of the n-th file."""
    return f"{position}/tensor/{tensor}"


def pack(data: Bytes, width: int) -> bytes:
    """Bytes packed, the same for the same zlib; `width` of them make a number."""
    planes = data.reshape(-1, width).T.tobytes() if width > 1 and data.size % width == 0 else data.tobytes()
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(planes) + packer.flush()


def unpack(packed: Buffer, block: Block, where: str) -> Bytes:
    """What `pack` was given. StoreError unless it is exactly as long as the block says."""
    import numpy as np

    reader = zlib.decompressobj()
    try:
        data = reader.decompress(packed, block.length + 1)
    except zlib.error as error:
        raise damaged(where, f"a block cannot be unpacked: {error}") from None
    if len(data) != block.length:
        raise damaged(where, "a block is not as long as the index says")
    planes = np.frombuffer(data, np.uint8)
    if block.width > 1 and block.length % block.width == 0:
        return np.ascontiguousarray(planes.reshape(block.width, -1).T).reshape(-1)
    return planes


def index_of(records: Sequence[FileRecord]) -> Json:
    """The index as JSON."""
    return {"version": VERSION, "files": [_record_json(record) for record in records]}


def records_of(index: Json, where: str) -> tuple[FileRecord, ...]:
    """The records of an index. StoreError if it is none, or of a version that is not known."""
    files = index.get("files") if isinstance(index, dict) else None
    if not isinstance(index, dict) or not isinstance(files, list):
        raise damaged(where, "its index is not one of an undo file")
    if index.get("version") != VERSION:
        raise StoreError(
            f"{where}: an undo file of version {index.get('version')}, and {VERSION} is known",
            code="undo",
            hint="use the release of adapterkit that wrote it, or a newer one",
        )
    records = tuple(_record_from(entry, where) for entry in files)
    if len({record.name for record in records}) != len(records):
        raise damaged(where, "a file stands twice in its index")
    return records


def damaged(where: str, what: str) -> StoreError:
    return StoreError(
        f"{where}: not a whole undo file: {what}",
        code="undo",
        hint="copy the file again from where it was kept",
    )


def _record_json(record: FileRecord) -> Json:
    return {
        "name": record.name,
        "baked": _identity_json(record.baked),
        "base": _identity_json(record.base),
        "head": None if record.head is None else _block_json(record.head),
        "tensors": {name: [_block_json(block) for block in blocks] for name, blocks in record.blocks.items()},
    }


def _identity_json(identity: Identity | None) -> Json:
    return None if identity is None else {"sha256": identity.sha256, "size": identity.size}


def _block_json(block: Block) -> list[Json]:
    return [block.start, block.length, block.packed, block.width, int(block.xor)]


def _record_from(entry: Json, where: str) -> FileRecord:
    match entry:
        case {"name": str(name), "baked": baked, "base": base, "head": head, "tensors": dict(tensors)}:
            _require_inside(name, where)
            record = FileRecord(
                name,
                _identity_from(baked, where),
                _identity_from(base, where),
                None if head is None else _block_from(head, where),
                {key: _blocks_from(blocks, where) for key, blocks in tensors.items()},
            )
            if (record.base is None) == (record.head is None):
                return record
            raise damaged(where, f"`{name}` has a head or a base, and not both")
    raise damaged(where, "an entry of its index says too little")


def _identity_from(value: Json, where: str) -> Identity | None:
    match value:
        case None:
            return None
        case {"sha256": str(digest), "size": int(size)} if size >= 0:
            return Identity(digest, size)
    raise damaged(where, "a file's hash or size is missing from its index")


def _blocks_from(value: Json, where: str) -> tuple[Block, ...]:
    """A tensor's blocks, in order and apart from each other."""
    blocks = tuple(_block_from(entry, where) for entry in value) if isinstance(value, list) else ()
    ends = [0, *(block.stop for block in blocks)]
    if not blocks or any(block.start < end for block, end in zip(blocks, ends, strict=False)):
        raise damaged(where, "the blocks of a tensor do not follow each other")
    return blocks


def _block_from(value: Json, where: str) -> Block:
    match value:
        case [int(start), int(length), int(packed), int(width), int(xor)]:
            if min(start, length, packed) >= 0 and 1 <= width <= 16 and xor in (0, 1):
                return Block(start, length, packed, width, bool(xor))
    raise damaged(where, "a block of its index makes no sense")


def _require_inside(name: str, where: str) -> None:
    """A name may not lead out of the folder that is restored."""
    path = PurePosixPath(name)
    odd = not name.isprintable() or "\\" in name or ":" in name
    if not path.parts or odd or path.is_absolute() or ".." in path.parts:
        raise damaged(where, "a name in its index leads out of the folder")
