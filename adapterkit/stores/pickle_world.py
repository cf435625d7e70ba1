"""The few globals a tensor file needs, and what they stand for here. Nothing is imported for them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from adapterkit.stores.base import DTYPES, NAMES_BY_TORCH
from adapterkit.stores.pickle_machine import Constructor


@dataclass(frozen=True, slots=True)
class Named:
    """A class or dtype that is only mentioned, never called."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageType:
    """`torch.HalfStorage` and its like; the dtype by safetensors' name."""

    dtype: str


@dataclass(frozen=True, slots=True)
class StorageRef:
    """Where numbers lie: `elements` of `dtype`, from element `first` of the storage called `key`."""

    dtype: str
    key: str
    elements: int
    first: int = 0

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A view on a storage: offset and strides count elements of dtype."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NumpyDtype:
    """The dtype of a numpy scalar, such as `f8`."""

    name: str


# torch/storage.py, `_new_dtypes` and `_dtype_to_storage_type_map`, v2.6.
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
# Mentioned as the type of a tensor or as a key of a trainer's table, in files people do have.
_MENTIONED = {
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
}
_NUMPY_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
                "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}  # fmt: skip


def find_global(module: str, name: str) -> object:
    """What a global stands for; None if a tensor file has no need of it."""
    full = f"{module}.{name}"
    if module in ("torch", "torch.cuda") and name in _STORAGES:
        return StorageType(_STORAGES[name])
    if full == "torch.storage.UntypedStorage":
        return StorageType("U8")
    if full in _MENTIONED or (module == "torch" and name in NAMES_BY_TORCH):
        return Named(full)
    if full in _MADE:
        return Constructor(full, _MADE[full])
    return None


def set_state(value: object, state: object) -> bool:
    """Only these take a state: a state dict's `_metadata`, which holds no tensor, and a numpy dtype."""
    if isinstance(value, NumpyDtype):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "="):
            return True
        raise ValueError("a numpy dtype that is not little-endian")
    return isinstance(value, dict) and isinstance(state, dict)


def storage_ref(kind: object, key: object, elements: object) -> StorageRef:
    """A storage out of a persistent id; ValueError if the id does not say one."""
    if not isinstance(kind, StorageType) or not isinstance(key, str):
        raise ValueError("a persistent id that is no storage")
    return StorageRef(kind.dtype, key, _size(elements))


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("a size is not a natural number")
    return value


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple):
        raise ValueError("sizes are not a tuple")
    return tuple(_size(value) for value in values)


def _tensor(
    storage: object, offset: object, size: object, stride: object, *rest: object, dtype: str | None = None
) -> TensorRef:
    """torch._utils._rebuild_tensor_v2: what follows the strides are gradients, hooks and math bits."""
    if not isinstance(storage, StorageRef):
        raise ValueError("a tensor without a storage")
    if len(rest) > 2 and rest[2]:
        raise ValueError("a tensor with conjugate or negative bit")
    shape, strides = _sizes(size), _sizes(stride)
    if len(shape) != len(strides):
        raise ValueError("as many strides as dimensions are needed")
    return TensorRef(storage, dtype or storage.dtype, _size(offset), shape, strides)


def _tensor_of_dtype(
    storage: object, offset: object, size: object, stride: object, grad: object, hooks: object, dtype: object,
    *rest: object,
) -> TensorRef:  # fmt: skip
    """torch._utils._rebuild_tensor_v3: for dtypes that have no storage type of their own."""
    name = NAMES_BY_TORCH.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Named) else None
    if name is None:
        raise ValueError("a tensor of an unknown dtype")
    return _tensor(storage, offset, size, stride, grad, hooks, *rest, dtype=name)


def _parameter(data: object, *rest: object) -> object:
    if not isinstance(data, TensorRef):
        raise ValueError("a parameter without a tensor")
    return data


def _typed(make: object, kind: object, arguments: object, state: object) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor that carries Python attributes, which are dropped."""
    if not isinstance(make, Constructor) or make.make is _typed or not isinstance(arguments, tuple):
        raise ValueError("a tensor that is made in an unknown way")
    return _parameter(make.make(*arguments))


def _ordered(pairs: object = ()) -> dict[object, object]:
    if not isinstance(pairs, list | tuple):
        raise ValueError("an ordered dictionary of something odd")
    made = {}
    for key, value in pairs:
        if isinstance(key, tuple | list | dict):
            raise ValueError("a container is used as a key")
        made[key] = value
    return made


def _shape(sizes: object = ()) -> tuple[int, ...]:
    return _sizes(tuple(sizes) if isinstance(sizes, list) else sizes)


def _device(kind: object, index: object = None) -> str:
    if not isinstance(kind, str):
        raise ValueError("a device without a name")
    return kind if index is None else f"{kind}:{_size(index)}"


def _numpy_dtype(name: object, *rest: object) -> NumpyDtype:
    if not isinstance(name, str) or name not in _NUMPY_CODES:
        raise ValueError("an unknown numpy dtype")
    return NumpyDtype(name)


def _numpy_scalar(dtype: object, data: object) -> float | int | bool:
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, bytes):
        raise ValueError("an odd numpy scalar")
    value: float | int | bool = struct.unpack("<" + _NUMPY_CODES[dtype.name], data)[0]
    return value


def _encoded(text: object, encoding: object) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("oddly encoded bytes")
    return text.encode("latin-1")


_MADE: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.Size": _shape,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": _encoded,
}
