"""What a file is that is no adapter: read from formats/other_files.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import cast

from adapterkit.specs.paths import formats_dir


@cache
def other_files() -> Mapping[str, str]:
    """How a key begins, and what a file with such a key is."""
    return cast(Mapping[str, str], tomllib.loads((formats_dir() / "other_files.toml").read_text("utf-8")))


def known_as(keys: Iterable[str]) -> str | None:
    """What a file with these keys is called ("a ControlNet"), or None if no row of the table fits."""
    every = tuple(keys)
    return next(
        (what for start, what in other_files().items() if any(k.startswith(start) for k in every)), None
    )
