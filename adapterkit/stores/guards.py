"""Checks shared by all readers: names fit to show, JSON fit to trust, failures of the system in our words."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from adapterkit.errors import Json, StoreError


def shown(text: object) -> str:
    """Text made safe for a terminal: what does not print is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def require_name(name: str, where: str) -> None:
    """StoreError for a name with control, bidi or other invisible characters.

    Such a name can drive a terminal or pass for another one, and no trainer writes it.
    """
    if not name.isprintable():
        raise StoreError(f"{where}: the name `{shown(name)}` holds invisible characters", code="unsafe-name")


def is_folder(path: Path) -> bool:
    """False also for what cannot be looked at, or be a path at all."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """False also for what cannot be looked at, or be a path at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def beside(path: Path, suffix: str) -> Path:
    """A path beside another one: its name and a suffix. What `.` and `..` are has a name of its own."""
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
    return path.parent / (path.name + suffix)


def require_little_endian() -> None:
    """Tensor files are little-endian and are used in place, so a big-endian host would read garbage."""
    if sys.byteorder != "little":
        raise StoreError(
            "big-endian machines are not supported: tensor files are used in place", code="big-endian"
        )


def system_failure(path: Path, what: str, error: OSError | ValueError) -> StoreError:
    """An error of the operating system as ours. `what` is "cannot be read" or the like."""
    reason = getattr(error, "strerror", None) or str(error)
    return StoreError(
        f"{shown(path)}: {what}: {reason.lower()}",
        code="system",
        details={"path": str(path), "errno": getattr(error, "errno", None)},
    )


def strict_json(raw: bytes, where: str) -> Json:
    """Parse JSON that says each thing once: no duplicate keys, NaN, lone surrogates or deep nesting."""
    # RecursionError is not a ValueError; UnicodeDecodeError, JSONDecodeError and overlong integers are.
    try:
        text = raw.decode("utf-8")
        value: Json = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_int=_integer if b"-0" in raw else None,
        )
    except _Twice as twice:
        raise StoreError(
            f"{where}: `{shown(twice.key)}` stands twice in the same object", code="duplicate-key",
            details={"key": twice.key},
        ) from None  # fmt: skip
    except RecursionError:
        raise StoreError(f"{where}: nested too deeply", code="json") from None
    except UnicodeDecodeError as error:
        raise StoreError(f"{where}: not UTF-8 at byte {error.start}", code="json") from None
    except ValueError as error:
        raise StoreError(f"{where}: not valid JSON: {shown(error)}", code="json") from None
    if b"\\ud" in raw.lower():
        _require_no_surrogates(value, where)
    return value


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return made


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int | float:
    # JSON libraries in Rust read -0 as a float, and so refuse it where a size belongs.
    return -0.0 if text == "-0" else int(text)


def _require_no_surrogates(value: Json, where: str) -> None:
    """JSON escapes can spell half a character, which no UTF-8 writer can write again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise StoreError(f"{where}: holds half a character (a lone surrogate)", code="json") from None
