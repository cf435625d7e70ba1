"""From bytes to tensors and back, without copies where memory allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import StoreError
from adapterkit.stores.base import DTYPES, NAMES_BY_TORCH, TensorInfo
from adapterkit.stores.guards import shown

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; StoreError for one it has no name for."""
    name = str(dtype).removeprefix("torch.")
    if name not in NAMES_BY_TORCH:
        raise StoreError(f"safetensors has no dtype for torch's `{name}`", code="dtype")
    return NAMES_BY_TORCH[name]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a safetensors name; StoreError where this torch has none."""
    import torch

    dtype = getattr(torch, DTYPES[name].torch, None) if DTYPES[name].torch else None
    if not isinstance(dtype, torch.dtype):
        raise StoreError(f"torch has no dtype for `{name}`", code="dtype")
    return dtype


def tensor_from(data: memoryview, info: TensorInfo) -> torch.Tensor:
    """A tensor viewing writable bytes; a copy only where they are not aligned to the element size."""
    import torch

    dtype = torch_dtype(info.dtype)
    if not info.elements:
        return torch.empty(info.shape, dtype=dtype)
    tensor = torch.frombuffer(data, dtype=torch.uint8)
    if tensor.data_ptr() % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.view(dtype).reshape(info.shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A dense tensor's bytes in row-major order, without a copy if it lies so in main memory."""
    import torch

    if tensor.layout != torch.strided:
        raise StoreError(f"a {shown(tensor.layout)} tensor has no plain bytes", code="dtype")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not plain.numel():
        return memoryview(b"")
    return plain.view(torch.uint8).numpy().data.toreadonly()
