"""Folders of several files that belong together: all of them are put in place, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterkit.errors import StoreError
from adapterkit.stores.atomic import destination, sweep, temporary_folder
from adapterkit.stores.guards import shown, system_failure


@contextlib.contextmanager
def filling(folder: Path, names: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder; its files take their places in `folder` when the block ends without an error.

    names: of the files to come, as paths from the folder.  A folder that is not there yet is made with
    all of them at once; in one that is there, they are put in place one after another.
    StoreError where a file is in the way, or is there already and may not be replaced.
    """
    ground = existing(folder)
    require_free(folder, names, overwrite)
    sweep(ground)
    try:
        with temporary_folder(ground) as temporary:
            with _called(temporary, folder):
                yield temporary
            put(temporary, folder, names, overwrite)
    except OSError as error:
        raise system_failure(folder, "cannot be written", error) from error


def existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # What can be no path at all says so here.
            folder.stat()
        found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if found.is_dir():
            return found
    except (OSError, ValueError) as error:
        raise system_failure(folder, "cannot be written", error) from error
    raise StoreError(
        f"{shown(folder)}: `{shown(found)}` is a file, and a folder is to be written",
        code="special-file",
        hint="name a folder; it is made if it is missing",
    )


def require_free(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """StoreError where a file of this name is in the way, or is there already and may not be replaced."""
    for name in names:
        _free(folder, name, overwrite)


def _free(folder: Path, name: str, overwrite: bool) -> Path:
    """Where a file will be put; what is there is replaced only if it may be."""
    path = folder / name
    return destination(path, overwrite) if path.parent.is_dir() else path


@contextlib.contextmanager
def _called(temporary: Path, folder: Path) -> Iterator[None]:
    """Errors name the folder that was asked for."""
    try:
        yield
    except StoreError as error:
        error.message = error.message.replace(shown(temporary), shown(folder))
        error.args = (error.message,)
        raise


def put(temporary: Path, folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Put finished files in place: the folder as a whole, or one after another in one that is there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(folder)
        return
    # Somebody may have put files there meanwhile.
    targets = {name: _free(folder, name, overwrite) for name in names}
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).replace(target)
