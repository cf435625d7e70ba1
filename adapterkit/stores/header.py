"""The header of a safetensors file: an 8-byte length, JSON, then the tensors' bytes.

Checked in full before any of it is trusted. Stricter than safetensors 0.8 (safetensors/src/tensor.rs):
what is accepted here is accepted there, and not the other way round (duplicate keys, unknown fields,
invisible characters, millions of dimensions are refused here).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeGuard

from adapterkit.errors import Json, StoreError
from adapterkit.stores.base import DTYPES, Limits, TensorInfo
from adapterkit.stores.guards import require_name, shown, strict_json

# The longest header other readers accept: `MAX_HEADER_SIZE` of safetensors/src/tensor.rs.
LONGEST_HEADER = 100_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST_SIZE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in the order of their bytes, where each lies in the data section, and `__metadata__`."""

    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    metadata: dict[str, str]


def parse_header(raw: bytes, data_bytes: int, where: str, limits: Limits) -> Header:
    """Check a header against the number of bytes that follow it. Raises StoreError."""
    if raw[:1] != b"{":
        raise StoreError(f"{where}: the header does not begin with `{{`", code="header")
    parsed = strict_json(raw, f"{where}: header")
    if not isinstance(parsed, dict):
        raise StoreError(f"{where}: the header is not a JSON object", code="header")
    metadata = _metadata(parsed.pop("__metadata__", None), where)
    if len(parsed) > limits.tensors:
        raise StoreError(
            f"{where}: {len(parsed)} tensors, more than the limit of {limits.tensors}", code="limit"
        )
    found = [_entry(name, entry, where, limits) for name, entry in parsed.items()]
    found.sort(key=itemgetter(1))
    _require_cover([(info.name, span) for info, span in found], 8 + len(raw), data_bytes, where)
    return Header(
        tensors={info.name: info for info, _ in found},
        spans={info.name: span for info, span in found},
        metadata=metadata,
    )


def _metadata(value: Json, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StoreError(f"{where}: `__metadata__` is not an object", code="header")
    checked = {}
    for key, text in value.items():
        require_name(key, where)
        if not isinstance(text, str):
            raise StoreError(
                f"{where}: metadata `{key}` is not a string", code="header", details={"key": key}
            )
        checked[key] = text
    return checked


def _entry(name: str, entry: Json, where: str, limits: Limits) -> tuple[TensorInfo, tuple[int, int]]:
    """One tensor: what it is and where it lies."""
    require_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _bad(name, where, "should have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(name, where, f"unknown dtype `{shown(dtype)[:40]}`")
    if isinstance(shape, list) and len(shape) > limits.dimensions:
        raise _bad(name, where, f"{len(shape)} dimensions, more than the limit of {limits.dimensions}")
    if not _sizes(shape):
        raise _bad(name, where, "the shape is not a list of non-negative integers")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _bad(name, where, "data_offsets are not two non-negative integers")
    begin, end = offsets
    if _bytes_needed(dtype, shape) != end - begin:
        raise _bad(name, where, f"{dtype} of shape {shape} does not fill its bytes {begin} to {end}")
    return TensorInfo(name, dtype, tuple(shape)), (begin, end)


def _sizes(value: Json) -> TypeGuard[list[int]]:
    # `type(x) is int`, because a JSON true would pass for 1.
    return isinstance(value, list) and all(type(x) is int and 0 <= x <= _LARGEST_SIZE for x in value)


def _bytes_needed(dtype: str, shape: list[int]) -> int | None:
    """None where other readers' arithmetic overflows or the tensor would end inside a byte."""
    bits = DTYPES[dtype].bits
    # A product may overflow in other readers before they come to a zero.
    if math.prod(filter(None, shape)) * bits > _LARGEST_SIZE:
        return None
    count, rest = divmod(math.prod(shape) * bits, 8)
    return None if rest else count


def _require_cover(spans: list[tuple[str, tuple[int, int]]], start: int, data_bytes: int, where: str) -> None:
    """The tensors lie end to end and fill the file: no hole, no overlap, nothing after the last."""
    previous, position = "the header", 0
    for name, (begin, end) in spans:
        if begin != position:
            what = "overlaps" if begin < position else "leaves a hole after"
            raise StoreError(
                f"{where}: `{name}` at byte {begin} {what} `{previous}`, which ends at {position}",
                code="offsets",
                details={"tensor": name, "previous": previous, "begin": begin, "expected": position},
            )
        previous, position = name, end
    if position != data_bytes:
        raise _wrong_length(start + position, start + data_bytes, where)


def _wrong_length(promised: int, present: int, where: str) -> StoreError:
    details: dict[str, Json] = {"promised": promised, "present": present}
    if present > promised:
        return StoreError(
            f"{where}: {present - promised} bytes follow the last tensor", code="trailing-bytes",
            hint="the file is damaged, or two files in one", details=details,
        )  # fmt: skip
    share = 100 * present // promised
    return StoreError(
        f"{where}: cut short: the header promises {promised} bytes, the file has {present} ({share} %)",
        code="truncated",
        hint="download the file again",
        details=details,
    )


def _bad(name: str, where: str, what: str) -> StoreError:
    return StoreError(f"{where}: tensor `{name}`: {what}", code="header", details={"tensor": name})


def canonical_order(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    """The order safetensors' own writer uses: widest dtype first (by its list of dtypes), then name.

    In this order every tensor is aligned to its element size.
    """
    rank = {name: position for position, name in enumerate(DTYPES)}
    return sorted(infos, key=lambda info: (-rank[info.dtype], info.name))


def build_header(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The length, then compact JSON, `__metadata__` first with its keys sorted, padded to 8 bytes."""
    content: dict[str, Json] = {}
    if metadata:
        content["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    position = 0
    for info in infos:
        end = position + info.nbytes
        content[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
