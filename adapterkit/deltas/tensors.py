"""Small operations on stored tensors that torch lacks, or lacks for some dtypes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def written(shape: Sequence[int]) -> str:
    """A shape as our messages spell it: `320x16`."""
    return "x".join(str(size) for size in shape) or "scalar"


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What to compute in when the result is wanted in `dtype`: never below float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def computing_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What to compute in when these stored tensors are the operands: never below float32."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest dtype we write that holds the values of all these tensors.

    float32 stands in for eight-bit floats and integers as soon as dtypes differ: torch promotes none
    of the former.
    """
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    if len(dtypes) == 1:
        return dtypes[0]
    wide = [dtype if _is_wide_float(dtype) else torch.float32 for dtype in dtypes]
    return functools.reduce(torch.promote_types, wide)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so a NaN is the same as itself)."""
    if a is None or b is None:
        return a is b
    if a is b:
        return True
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def scaled(tensor: Tensor, factor: float, dtype: torch.dtype | None = None) -> tuple[Tensor, bool]:
    """tensor · factor, rounded once to `dtype` (the stored one by default), and whether that was exact.

    Exact means that no value was rounded, overflowed or underflowed, so that dividing by the factor
    restores every bit. Integers are not a place for a product: they become float32.
    """
    target = dtype or (tensor.dtype if tensor.dtype.is_floating_point else torch.float32)
    if factor == 1.0 and target == tensor.dtype:
        return tensor, True
    product = tensor.double() * factor
    rounded = product.to(target)
    holds = _significand_bits(tensor.dtype) + _factor_bits(factor) <= _significand_bits(torch.float64)
    zero = not bool(tensor.double().any())
    exact = zero or (factor != 0.0 and holds and torch.equal(rounded.double(), product))
    return rounded, exact


def rescaled(tensor: Tensor, factor: float) -> Tensor:
    """tensor · factor in the stored dtype, or in float32 where that would overflow or flush to zero."""
    rounded, _ = scaled(tensor, factor)
    before, after = tensor.float(), rounded.float()
    kept_finite = torch.equal(before.isfinite(), after.isfinite())
    kept_nonzero = factor == 0.0 or torch.equal(before != 0, after != 0)
    return rounded if kept_finite and kept_nonzero else scaled(tensor, factor, torch.float32)[0]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors on top of each other in their common dtype; the very tensor where there is one."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = common_dtype(tensors)
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def placed(blocks: Sequence[tuple[int, int, Tensor]], shape: Sequence[int]) -> Tensor:
    """A tensor of `shape`, zero but for blocks that begin at (row, column) of its first two axes."""
    tensors = [block for _, _, block in blocks]
    result = torch.zeros(tuple(shape), dtype=common_dtype(tensors), device=tensors[0].device)
    for row, column, block in blocks:
        result[row : row + block.shape[0], column : column + block.shape[1]] = block.to(result.dtype)
    return result


def nonzero_columns(matrix: Tensor) -> Tensor:
    """Which columns hold anything but zeros, of a matrix that may have trailing axes of one."""
    first = matrix[:1].flatten(1).float() != 0
    # The usual case is told from one row.
    return first[0] if bool(first.all()) else (matrix.flatten(1).float() != 0).any(dim=0)


def _is_wide_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _significand_bits(dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:
        return dtype.itemsize * 8
    return round(1.0 / torch.finfo(dtype).eps).bit_length()


def _factor_bits(factor: float) -> int:
    """How many bits a product with it has more; none for a power of two."""
    numerator = abs(factor.as_integer_ratio()[0])
    odd = numerator // (numerator & -numerator) if numerator else 0
    return odd.bit_length() if odd > 1 else 0
