"""Where the tables lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from adapterkit.errors import SpecError


@cache
def formats_dir() -> Path:
    """The folder of the tables: inside the package in a wheel, beside it in a checkout.

    Raises SpecError if neither is there: the package is incomplete.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "formats", package.parent / "formats"):
        if (folder / "networks").is_dir():
            return folder
    raise SpecError(
        f"the tables are missing: no folder `formats` in {package} or beside it",
        code="no-formats",
        hint="install adapterkit again",
    )
