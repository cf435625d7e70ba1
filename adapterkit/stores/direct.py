"""Large files written past the system's cache, where it can be.

What is written by way of the cache is copied page by page into memory that the system has to find first: for
a model of several GB that takes it longer than computing the numbers, and pushes out what others have there.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom
from typing import Protocol

if sys.platform != "win32":
    import fcntl

# Bytes of a buffer: enough for a disk to be busy with, and a multiple of what any disk counts in.
_BUFFER = 4 * 1024 * 1024
# Files shorter than this are read again before the cache has forgotten them.
_LARGE = 1 << 30
# Through the cache. For longer writes Linux looks for larger runs of free memory, which often takes several
# times longer than the copy.
_PIECE = 512 * 1024


class Writer(Protocol):
    """What takes the bytes of a file, in their order."""

    def write(self, data: bytes | memoryview) -> None: ...


@contextmanager
def writing(file: BufferedRandom, size: int) -> Iterator[Writer]:
    """A writer of an empty file that is to be so long; it is whole when the block ends without an error."""
    if size < _LARGE or not _set_direct(file.fileno(), True):
        yield _Cached(file)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        writer = _Direct(file.fileno(), pool)
        yield writer
        writer.finish()
    file.seek(0, os.SEEK_END)


class _Cached:
    def __init__(self, file: BufferedRandom) -> None:
        self._file = file

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            self._file.write(data[start : start + _PIECE])


class _Direct:
    """Fills one buffer while the other is written: memory, place and length are whole blocks of the disk."""

    def __init__(self, descriptor: int, pool: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._pool = pool
        self._buffer, self._other = memoryview(mmap.mmap(-1, _BUFFER)), memoryview(mmap.mmap(-1, _BUFFER))
        self._filled = 0
        self._pending: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            count = min(len(data), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BUFFER:
                self._settle()
                self._pending = self._pool.submit(self._put, self._buffer)
                self._buffer, self._other, self._filled = self._other, self._buffer, 0

    def finish(self) -> None:
        """Write what is left, which is no whole block."""
        self._settle()
        _set_direct(self._descriptor, False)
        self._put(self._buffer[: self._filled])

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _put(self, data: memoryview) -> None:
        while data:
            data = data[self._some(data) :]

    def _some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError:
            # A file system that takes the flag and not the write, or the rest of a write that was cut short.
            # What else may be wrong is still wrong the second time.
            _set_direct(self._descriptor, False)
            return os.write(self._descriptor, data)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether writes to an open file go past the cache from now on, as was asked for."""
    flag = getattr(os, "O_DIRECT", 0)
    if sys.platform == "win32" or not flag:
        return False
    with suppress(OSError):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
        return True
    return False
