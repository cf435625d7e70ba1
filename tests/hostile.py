"""Files that lie, built byte by byte, and the means to build more."""

from __future__ import annotations

import json
import struct

DATA = bytes(range(24))
# Two tensors that fill DATA.
GOOD: dict[str, object] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]},
}


def safetensors_bytes(header: dict[str, object] | str | bytes, data: bytes = DATA) -> bytes:
    """A file with whatever header; a str or bytes is taken as it stands."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def one(dtype: object = "F32", shape: object = (2, 3), begin: object = 0, end: object = 24) -> bytes:
    """A file of one tensor, described in whatever way."""
    return safetensors_bytes({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}})


def spans(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    """A file of two tensors at whatever places."""
    return safetensors_bytes(
        {
            name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for name, (begin, end) in {"a": first, "b": second}.items()
        }
    )


# (what it is, bytes, code, what the message says)
BROKEN_SAFETENSORS: list[tuple[str, bytes, str, str]] = [
    ("7 bytes", b"\x08" + bytes(6), "truncated", "too short for a safetensors header"),
    ("cut at 1 %", safetensors_bytes(GOOD)[:9], "truncated", "the header alone takes"),
    ("cut in half", safetensors_bytes(GOOD)[:70], "truncated", "cut short"),
    ("the last byte missing", safetensors_bytes(GOOD)[:-1], "truncated", "the file has"),
    ("trailing bytes", safetensors_bytes(GOOD) + b"PK", "trailing-bytes", ": 2 bytes follow the last tensor"),
    ("header of 2**64 - 1", b"\xff" * 8 + b"{" + bytes(99), "limit", "18446744073709551615"),
    ("header of 2**63", struct.pack("<Q", 1 << 63) + b"{" + bytes(99), "limit", "9223372036854775808"),
    ("header of 100 MB + 1", struct.pack("<Q", 100_000_001) + b"{" + bytes(99), "limit", "100000001"),
    ("nine dimensions", one(shape=[1] * 9), "header", "9 dimensions"),
    ("a million dimensions", one(shape=[1] * 1_000_000), "header", "1000000 dimensions"),
    ("a shape that overflows", one(shape=[1 << 40, 1 << 40]), "header", "does not fill its bytes"),
    ("a shape that overflows before a zero", one(shape=[1 << 62, 9, 0], end=0), "header", "does not fill"),
    ("a negative size", one(shape=[-2, -3]), "header", "non-negative integers"),
    ("a size that is not whole", one(shape=[2.0, 3]), "header", "non-negative integers"),
    ("a size that is true", one(shape=[True, 6]), "header", "non-negative integers"),
    (
        "a size of minus zero",
        safetensors_bytes('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b""),
        "header",
        "non-negative integers",
    ),
    ("sizes as a text", one(shape="23"), "header", "non-negative integers"),
    (
        "three offsets",
        safetensors_bytes({"a": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24, 24]}}),
        "header",
        "two non-negative integers",
    ),
    ("offsets turned round", one(begin=24, end=0), "header", "does not fill its bytes 24 to 0"),
    ("shape and span disagree", one(shape=[2, 2]), "header", "does not fill its bytes 0 to 24"),
    ("half a byte", one("F4", [3], 0, 1), "header", "does not fill"),
    ("an overlap", spans((0, 16), (8, 24)), "offsets", "`b` at byte 8 overlaps `a`"),
    ("a hole", spans((0, 8), (16, 24)), "offsets", "`b` at byte 16 leaves a hole after `a`"),
    ("out of range", spans((0, 16), (16, 240)), "truncated", "cut short"),
    ("a late start", spans((4, 16), (16, 24)), "offsets", "leaves a hole after `the header`"),
    ("an unknown dtype", one("F17"), "header", "unknown dtype `F17`"),
    ("a dtype that is no text", one(["F32"]), "header", "unknown dtype"),
    (
        "an extra field",
        safetensors_bytes({"a": {**GOOD["a"], "x": 1}, "b": GOOD["b"]}),  # type: ignore[dict-item]
        "header",
        "exactly dtype, shape and data_offsets",
    ),
    ("a field missing", safetensors_bytes({"a": {"dtype": "U8", "shape": [24]}}), "header", "exactly"),
    (
        "a tensor twice, same bytes",
        safetensors_bytes(
            '{"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]},'
            '"a":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}'
        ),
        "duplicate-key",
        "`a` stands twice",
    ),
    (
        "a tensor twice, other bytes",
        safetensors_bytes(
            '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
            '"a":{"dtype":"U8","shape":[16],"data_offsets":[8,24]}}'
        ),
        "duplicate-key",
        "`a` stands twice",
    ),
    (
        "a field twice",
        safetensors_bytes('{"a":{"dtype":"U8","dtype":"U8","shape":[24],"data_offsets":[0,24]}}'),
        "duplicate-key",
        "`dtype` stands twice",
    ),
    (
        "metadata twice",
        safetensors_bytes('{"__metadata__":{"k":"1","k":"2"}}', b""),
        "duplicate-key",
        "`k` stands",
    ),
    (
        "metadata of a number",
        safetensors_bytes({"__metadata__": {"k": 1}}, b""),
        "header",
        "`k` is not a string",
    ),
    ("metadata of a list", safetensors_bytes({"__metadata__": ["k"]}, b""), "header", "not an object"),
    ("nested 5000 deep", safetensors_bytes('{"a":' * 5000 + "1" + "}" * 5000), "json", "nested too deeply"),
    (
        "lists nested 100000 deep",
        safetensors_bytes("{" + '"a":' + "[" * 100_000),
        "json",
        "nested too deeply",
    ),
    ("not UTF-8", safetensors_bytes(b'{"\xff":1}'), "json", "not UTF-8 at byte 2"),
    ("a surrogate in UTF-8", safetensors_bytes('{"\ud800":1}'), "json", "not UTF-8"),
    (
        "half a character in a name",
        safetensors_bytes('{"\\ud800":{"dtype":"U8","shape":[24],"data_offsets":[0,24]}}'),
        "json",
        "lone surrogate",
    ),
    (
        "half a character in metadata",
        safetensors_bytes('{"__metadata__":{"k":"\\uDfFf"}}', b""),
        "json",
        "surrogate",
    ),
    ("a NUL in a name", safetensors_bytes({"a\0b": GOOD["a"]}), "unsafe-name", "`a\\x00b`"),
    ("a terminal escape in a name", safetensors_bytes({"\x1b[2J": GOOD["a"]}), "unsafe-name", "`\\x1b[2J`"),
    (
        "a bidi override in a name",
        safetensors_bytes({"a\u202egpj": GOOD["a"]}),
        "unsafe-name",
        "`a\\u202egpj`",
    ),
    (
        "a terminal escape in a metadata key",
        safetensors_bytes({"__metadata__": {"\x9b2J": ""}}, b""),
        "unsafe-name",
        "\\x9b2J",
    ),
    ("NaN in the header", safetensors_bytes('{"a":NaN}'), "json", "NaN is not JSON"),
    ("an endless number", safetensors_bytes('{"a":' + "9" * 5000 + "}"), "json", "not valid JSON"),
    ("an empty header", safetensors_bytes("", b"{" + DATA), "header", "does not begin with"),
    ("JSON that breaks off", safetensors_bytes('{"a":'), "json", "not valid JSON"),
    ("two objects", safetensors_bytes("{}{}"), "json", "not valid JSON"),
]

# Files that are something else: (what, bytes, code, what the message says, what the hint says)
NOT_TENSORS: list[tuple[str, bytes, str, str, str]] = [
    ("an empty file", b"", "empty-file", "an empty file", "download"),
    (
        "a Git LFS pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 239075328\n",
        "lfs-pointer",
        "for a file of 239075328 bytes",
        "git lfs pull",
    ),
    ("a web page", b"\n<!DOCTYPE html><html>", "web-page", "a web page", "log in"),
    ("an XML error", b'<?xml version="1.0"?><Error>', "web-page", "a web page", "log in"),
    ("a JSON error", b'{"error":"Unauthorized"}', "json-file", "JSON", "error message"),
    (
        "JSON with its brace in the wrong place",
        b'{"errs":{"message":"x"}}',
        "json-file",
        "JSON",
        "error message",
    ),
    ("gzip", b"\x1f\x8b\x08" + bytes(40), "other-file", "a gzip archive", "unpack"),
    ("7z", b"7z\xbc\xaf\x27\x1c" + bytes(40), "other-file", "a 7z archive", "unpack"),
    ("rar", b"Rar!\x1a\x07\x01\x00" + bytes(40), "other-file", "a rar archive", "unpack"),
    (
        "tar",
        b"a.safetensors".ljust(257, b"\0") + b"ustar" + bytes(250),
        "other-file",
        "a tar archive",
        "unpack",
    ),
    ("GGUF", b"GGUF\x03\0\0\0" + bytes(40), "gguf", "a GGUF file", "GGUF adapters come later"),
    ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(40), "other-file", "a PNG picture", ""),
    ("zeros", bytes(4096), "truncated", "nothing but zeros", "download"),
    ("text", b"hello, this is no tensor file", "not-tensors", "begins with `hello, this is", ""),
    ("noise", bytes(range(200, 250)), "not-tensors", "begins with `\\\\xc8", ""),
]
