"""Folders that take long to write: what is finished stays when the rest fails, and is not written again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterkit.errors import AdapterkitError, Json, StoreError
from adapterkit.stores.atomic import TEMPORARY, exchange, locked, sweep
from adapterkit.stores.base import DEFAULT_LIMITS
from adapterkit.stores.filling import existing, put, require_free
from adapterkit.stores.guards import beside, is_file, shown, system_failure
from adapterkit.stores.json_files import read_json
from adapterkit.stores.writing import write_json

SUFFIX = ".partial"
_JOURNAL = ".adapterkit-journal.json"


@dataclass
class Partial:
    """A folder that is being filled.

    request: what it is being filled with, so that no other request goes on with it.
    finished: by the path of each file that is complete, what was noted of it, its hash included.
    """

    path: Path
    request: str
    finished: dict[str, dict[str, Json]] = field(default_factory=dict)

    def finish(self, name: str, facts: dict[str, Json]) -> None:
        """Note that a file is complete. facts: its `sha256` or "", and its `size`, at least."""
        self.finished[name] = facts
        self.note()

    def note(self) -> None:
        """Write down what is finished."""
        document: Json = {"request": self.request, "files": dict(self.finished)}
        write_json(self.path / _JOURNAL, document, overwrite=True)


@contextlib.contextmanager
def partial_folder(
    folder: Path, names: Sequence[str], request: str, *, overwrite: bool, resume: bool
) -> Iterator[Partial]:
    """Yield a folder beside `folder`; its files take their places when the block ends without an error.

    names: of the files to come.  resume: keep the files that an earlier run for the same request finished.
    When the block fails, finished files stay for a run that resumes, unless it was refused.
    StoreError where a file is in the way, somebody else is at work, or there is nothing to go on with.
    """
    existing(folder)
    require_free(folder, names, overwrite)
    target = Path(os.path.realpath(folder))
    place = beside(target, SUFFIX)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        if place.exists():
            _require_ours(place)
            if not resume:
                _remove(place)
        place.mkdir(exist_ok=True)
        with locked(place):
            partial = Partial(place, request, _finished(place, request) if resume else {})
            partial.note()
            try:
                yield partial
            except BaseException as error:
                refused = isinstance(error, AdapterkitError) and not isinstance(error, StoreError)
                if refused or not partial.finished:
                    shutil.rmtree(place, ignore_errors=True)
                raise
            _put(place, target, names, overwrite)
    except BlockingIOError:
        raise StoreError(
            f"{shown(place)}: another run is at work there",
            code="busy",
            hint="wait for it, or choose another name for the output",
        ) from None
    except OSError as error:
        raise system_failure(folder, "cannot be written", error) from error


def _require_ours(place: Path) -> None:
    others = set(place.iterdir()) - set(place.glob(TEMPORARY.format("*")))
    if not is_file(place / _JOURNAL) and others:
        raise StoreError(
            f"{shown(place)}: is needed for what is not finished yet, and holds something else",
            code="exists",
            hint="move it away, or choose another name for the output",
        )


def _remove(place: Path) -> None:
    with locked(place):
        shutil.rmtree(place)


def _put(place: Path, folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Put a finished folder in place: as a whole, so that nobody sees old files beside new ones."""
    require_free(folder, names, overwrite)
    temporary = place.with_name(TEMPORARY.format(secrets.token_hex(8)))
    place.rename(temporary)
    try:
        (temporary / _JOURNAL).unlink(missing_ok=True)
        if not (
            _is_replaced(folder) and _takes_over(temporary, folder, names) and exchange(temporary, folder)
        ):
            put(temporary, folder, names, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_replaced(folder: Path) -> bool:
    """Whether a folder may become another one: not if it is empty, or somebody's shell is in it."""
    return folder.exists() and any(folder.iterdir()) and folder not in (Path.cwd(), *Path.cwd().parents)


def _takes_over(new: Path, old: Path, names: Sequence[str]) -> bool:
    """Let a new folder have what an old one has beside `names` as well; False where that cannot be."""
    replaced = set(names)
    try:
        shutil.copystat(old, new)
        for path in sorted(old.rglob("*")):
            name = path.relative_to(old)
            if path.is_dir() and not path.is_symlink():
                (new / name).mkdir(exist_ok=True)
                shutil.copystat(path, new / name)
            elif name.as_posix() not in replaced:
                os.link(path, new / name, follow_symlinks=False)
    except OSError:
        return False
    return True


def _finished(place: Path, request: str) -> dict[str, dict[str, Json]]:
    """What an earlier run finished and is still as it was; the rest is removed."""
    journal = place / _JOURNAL
    if not is_file(journal):
        return {}
    found = read_json(journal, DEFAULT_LIMITS.json_bytes)
    if not isinstance(found, dict) or found.get("request") != request:
        raise StoreError(
            f"{shown(place)}: was begun with another base, other adapters or other options",
            code="resume",
            hint="give the same ones, or leave --resume away to begin anew",
        )
    files = found.get("files")
    noted = files if isinstance(files, dict) else {}
    finished = {
        name: facts
        for name, facts in noted.items()
        if isinstance(facts, dict) and _is_as_noted(place / name, facts)
    }
    for path in place.rglob("*"):
        if path.relative_to(place).as_posix() not in (*finished, _JOURNAL) and not path.is_dir():
            path.unlink()
    return finished


def _is_as_noted(path: Path, facts: dict[str, Json]) -> bool:
    """Whether a file is what was finished: by its hash, or by its size where none was wanted."""
    if not is_file(path):
        return False
    if digest := facts.get("sha256"):
        return _digest(path) == digest
    return path.stat().st_size == facts.get("size")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
