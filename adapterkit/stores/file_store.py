"""What all stores over one mapped file share, whatever the file's format."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from adapterkit.stores.base import Store
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.views import tensor_from

if TYPE_CHECKING:
    import torch


class FileStore(Store):
    """A store whose tensors are windows on one open file, which it takes over.

    A format sets the store's attributes and says which bytes are a tensor's.
    """

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self.path = file.path
        self.size = file.size
        self.sidecars = {}
        self.warnings = ()

    @abstractmethod
    def _window(self, name: str) -> memoryview:
        """A tensor's elements in row-major order, copied only if they lie otherwise."""

    def read(self, name: str) -> memoryview:
        return self._window(name).toreadonly()

    def tensor(self, name: str) -> torch.Tensor:
        return tensor_from(self._window(name), self.info(name))

    def require_unchanged(self) -> None:
        self._file.require_unchanged()

    def release(self) -> None:
        self._file.release()

    def close(self) -> None:
        self._file.close()
