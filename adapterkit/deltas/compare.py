"""How far apart two changes are, as changes of the weight rather than as tensors in a file."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from adapterkit.deltas.change import Change
from adapterkit.deltas.tensors import same, written
from adapterkit.errors import Mismatch, UsageError
from adapterkit.linalg.products import product_inner, product_norm


def relative_error(a: Change, b: Change, base_shape: tuple[int, ...] | None = None, seed: int = 0) -> float:
    """‖a − b‖ / ‖a‖ of the deltas (Frobenius), in float64.

    0 for bit-identical changes and for two that are both zero; infinite where the shapes differ, where
    only b is not zero, or where a value is not finite. Low-rank pairs are compared through their
    factors. Kinds that depend on the base are compared on a seeded random one, of `base_shape` or of
    the shape they know; raises UsageError where neither is known.
    """
    if identical(a, b):
        return 0.0
    if a.shape and b.shape and _size(a) != _size(b):
        return math.inf
    left, right = _factored(a), _factored(b)
    if left is not None and right is not None:
        return _factored_error(left, right)
    base = _random_base(a, b, base_shape, seed) if a.needs_base or b.needs_base else None
    dense_a, dense_b = (_flat(change.dense(base, torch.float64)) for change in (a, b))
    return _ratio(float((dense_a - dense_b).norm()), float(dense_a.norm()))


def cosine(a: Change, b: Change, base: Tensor | None = None) -> float:
    """The cosine of the angle between two deltas; 0 where one is zero.

    Raises UsageError where a kind needs the base and it is not given, Mismatch where the shapes differ.
    """
    if a.shape and b.shape and _size(a) != _size(b):
        raise Mismatch(f"changes of {written(a.shape)} and {written(b.shape)} have no angle between them")
    left, right = _factored(a), _factored(b)
    if left is not None and right is not None:
        inner = product_inner(*left, *right)
        lengths = product_norm(*left) * product_norm(*right)
    else:
        dense_a, dense_b = _flat(a.dense(base, torch.float64)), _flat(b.dense(base, torch.float64))
        inner, lengths = float((dense_a * dense_b).sum()), float(dense_a.norm() * dense_b.norm())
    return inner / lengths if lengths else 0.0


def norm(change: Change, base: Tensor | None = None) -> float:
    """The Frobenius norm of the delta; raises UsageError where the kind needs a base and none is given."""
    factors = _factored(change)
    if factors is not None:
        return product_norm(*factors)
    return float(change.dense(base, torch.float64).norm())


def identical(a: Change, b: Change) -> bool:
    """Whether two changes are of one kind and equal in every field, tensors bit by bit."""
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            equal = same(left, right)
        elif isinstance(left, Change) and isinstance(right, Change):
            equal = identical(left, right)
        else:
            equal = left is right or (type(left) is type(right) and left == right)
        if not equal:
            return False
    return True


def _factored(change: Change) -> tuple[Tensor, Tensor] | None:
    """The delta as (o, r) and (r, i · k) in float64, scale included, where that is less work than dense."""
    rank, shape = change.expanded_rank, change.shape
    if rank is None or not shape or 2 * rank > min(shape[0], math.prod(shape[1:])):
        return None
    small = change.low_rank()
    up, down = small.matrices()
    return up.double() * small.scale, down.double()


def _factored_error(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    (up_a, down_a), (up_b, down_b) = a, b
    difference = product_norm(torch.cat([up_a, -up_b], dim=1), torch.cat([down_a, down_b]))
    return _ratio(difference, product_norm(up_a, down_a))


def _ratio(difference: float, size: float) -> float:
    if difference == 0.0:
        return 0.0
    if size == 0.0 or not math.isfinite(difference / size):
        return math.inf
    return difference / size


def _size(change: Change) -> tuple[int, int]:
    """(rows, elements): what a flattened kernel leaves of a shape."""
    return change.shape[0], math.prod(change.shape)


def _flat(delta: Tensor) -> Tensor:
    """(o, i · k): a kernel, and the ones of a 1x1 convolution, do not make a change another one."""
    return delta.flatten(1) if delta.ndim > 1 else delta


def _random_base(a: Change, b: Change, base_shape: tuple[int, ...] | None, seed: int) -> Tensor:
    """Weights of about the size that real ones have, so that lengths of rows come out near one."""
    shape = base_shape or max(a.shape, b.shape, key=len)
    if not shape:
        raise UsageError("these changes depend on a weight whose shape is not known", code="base-needed")
    generator = torch.Generator().manual_seed(seed)
    fan_in = max(1, math.prod(shape[1:]))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(fan_in)
