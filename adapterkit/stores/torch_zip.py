"""The zip archive torch.save has written since 1.6: `data.pkl` and one stored member per storage.

Everything in the archive must be something torch.save writes. What one reader skips and another one reads is
where harm is hidden, so the archive's two accounts of each member must agree, and no two members overlap.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass

from adapterkit.errors import StoreError, UnsafeFile
from adapterkit.stores.base import Limits
from adapterkit.stores.guards import shown
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.pickle_machine import run_pickle
from adapterkit.stores.pickle_world import StorageRef, find_global, set_state, storage_ref

# General purpose bits of the zip format (APPNOTE 4.4.4): deflate's strength, sizes that follow, UTF-8 names.
_HARMLESS_FLAGS = 0x0002 | 0x0004 | 0x0008 | 0x0800
_LOCAL_HEADER = 30
# caffe2/serialize/inline_container.cc and torch/serialization.py, v2.6.
_SIDE_MEMBERS = {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes lie, and how many they are when inflated."""

    name: str
    start: int
    stop: int
    size: int
    compressed: bool


class TorchZip:
    """What the pickle holds (`value`), and the bytes of its storages."""

    def __init__(self, file: MappedFile, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._where = shown(file.path)
        members = _members(file, self._where, limits)
        root = _root(members, self._where)
        self._members = {name.removeprefix(root): member for name, member in members.items()}
        self._require_known()
        if "byteorder" in self._members and bytes(self._bytes("byteorder")) != b"little":
            raise StoreError(f"{self._where}: written on a big-endian machine", code="big-endian")
        pickled = self._bytes("data.pkl")
        self.value, end = run_pickle(pickled, self, self._where, limits)
        if end != len(pickled):
            raise UnsafeFile(f"{self._where}: refused: something follows the pickle in `data.pkl`")

    def find(self, module: str, name: str) -> object:
        return find_global(module, name)

    def set_state(self, value: object, state: object) -> bool:
        return set_state(value, state)

    def storage(self, identity: object) -> StorageRef:
        match identity:
            case ("storage", kind, key, _, elements):
                found = storage_ref(kind, key, elements)
            case _:
                raise ValueError("a persistent id that is no storage")
        member = self._members.get(f"data/{found.key}")
        if member is None:
            raise ValueError(f"no member holds storage {found.key}")
        if member.size != found.elements * found.item_bytes:
            raise ValueError(f"storage {found.key} has another size than its member")
        return found

    def storage_bytes(self, storage: StorageRef) -> memoryview:
        return self._bytes(f"data/{storage.key}")

    def _bytes(self, name: str) -> memoryview:
        member = self._members[name]
        data = self._file.window(member.start, member.stop)
        return self._inflated(member, data) if member.compressed else data

    def _inflated(self, member: Member, data: memoryview) -> memoryview:
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            made = stream.decompress(data, member.size + 1)
        except zlib.error as error:
            raise StoreError(f"{self._where}: `{member.name}` is damaged: {error}", code="archive") from None
        if len(made) != member.size:
            raise UnsafeFile(f"{self._where}: refused: `{member.name}` has another size than it says")
        return memoryview(bytearray(made))

    def _require_known(self) -> None:
        for name, member in self._members.items():
            if name not in _SIDE_MEMBERS and name != "data.pkl" and not name.startswith("data/"):
                program = name.startswith("code/") or name == "constants.pkl"
                raise UnsafeFile(
                    f"{self._where}: refused: holds more than tensors: `{shown(member.name)}`"
                    + (", a TorchScript program" if program else ""),
                    details={"member": member.name},
                )
            limit = self._limits.inflated_bytes if member.compressed else self._file.size
            if name == "data.pkl":
                limit = self._limits.header_bytes
            if member.size > limit:
                raise StoreError(
                    f"{self._where}: `{shown(member.name)}` would be {member.size} bytes,"
                    f" more than the limit of {limit}",
                    code="limit",
                )


def _root(members: dict[str, Member], where: str) -> str:
    """The one folder torch puts everything in, with its slash."""
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if not pickles:
        listed = ", ".join(f"`{shown(name)}`" for name in list(members)[:3])
        raise StoreError(
            f"{where}: a zip archive, not a tensor file; it holds {listed or 'nothing'}",
            code="archive",
            hint="unpack it first",
        )
    root = pickles[0].removesuffix("data.pkl")
    stray = [name for name in members if not name.startswith(root)]
    if len(pickles) > 1 or root.count("/") > 1 or stray:
        odd = shown((pickles[1:] + stray + pickles)[0])
        raise UnsafeFile(f"{where}: refused: torch.save writes no `{odd}`", details={"member": odd})
    return root


def _members(file: MappedFile, where: str, limits: Limits) -> dict[str, Member]:
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, OSError) as error:
        raise StoreError(
            f"{where}: a damaged or cut torch file: {shown(error)}",
            code="archive",
            hint="download the file again",
        ) from None
    if len(infos) > limits.tensors:
        raise StoreError(f"{where}: {len(infos)} members, more than the limit", code="limit")
    members: dict[str, Member] = {}
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        fault = _fault(info) or ("it is there twice" if info.filename in members else "")
        if fault or info.header_offset < position or (not members and info.header_offset):
            raise _refused(info, fault or "members overlap, or something lies before the first", where)
        start = _start(file, info, where)
        position = start + info.compress_size
        if position > directory:
            raise _refused(info, "it runs into the directory", where)
        compressed = info.compress_type != zipfile.ZIP_STORED
        members[info.filename] = Member(info.filename, start, position, info.file_size, compressed)
    return members


def _fault(info: zipfile.ZipInfo) -> str:
    """What is wrong with a member by the archive's directory; "" if nothing is."""
    if not info.filename.isprintable() or "\\" in info.filename or ".." in info.filename.split("/"):
        return "its name leaves the archive"
    if info.filename.startswith("/") or info.filename != info.orig_filename:
        return "its name leaves the archive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "it is a link"
    if info.flag_bits & ~_HARMLESS_FLAGS:
        return f"its flags are {info.flag_bits:#06x}"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"its compression is {info.compress_type}"
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        return "its sizes disagree"
    return ""


def _start(file: MappedFile, info: zipfile.ZipInfo, where: str) -> int:
    """Where a member's bytes begin, by its own header, which must tell the same story."""
    header = bytes(file.window(info.header_offset, info.header_offset + _LOCAL_HEADER))
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise _refused(info, "it has no header", where)
    flags, method = int.from_bytes(header[6:8], "little"), int.from_bytes(header[8:10], "little")
    name_length, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    name_start = info.header_offset + _LOCAL_HEADER
    name = bytes(file.window(name_start, name_start + name_length))
    if (flags, method) != (info.flag_bits, info.compress_type) or name != info.filename.encode("utf-8"):
        raise _refused(info, "its header and the directory disagree", where)
    return name_start + name_length + extra


def _refused(info: zipfile.ZipInfo, why: str, where: str) -> UnsafeFile:
    name = shown(info.filename)[:200]
    return UnsafeFile(f"{where}: refused: member `{name}`: {why}", details={"member": name})
