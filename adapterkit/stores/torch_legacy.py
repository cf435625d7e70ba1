"""The file torch.save wrote before 1.6, and still writes on request: five pickles, then the storages.

torch/serialization.py, `_legacy_save`: a magic number, a protocol version, facts about the machine, the
object, the keys of the storages; then for each key a count of elements (8 bytes) and the elements.
"""

from __future__ import annotations

from adapterkit.errors import StoreError
from adapterkit.stores.base import Limits
from adapterkit.stores.guards import shown
from adapterkit.stores.mapped import MappedFile
from adapterkit.stores.pickle_machine import run_pickle
from adapterkit.stores.pickle_world import StorageRef, find_global, set_state, storage_ref

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class TorchLegacy:
    """What the fourth pickle holds (`value`), and the bytes of its storages."""

    def __init__(self, file: MappedFile, limits: Limits) -> None:
        self._file = file
        self._limits = limits
        self._where = shown(file.path)
        self._roots: dict[str, StorageRef] = {}
        self._position = 0
        self._data = file.window(0, min(file.size, limits.header_bytes))
        if self._next() != _MAGIC or self._next() != _PROTOCOL:
            raise StoreError(f"{self._where}: a pickle, but not one of torch.save", code="pickle")
        machine = self._next()
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise StoreError(f"{self._where}: written on a big-endian machine", code="big-endian")
        self.value = self._next()
        self._starts = self._storages(self._next())

    def find(self, module: str, name: str) -> object:
        return find_global(module, name)

    def set_state(self, value: object, state: object) -> bool:
        return set_state(value, state)

    def storage(self, identity: object) -> StorageRef:
        match identity:
            case ("storage", kind, key, _, elements, view):
                root = storage_ref(kind, key, elements)
            case _:
                raise ValueError("a persistent id that is no storage")
        if self._roots.setdefault(root.key, root) != root:
            raise ValueError(f"storage {root.key} is described twice")
        match view:
            case None:
                return root
            case (_, int(first), int(count)) if 0 <= first <= first + count <= root.elements:
                return StorageRef(root.dtype, root.key, count, first)
        raise ValueError("a view that leaves its storage")

    def storage_bytes(self, storage: StorageRef) -> memoryview:
        start = self._starts[storage.key] + storage.first * storage.item_bytes
        return self._file.window(start, start + storage.elements * storage.item_bytes)

    def _next(self) -> object:
        value, self._position = run_pickle(self._data, self, self._where, self._limits, self._position)
        return value

    def _storages(self, keys: object) -> dict[str, int]:
        """Where each storage begins; together they must fill the file."""
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(self._roots):
            raise StoreError(f"{self._where}: its list of storages is wrong", code="pickle")
        starts, position = {}, self._position
        for key in keys:
            root = self._roots[key]
            count = int.from_bytes(self._file.window(position, position + 8), "little")
            if position + 8 <= self._file.size and count != root.elements:
                raise StoreError(f"{self._where}: storage {key} has another size than it says", code="pickle")
            starts[key] = position + 8
            position += 8 + root.elements * root.item_bytes
        if position != self._file.size:
            raise StoreError(
                f"{self._where}: {'cut short' if position > self._file.size else 'more follows'}:"
                f" its storages take {position} bytes, the file has {self._file.size}",
                code="truncated" if position > self._file.size else "trailing-bytes",
            )
        return starts
