"""What the arguments of `convert` stand for: each adapter to read, and where its result goes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterkit.errors import StoreError, UsageError


def adapters(source: str) -> list[str]:
    """The adapters behind one argument: itself, or all that lie in a folder that is none itself."""
    from adapterkit.operations.sources import store_of

    if not Path(source).is_dir():
        return [source]
    try:
        store_of(source).close()
    except StoreError as error:
        inside = [str(path) for path in sorted(Path(source).iterdir()) if _is_adapter(path)]
        if error.code in {"several", "no-file"} and inside:
            return inside
    return [source]


def _is_adapter(path: Path) -> bool:
    """A tensor file, or the folder of a PEFT adapter."""
    from adapterkit.stores.folders import ADAPTER_FILES, CONFIG

    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any((path / name).is_file() for name in (CONFIG, *ADAPTER_FILES))
    return path.name.lower().endswith(_tensor_suffixes())


def home(sources: Sequence[str], output: str, to: str) -> Path | None:
    """The folder in which results get names of their own; None if `output` is the name of the only one.

    Several results are put into a folder, and so is one if `output` is a folder or ends in a slash.
    UsageError if a file is in its place.
    """
    from adapterkit.stores.guards import shown

    existing = Path(output).is_dir() and not _writes_folders(to)
    if len(sources) == 1 and not existing and not output.endswith((os.sep, os.altsep or os.sep)):
        return None
    if Path(output).exists() and not Path(output).is_dir():
        raise UsageError(
            f"`{shown(output)}` is a file, and {len(sources)} results need a folder",
            hint="name a folder with -o; it is made if it is missing",
        )
    return Path(output)


def results(sources: Sequence[str], output: str, to: str) -> dict[str, Path]:
    """Where the result of each source goes. UsageError if two would get the same name."""
    folder = home(sources, output, to)
    if folder is None:
        return {sources[0]: Path(output)}
    suffix = "" if _writes_folders(to) else f".{to}.safetensors"
    places = {source: folder / f"{stem(source)}{suffix}" for source in sources}
    _require_distinct(places)
    return places


@contextmanager
def made(folder: Path | None) -> Iterator[None]:
    """Make a folder if it is missing; what was made goes again if nothing came into it."""
    if folder is None:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def stem(source: str) -> str:
    """The name of an adapter without what says its format: `style` of `style.safetensors`."""
    name = Path(source).resolve().name
    for suffix in _tensor_suffixes():
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _tensor_suffixes() -> tuple[str, ...]:
    """The longest first: an index of shards ends in .safetensors.index.json."""
    from adapterkit.stores.files import PICKLE_SUFFIXES
    from adapterkit.stores.sharded import INDEX_SUFFIX

    return (f".safetensors{INDEX_SUFFIX}", INDEX_SUFFIX, ".safetensors", *PICKLE_SUFFIXES)


def _require_distinct(places: dict[str, Path]) -> None:
    from adapterkit.stores.guards import shown

    owners: dict[Path, str] = {}
    for source, place in places.items():
        if (other := owners.setdefault(place, source)) is not source:
            raise UsageError(
                f"`{shown(other)}` and `{shown(source)}` would both be written to `{shown(place)}`",
                hint="convert them one at a time, each with a name of its own",
            )


def _writes_folders(to: str) -> bool:
    from adapterkit.operations.catalogue import formats
    from adapterkit.specs.layouts import layouts

    return any(bool(layouts()[known.layout].folder) for known in formats() if known.name == to)
