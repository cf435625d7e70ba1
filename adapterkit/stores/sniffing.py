"""What a file that is not a tensor file really is, told from its first bytes."""

from __future__ import annotations

import re
from pathlib import Path

from adapterkit.errors import StoreError
from adapterkit.stores.guards import shown

# How many bytes `identify` wants to see.
SNIFFED = 4096

_UNPACK = "unpack it first"
# (first bytes, what they mean, what to do)
_KNOWN = (
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (b"\x89HDF", "an HDF5 file (Keras?)", ""),
    (b"\x93NUMPY", "a numpy array", ""),
    (b"\x89PNG", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"RIFF", "a RIFF file (a WebP picture?)", ""),
)


def looks_like_safetensors(head: bytes) -> bool:
    """A length, whatever it is, and the brace of a JSON object; text has no length in front."""
    return head[8:9] == b"{" and not _is_text(head[:8])


def looks_like_zip(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04"


def looks_like_pickle(head: bytes) -> bool:
    """The opcode that says which protocol, 2 to 5, as torch writes it."""
    return len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def not_a_tensor_file(path: Path, head: bytes, size: int) -> StoreError:
    """The true cause, as an error to raise."""
    what, code, hint = _cause(head, size)
    return StoreError(
        f"{shown(path)}: {what}",
        code=code,
        hint=hint,
        details={"path": str(path), "size": size, "begins": head[:16].hex()},
    )


def not_a_json_file(path: Path, raw: bytes) -> StoreError | None:
    """The true cause when a side file is a pointer, a web page or empty."""
    if raw.lstrip()[:1] in (b"{", b"["):
        return None
    return not_a_tensor_file(path, raw[:SNIFFED], len(raw))


def _cause(head: bytes, size: int) -> tuple[str, str, str]:
    """(what it is, code, hint)"""
    again = "download the file again"
    if size == 0:
        return "an empty file", "empty-file", again
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return _pointer(head, size)
    if _is_web_page(head):
        return "a web page, not a tensor file", "web-page", "log in or check the address, then download again"
    if head.lstrip()[:1] in (b"{", b"["):
        return "JSON, not a tensor file", "json-file", "an error message saved by a download, or a side file"
    if head.startswith(b"GGUF"):
        return "a GGUF file", "gguf", "GGUF adapters come later; use the safetensors file it was made from"
    for magic, what, todo in _KNOWN:
        if head.startswith(magic):
            return f"{what}, not a tensor file", "other-file", todo
    if head[257:262] == b"ustar":
        return "a tar archive (or a file of torch before 0.4)", "other-file", _UNPACK
    if size < 10:
        return f"too short for a safetensors header ({size} bytes)", "truncated", again
    if not head.strip(b"\x00"):
        return "begins with nothing but zeros: a download or a copy that broke off", "truncated", again
    begins = shown(head[:16].decode("ascii", "backslashreplace"))
    return f"not a tensor file; it begins with `{begins}`", "not-tensors", ""


def _pointer(head: bytes, size: int) -> tuple[str, str, str]:
    found = re.search(rb"^size (\d{1,18})$", head, re.MULTILINE)
    real = f" for a file of {int(found[1])} bytes" if found else ""
    return f"a Git LFS pointer ({size} bytes){real}", "lfs-pointer", "run `git lfs pull` or `hf download`"


def _is_text(data: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\n\r" for byte in data)


def _is_web_page(head: bytes) -> bool:
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    return start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script"))
