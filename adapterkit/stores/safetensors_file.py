"""A safetensors file, mapped."""

from __future__ import annotations

from adapterkit.errors import StoreError
from adapterkit.stores.base import Limits
from adapterkit.stores.file_store import FileStore
from adapterkit.stores.guards import shown
from adapterkit.stores.header import parse_header
from adapterkit.stores.mapped import MappedFile


class SafetensorsStore(FileStore):
    """Takes over an open file whose first bytes look like safetensors; StoreError if the header is wrong."""

    kind = "safetensors"

    def __init__(self, file: MappedFile, limits: Limits) -> None:
        super().__init__(file)
        where = shown(file.path)
        length = int.from_bytes(file.window(0, 8), "little")
        if length > limits.header_bytes:
            raise StoreError(
                f"{where}: a header of {length} bytes, more than the limit of {limits.header_bytes}",
                code="limit",
                details={"header_bytes": length, "limit": limits.header_bytes},
            )
        if length > file.size - 8:
            raise StoreError(
                f"{where}: cut short: the header alone takes {length + 8} bytes, the file has {file.size}",
                code="truncated",
                hint="download the file again",
                details={"promised": length + 8, "present": file.size},
            )
        self._start = 8 + length
        header = parse_header(bytes(file.window(8, self._start)), file.size - self._start, where, limits)
        self._spans = header.spans
        self.tensors = header.tensors
        self.metadata = header.metadata

    def _window(self, name: str) -> memoryview:
        self.info(name)
        begin, end = self._spans[name]
        return self._file.window(self._start + begin, self._start + end)
