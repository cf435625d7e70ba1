"""Reading tensor files lazily and writing them whole.

Opening reads headers only and needs no torch; nothing in a file is trusted before it is checked,
and nothing in a file is ever run.
"""

from adapterkit.stores.base import DTYPES, Dtype, Limits, Store, TensorInfo
from adapterkit.stores.filling import filling
from adapterkit.stores.header import canonical_order
from adapterkit.stores.memory import memory_store
from adapterkit.stores.opening import open_store
from adapterkit.stores.views import dtype_name, torch_dtype
from adapterkit.stores.writing import DATA_SHA256, Written, write_json, write_safetensors

__all__ = [
    "DATA_SHA256",
    "DTYPES",
    "Dtype",
    "Limits",
    "Store",
    "TensorInfo",
    "Written",
    "canonical_order",
    "dtype_name",
    "filling",
    "memory_store",
    "open_store",
    "torch_dtype",
    "write_json",
    "write_safetensors",
]
