"""A file of torch.save, read without running it and without torch."""

from __future__ import annotations

import math

from adapterkit.errors import StoreError
from adapterkit.stores.base import Limits, TensorInfo
from adapterkit.stores.file_store import FileStore
from adapterkit.stores.guards import shown
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.pickle_world import TensorRef
from adapterkit.stores.sniffing import looks_like_zip
from adapterkit.stores.torch_legacy import TorchLegacy
from adapterkit.stores.torch_zip import TorchZip
from adapterkit.stores.unpacking import unpack


class PickleStore(FileStore):
    """Takes over an open file that begins like a zip archive or a pickle.

    StoreError if it is damaged, UnsafeFile if it would need more than tensors and plain values.
    """

    kind = "pickle"

    def __init__(self, file: MappedFile, limits: Limits) -> None:
        super().__init__(file)
        where = shown(file.path)
        is_zip = looks_like_zip(bytes(file.window(0, 4)))
        self._archive = TorchZip(file, limits) if is_zip else TorchLegacy(file, limits)
        unpacked = unpack(self._archive.value, where, file.path.name, limits)
        self._views = unpacked.tensors
        for name, view in self._views.items():
            _require_inside(name, view, where, limits)
        self.tensors = {name: TensorInfo(name, view.dtype, view.shape) for name, view in self._views.items()}
        self.metadata = unpacked.metadata
        self.warnings = tuple(unpacked.warnings)

    def _window(self, name: str) -> memoryview:
        info = self.info(name)
        view = self._views[name]
        data = self._archive.storage_bytes(view.storage)
        width = _item_bytes(view)
        start = view.offset * width
        if not info.elements or view.strides == _row_major(view):
            return data[start : start + info.nbytes]
        import numpy as np

        # A stride along one element is never walked, and may be too large for numpy.
        axes = zip(view.shape, view.strides, strict=True)
        strides = [0 if size == 1 else stride * width for size, stride in axes]
        gathered = np.ndarray(view.shape, f"u{width}", data, start, strides).copy(order="C")
        return gathered.reshape(-1).view(np.uint8).data


def _item_bytes(view: TensorRef) -> int:
    return TensorInfo("", view.dtype, (1,)).nbytes


def _row_major(view: TensorRef) -> tuple[int, ...]:
    """The strides of a tensor whose rows follow each other; a stride along one element is free."""
    strides, step = [], 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        strides.append(step if size > 1 else stride)
        step *= size
    return tuple(reversed(strides))


def _require_inside(name: str, view: TensorRef, where: str, limits: Limits) -> None:
    """The view stays in its storage, and is no larger: strides of 0 could make terabytes of one number."""
    if len(view.shape) > limits.dimensions:
        raise StoreError(f"{where}: tensor `{name}` has {len(view.shape)} dimensions", code="limit")
    width = _item_bytes(view)
    held = view.storage.elements * view.storage.item_bytes
    # Sizes beside a zero are counted too, because torch's own arithmetic may overflow on them.
    most = math.prod(filter(None, view.shape))
    axes = zip(view.shape, view.strides, strict=True)
    last = view.offset + sum((size - 1) * stride for size, stride in axes)
    reaches = 0 not in view.shape and max(last + 1, most) * width > held
    if reaches or most * width >= 1 << 63:
        raise StoreError(
            f"{where}: tensor `{name}` reaches out of its storage", code="offsets", details={"tensor": name}
        )
