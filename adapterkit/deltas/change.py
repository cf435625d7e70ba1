"""What every kind of change can do; the kinds themselves are in the modules beside this one.

Letters in shapes: o out, i in, r rank, k the product of a kernel's sides, h w a kernel.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from adapterkit.deltas.tensors import working_dtype, written
from adapterkit.errors import Mismatch, Unrepresentable, UsageError
from adapterkit.specs.kinds import KINDS

if TYPE_CHECKING:
    from adapterkit.deltas.low_rank import LowRank


@dataclasses.dataclass(frozen=True, eq=False)
class Change(ABC):
    """What an adapter does to one weight.

    Fields are named by the roles of `adapterkit.specs.kinds` and hold the stored tensors themselves,
    never converted; only results of arithmetic are new tensors. `scale`, where a kind has one, is what
    multiplies the change in memory (alpha / rank for most), never the file's alpha.
    """

    @property
    @abstractmethod
    def kind(self) -> str:
        """The key of `KINDS`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed weight, (o, i[, h, w]) or (n,); () where the tensors do not tell.

        A flattened kernel stays flattened unless the weight's shape was given.
        """

    @property
    def rows(self) -> int | None:
        """The size of the weight's first axis, where it is known."""
        return self.shape[0] if self.shape else None

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by, for the kinds that have one."""
        return None

    @property
    def expanded_rank(self) -> int | None:
        """The rank of `low_rank()`, told without computing it; None where there is no such form."""
        return None

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the weight that is changed."""
        return KINDS[self.kind].needs_base

    @property
    def fold_roles(self) -> tuple[str, ...]:
        """The fields that take the scale when it is folded: each is multiplied by it once."""
        return ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by role, those that are absent left out."""
        held: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            value, role = getattr(self, field.name), field.metadata.get("role", field.name)
            if isinstance(value, Tensor) and role is not None:
                held[role] = value
        return held

    def dense(self, base: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """W' − W at strength 1, in `dtype`, on the base's device and of its shape where a base is given.

        Computed in float32 (float64 if that is wanted) and rounded once.

        Raises UsageError where the kind needs the base and none is given, Mismatch where the base's
        shape is not the change's.
        """
        if base is None and self.needs_base:
            raise UsageError(
                f"{self._title} depends on the weight it changes, and no base was given",
                code="base-needed",
                hint="give the base model",
            )
        work = working_dtype(dtype)
        if base is None:
            return self._delta(None, work).to(dtype)
        self._check_weight(tuple(base.shape))
        return self._on(base.device)._delta(base.to(work), work).reshape(base.shape).to(dtype)

    def require_fit(self, weight_shape: tuple[int, ...]) -> None:
        """Raise Mismatch unless a weight of this shape can be changed."""
        self._check_weight(weight_shape)

    def take(self, start: int, stop: int) -> Change:
        """The change of rows [start, stop) of the weight's first axis, exactly.

        All rows are the change itself. Raises Unrepresentable where a part of this kind cannot say it,
        UsageError where there are no such rows.
        """
        rows = self.rows
        if start < 0 or stop <= start or (rows is not None and stop > rows):
            raise UsageError(f"rows {start}:{stop} are not in a weight of {rows} rows", code="no-such-rows")
        if start == 0 and stop == rows:
            return self
        return self._take(start, stop)

    def low_rank(self) -> LowRank:
        """The same change as up @ down, exactly.

        Factors that had to be computed are float32 (float64 if a stored one is); others are the stored
        tensors. The rank may exceed what the weight's shape allows: the caller decides. Raises
        Unrepresentable where no such form exists without the base.
        """
        raise Unrepresentable(
            f"{self._title} is not a product of two small matrices",
            code="not-low-rank",
            hint=self._way_out,
            details={"kind": self.kind},
        )

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        """Raise Mismatch unless a weight of this shape can be changed."""
        check_fits(self._title, self.shape or (self.rows or weight_shape[0], *weight_shape[1:]), weight_shape)

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        """The delta in `work`; `base` is of that dtype too, and present where the kind needs it."""
        raise UsageError(f"{self._title} has no delta that its tensors alone make", code="no-delta")

    def _take(self, start: int, stop: int) -> Change:
        raise self._uncut(start, stop, "its parts cannot be told apart")

    @property
    def _title(self) -> str:
        return KINDS[self.kind].title

    @property
    def _way_out(self) -> str:
        """What to do where this kind cannot say something: the hint of its refusals."""
        if self.expanded_rank is not None:
            return "`--as lora` expands it exactly first"
        return "keep the weight as it is in the file, or bake the change into the base"

    def _uncut(self, start: int, stop: int, why: str) -> Unrepresentable:
        """The refusal to take rows, with the option that helps where one does."""
        return Unrepresentable(
            f"rows {start}:{stop} cannot be cut from {self._title}: {why}",
            code="cut",
            hint=self._way_out,
            details={"kind": self.kind, "start": start, "stop": stop},
        )

    def _on(self, device: torch.device) -> Self:
        """The same change with its tensors on `device`."""
        moved: dict[str, object] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.device != device:
                moved[field.name] = value.to(device)
            elif isinstance(value, Change):
                moved[field.name] = value._on(device)
        return self._with(moved) if moved else self

    def _with(self, values: Mapping[str, object]) -> Self:
        """The same change with some fields replaced."""
        return dataclasses.replace(self, **values)


def cut_shape(shape: tuple[int, ...] | None, start: int, stop: int) -> tuple[int, ...] | None:
    """The weight's shape when only rows [start, stop) are left of it."""
    return None if shape is None else (stop - start, *shape[1:])


def check_fits(title: str, shape: tuple[int, ...], weight_shape: tuple[int, ...] | None) -> None:
    """Raise Mismatch unless the weight has the rows and elements of the change, or is not known."""
    if weight_shape is None:
        return
    if shape[:1] != weight_shape[:1] or math.prod(shape) != math.prod(weight_shape):
        raise Mismatch(
            f"{title} makes a change of {written(shape)} but the weight is {written(weight_shape)}",
            code="weight-shape",
            details={"change": list(shape), "weight": list(weight_shape)},
        )


def require_matrices(**tensors: Tensor | None) -> None:
    """Raise Mismatch unless each that is there has two axes at least, and none without elements."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.ndim < 2 or 0 in tensor.shape):
            raise Mismatch(
                f"`{name}` is {written(tensor.shape)}: not a matrix of one row and column at least",
                details={name: list(tensor.shape)},
            )


def mismatch(
    name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...], why: str
) -> Mismatch:
    """The error that two tensors of one change do not fit each other."""
    return Mismatch(
        f"`{name}` is {written(shape)} but `{other}` is {written(other_shape)}: {why}",
        details={name: list(shape), other: list(other_shape)},
    )
