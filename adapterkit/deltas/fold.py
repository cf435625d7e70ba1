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
