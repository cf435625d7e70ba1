"""IA³: every row, or every column, of the weight multiplied by a number."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, cut_shape, mismatch
from adapterkit.deltas.tensors import written
from adapterkit.errors import Mismatch


@dataclass(frozen=True, eq=False)
class Scaling(Change):
    """W' = W · (1 + vector) where additive (LyCORIS), W · vector where not (PEFT); arXiv:2205.05638.

    on_input: a number per input channel, else per row. The vector has one axis longer than one at
    most. `flag` is LyCORIS's stored tensor that says on_input, kept to be written again. PEFT scales
    the layer's output, so there the bias is multiplied by the row's number too: that is another
    weight's change.
    """

    vector: Tensor
    on_input: bool = False
    additive: bool = True
    flag: Tensor | None = field(default=None, metadata={"role": "on_input"})
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.vector.numel() != max(self.vector.shape, default=1):
            raise Mismatch(f"`vector` is {written(self.vector.shape)}: not one number after another")
        if self.weight_shape is not None:
            self._check_weight(self.weight_shape)

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        if weight_shape[int(self.on_input) :][:1] != (self.vector.numel(),):
            lane = "input channel" if self.on_input else "row"
            raise mismatch(
                "vector", tuple(self.vector.shape), "weight", weight_shape, f"not one number per {lane}"
            )

    @property
    def kind(self) -> str:
        return "ia3"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or ()

    @property
    def rows(self) -> int | None:
        if self.on_input:
            return self.weight_shape[0] if self.weight_shape else None
        return self.vector.numel()

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        sides = [1] * base.ndim
        sides[int(self.on_input)] = -1
        factor = self.vector.to(work).reshape(sides)
        return base * (factor if self.additive else factor - 1.0)

    def _take(self, start: int, stop: int) -> Change:
        shape = cut_shape(self.weight_shape, start, stop)
        if self.on_input:
            return replace(self, weight_shape=shape)
        axis = self.long_axis
        return replace(self, vector=self.vector.narrow(axis, start, stop - start), weight_shape=shape)

    @property
    def long_axis(self) -> int:
        """The axis of the stored vector that is not one: files have (n), (n, 1), (1, n) and (1, n, 1, 1)."""
        return max(range(self.vector.ndim), key=lambda axis: self.vector.shape[axis])
