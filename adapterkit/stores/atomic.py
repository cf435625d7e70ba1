"""Files that are either as they were or complete: written aside, made durable, then renamed.

Why not simply write: a program that dies, a full disk or a cut power line would leave half a file under
a good name, and writing over a file that is mapped would change the tensors being read from it.
A rename leaves the old file to whoever has it open.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

from adapterkit.errors import StoreError
from adapterkit.stores.guards import shown, system_failure

if sys.platform != "win32":
    import fcntl

# What is being written is called this until it is whole.
TEMPORARY = ".adapterkit-{}.tmp"
# linux/fcntl.h: AT_FDCWD, and linux/fs.h.
_HERE, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(
    path: Path, needed: int, *, overwrite: bool, check: Callable[[Path], None] | None = None
) -> Iterator[BufferedRandom]:
    """Yield a binary file that takes `path`'s place when the block ends without an error.

    path: a link is followed, and what it points to is replaced. needed: bytes that must be free.
    check: called with the finished temporary file; if it raises, nothing is left behind.
    StoreError when the place is taken, special, unwritable or too small.
    """
    target = destination(path, overwrite)
    _require_space(path, target.parent, needed)
    sweep(target.parent)
    try:
        with _temporary(target) as (temporary, file):
            yield file
            file.flush()
            os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            if sys.platform == "win32":
                # What is open cannot be renamed there; elsewhere its lock holds until it is in place.
                file.close()
            destination(path, overwrite)
            temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise system_failure(path, "cannot be written", error) from error


def destination(path: Path, overwrite: bool) -> Path:
    """The file a write to `path` would create or replace, refused unless it may be."""
    name = shown(path)
    try:
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise StoreError(
                f"{name}: its folder does not exist", code="no-folder", hint="create the folder first"
            )
        if not target.exists():
            return target
        mode = target.stat().st_mode
    except (OSError, ValueError) as error:
        raise system_failure(path, "cannot be written", error) from error
    if stat.S_ISDIR(mode):
        raise StoreError(f"{name}: is a folder", code="special-file", hint="name a file in it")
    if not stat.S_ISREG(mode):
        raise StoreError(f"{name}: not a regular file, so it is not replaced", code="special-file")
    if not overwrite:
        raise StoreError(f"{name}: exists already", code="exists", hint="--force replaces it")
    return target


def _require_space(path: Path, folder: Path, needed: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise system_failure(path, "cannot be written", error) from error
    if free < needed:
        raise StoreError(
            f"{shown(path)}: needs {_amount(needed)}, {_amount(free)} free",
            code="no-space",
            hint="free some space, or write elsewhere",
            details={"needed": needed, "free": free},
        )


def _amount(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, BufferedRandom]]:
    """Yield a new, locked file beside the target, with its permissions; removed if it is still there then."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        temporary = target.parent / TEMPORARY.format(secrets.token_hex(8))
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
                if not _is_ours(file, temporary):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                yield temporary, file
                return
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _is_ours(file: BufferedRandom, path: Path) -> bool:
    """Lock a new file. False if another program swept it away before, as if it had been left behind."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Where nothing can be locked, nothing is swept away either.
        return True
    return path.exists()


@contextlib.contextmanager
def temporary_folder(ground: Path) -> Iterator[Path]:
    """Yield a new folder in `ground`, locked, which is removed in the end if it is still there."""
    with contextlib.ExitStack() as stack:
        while True:
            temporary = ground / TEMPORARY.format(secrets.token_hex(8))
            temporary.mkdir()
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(temporary))
                if temporary.exists():
                    break
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that says that somebody works on a temporary file or folder; OSError if another does."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at one moment; False where the system cannot (Linux: renameat2)."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    paths = (_HERE, os.fsencode(one), _HERE, os.fsencode(other))
    return bool(rename(*paths, _RENAME_EXCHANGE) == 0)


def sweep(folder: Path) -> None:
    """Remove what programs that were killed left half written: it is locked by nobody."""
    if sys.platform == "win32":
        return
    for leftover in folder.glob(TEMPORARY.format("*")):
        # One that is locked, or cannot be removed, harms nobody and is not this write's business.
        with contextlib.suppress(OSError), locked(leftover):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. The file is in place by now, so a refusal is no failure."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
