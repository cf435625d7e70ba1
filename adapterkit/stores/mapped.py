"""A file mapped into memory, with a way out when it cannot be, and a check that it did not change."""

from __future__ import annotations

import mmap
import os
import stat
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from adapterkit.errors import StoreError
from adapterkit.stores.guards import shown, system_failure

_PIECE = 16 * 1024 * 1024


class MappedFile:
    """The bytes of a regular file.

    Pages are mapped copy-on-write, so a tensor viewing them may be written to and the file stays as it is.
    Where mapping is refused (a limit on address space, an odd file system) windows are read instead.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = _open_regular(path)
        self._descriptor = descriptor
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        self.size = status.st_size
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._seeking = threading.Lock()
        self._map: mmap.mmap | None = None
        if self.size:
            with suppress(OSError, ValueError):
                self._map = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_COPY)

    def window(self, start: int, stop: int) -> memoryview:
        """Bytes start to stop, writable, without a copy when the file is mapped.

        StoreError when the file is closed, or was changed: touching a mapped page that was cut off
        would end the process.
        """
        if not self._close_descriptor.alive:
            raise StoreError(f"{shown(self.path)}: already closed", code="closed")
        self.require_unchanged()
        if self._map is not None:
            return memoryview(self._map)[start:stop]
        return memoryview(self._read(start, stop))

    def stream(self) -> BinaryIO:
        """The file for readers that want to seek, at its beginning; close it before taking windows."""
        stream = os.fdopen(os.dup(self._descriptor), "rb")
        stream.seek(0)
        return stream

    def require_unchanged(self) -> None:
        """StoreError if somebody wrote to the file; of a closed one nothing is known."""
        if not self._close_descriptor.alive:
            return
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != self._stamp:
            raise StoreError(
                f"{shown(self.path)}: changed while it was being read",
                code="changed",
                hint="run again when nothing writes to the file",
            )

    def release(self) -> None:
        """Give the pages that were read back to the system; they come again from the file when touched."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError, ValueError):
                self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._close_descriptor()
        if self._map is not None:
            # Views still in use keep the pages; the last of them lets go.
            with suppress(BufferError):
                self._map.close()
            self._map = None

    def _read(self, start: int, stop: int) -> bytearray:
        data, stop = bytearray(), min(stop, self.size)
        try:
            with self._seeking:
                os.lseek(self._descriptor, start, os.SEEK_SET)
                while len(data) < stop - start:
                    piece = os.read(self._descriptor, min(stop - start - len(data), _PIECE))
                    if not piece:
                        raise StoreError(f"{shown(self.path)}: ended early", code="changed")
                    data += piece
        except OSError as error:
            raise system_failure(self.path, "cannot be read", error) from error
        return data


def _open_regular(path: Path) -> int:
    """Open for reading, never a device or pipe: opening a pipe would wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError(f"{shown(path)}: not a regular file", code="special-file")
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise StoreError(f"{shown(path)}: no such file", code="no-file") from None
    except (OSError, ValueError) as error:
        raise system_failure(path, "cannot be read", error) from error
