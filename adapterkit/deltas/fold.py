"""The scale of a change, put into its tensors: for files that have no alpha."""

from __future__ import annotations

import dataclasses

import torch

from adapterkit.deltas.change import Change
from adapterkit.deltas.magnitude import Magnitude
from adapterkit.deltas.tensors import scaled


def fold(change: Change, dtype: torch.dtype | None = None) -> tuple[Change, bool]:
    """The same change with scale 1, and whether no bit was lost on the way.

    The scale goes into `up`, or the factor that corresponds to it in another kind, which is rounded
    once, to `dtype` or to its stored dtype. Powers of two fold exactly unless values overflow or
    underflow; a lossy fold in half precision can be made again with `dtype=torch.float32`.
    """
    if isinstance(change, Magnitude):
        inner, exact = fold(change.inner, dtype)
        return dataclasses.replace(change, inner=inner), exact
    if not change.fold_roles:
        return change, True
    scale: float = getattr(change, "scale", 1.0)
    values = {role: scaled(getattr(change, role), scale, dtype) for role in change.fold_roles}
    folded = change._with({"scale": 1.0, **{role: tensor for role, (tensor, _) in values.items()}})
    return folded, all(exact for _, exact in values.values())


def fold_closely(change: Change) -> tuple[Change, bool]:
    """As `fold`, in the stored dtype unless that would lose more than a rounding, then in float32.

    `up` of a barely trained adapter is near 1e-6 and float16 has nothing below 6e-8, so that a scale
    of 1/128 would flush it to zero.
    """
    if isinstance(change, Magnitude):
        inner, exact = fold_closely(change.inner)
        return dataclasses.replace(change, inner=inner), exact
    folded, exact = fold(change)
    if exact or all(_is_close(change, folded, role) for role in change.fold_roles):
        return folded, exact
    return fold(change, torch.float32)


def _is_close(before: Change, after: Change, role: str) -> bool:
    """Whether a factor is its product with the scale to within the precision of its dtype."""
    factor: torch.Tensor = getattr(after, role)
    product = getattr(before, role).double() * getattr(before, "scale", 1.0)
    return bool((factor.double() - product).norm() <= torch.finfo(factor.dtype).eps * product.norm())
