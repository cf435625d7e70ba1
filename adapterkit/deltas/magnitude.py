"""DoRA: a change after which every row, or every column, of the weight gets a given length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from adapterkit.deltas.change import Change
from adapterkit.deltas.tensors import written
from adapterkit.errors import Mismatch

Axis = Literal["out", "in"]


@dataclass(frozen=True, eq=False)
class Magnitude(Change):
    """W' = vector · V / ‖V‖ with V = W + inner's delta (arXiv:2402.09353), over any inner kind.

    axis "out": a length per row of the weight, as PEFT, ai-toolkit and newer LyCORIS write it.
    axis "in": a length per column (input channel), the kernel included, as older LyCORIS and
    OneTrainer write it, and PEFT for embeddings. `vector` has one axis and the stored dtype.
    axes: how many a convolution's vector had in its file, which the inner change need not tell: the
    factors of some kinds flatten the kernel.
    """

    inner: Change
    vector: Tensor
    axis: Axis = "out"
    axes: int = 0

    def __post_init__(self) -> None:
        shape, axis = self.inner.shape, 0 if self.axis == "out" else 1
        if self.vector.ndim != 1 or (axis < len(shape) and not self._fits(shape, axis)):
            raise Mismatch(
                f"`magnitude` is {written(self.vector.shape)} but the weight is {written(shape)}: "
                f"not one length per {'row' if axis == 0 else 'column'}",
                details={"magnitude": list(self.vector.shape), "weight": list(shape)},
            )

    def _fits(self, shape: tuple[int, ...], axis: int) -> bool:
        # A kernel that is stored flattened hides the number of input channels.
        size, count = shape[axis], self.vector.shape[0]
        return size == count or (axis == 1 and len(shape) == 2 and count > 0 and size % count == 0)

    @property
    def kind(self) -> str:
        return "magnitude"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rows(self) -> int | None:
        return self.inner.rows

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def needs_base(self) -> bool:
        return True

    def tensors(self) -> dict[str, Tensor]:
        """The inner change's tensors by role, and `magnitude`."""
        return {**self.inner.tensors(), "magnitude": self.vector}

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        moved = base + self.inner.dense(base, work)
        axis = 0 if self.axis == "out" else 1
        others = [other for other in range(base.ndim) if other != axis]
        lengths = torch.linalg.vector_norm(moved, dim=others, keepdim=True, dtype=torch.float64).to(work)
        vector = self.vector.to(work).reshape(lengths.shape)
        # A row of zeros has no direction: it stays zero instead of becoming 0 / 0.
        direction = moved / lengths.clamp_min(torch.finfo(work).tiny)
        lengthened: Tensor = direction * vector
        return lengthened - base

    def _take(self, start: int, stop: int) -> Change:
        if self.axis == "in":
            raise self._uncut(start, stop, "the length of a column is that of all its rows")
        return replace(self, inner=self.inner.take(start, stop), vector=self.vector[start:stop])

    @property
    def _title(self) -> str:
        return f"DoRA over {self.inner._title}"
