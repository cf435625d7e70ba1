"""Side files in JSON, of bounded size."""

from __future__ import annotations

from pathlib import Path

from adapterkit.errors import Json, StoreError
from adapterkit.stores.guards import shown, strict_json, system_failure
from adapterkit.stores.sniffing import not_a_json_file


def read_json(path: Path, limit: int) -> Json:
    """A JSON file of bounded size. StoreError when it is larger, unreadable or not JSON."""
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= limit else b""
    except OSError as error:
        raise system_failure(path, "cannot be read", error) from error
    if size > limit:
        raise StoreError(
            f"{shown(path)}: {size} bytes, more than the limit of {limit} for a JSON file",
            code="limit",
            details={"size": size, "limit": limit},
        )
    cause = not_a_json_file(path, raw)
    if cause is not None:
        raise cause
    return strict_json(raw, shown(path))
