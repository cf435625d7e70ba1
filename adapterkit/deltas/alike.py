"""Several changes of one kind brought to one scale and one number of axes, before they become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from adapterkit.deltas.change import Change
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.tensors import rescaled, written
from adapterkit.errors import Mismatch

Kind = TypeVar("Kind", bound=Change)


def present(parts: Iterable[Kind | None]) -> list[Kind]:
    """The parts that are there."""
    return [part for part in parts if part is not None]


def with_one_scale(parts: Sequence[Kind | None]) -> list[Kind | None]:
    """The parts with the most common scale of them all; the others' factors take the difference.

    The first of equally common ones; 0 only where all are 0. A part of the chosen scale keeps its
    tensors, the others' are rounded once.
    """
    scales = Counter[float](getattr(part, "scale", 1.0) for part in present(parts))
    reference = next((scale for scale, _ in scales.most_common() if scale != 0.0), 0.0)
    return [None if part is None else _with_scale(part, reference) for part in parts]


def plain_low_rank(parts: Sequence[LowRank | None]) -> list[LowRank | None]:
    """The parts without mid, with one scale, and with equally many axes.

    Only some parts of a 1x1 convolution may carry the trailing ones. Raises Mismatch where they do not
    take the same input.
    """
    plain = with_one_scale([part and part.low_rank() for part in parts])
    up_axes = max(part.up.ndim for part in present(plain))
    down_axes = max(part.down.ndim for part in present(plain))
    alike = [
        part and replace(part, up=_with_axes(part.up, up_axes), down=_with_axes(part.down, down_axes))
        for part in plain
    ]
    if len({part.down.shape[1:] for part in present(alike)}) > 1:
        shapes = ", ".join(written(part.down.shape) for part in present(alike))
        raise Mismatch(f"changes with `down` of {shapes} do not have one input")
    return alike


def _with_scale(part: Kind, reference: float) -> Kind:
    scale: float = getattr(part, "scale", reference)
    if scale == reference:
        return part
    factors = {role: rescaled(getattr(part, role), scale / reference) for role in part.fold_roles}
    return part._with({"scale": reference, **factors})


def _with_axes(tensor: Tensor, axes: int) -> Tensor:
    return tensor if tensor.ndim == axes else tensor.reshape(*tensor.shape, *(1,) * (axes - tensor.ndim))
