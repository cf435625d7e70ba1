"""Changes that hold the numbers themselves: whole deltas, replacements, rows of tokens, new shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, check_fits, cut_shape
from adapterkit.deltas.tensors import written
from adapterkit.errors import Mismatch, UsageError


@dataclass(frozen=True, eq=False)
class Whole(Change):
    """scale · value, added to the weight or put in its place; of any shape, biases and norms included.

    The scale is 1 but for PEFT's bias of the up factor, which its runtime multiplies by alpha / rank.
    """

    value: Tensor
    replaces: bool = False
    scale: float = 1.0

    @property
    def kind(self) -> str:
        return "set" if self.replaces else "diff"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("value",)

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        check_fits(self._title, self.shape, weight_shape)

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        value = self.value.to(work) * self.scale
        if not self.replaces or base is None:
            return value
        return value.reshape(base.shape) - base

    def _take(self, start: int, stop: int) -> Change:
        if self.value.ndim == 0:
            raise self._uncut(start, stop, "it is a single number")
        return replace(self, value=self.value[start:stop])


@dataclass(frozen=True, eq=False)
class Reshape(Change):
    """The weight padded with zeros to a larger shape, before other changes are added to it.

    ComfyUI's `reshape_weight`, which widens the first layer for control and inpainting adapters.
    """

    shape_: Tensor = field(metadata={"role": "shape"})

    @property
    def kind(self) -> str:
        return "reshape"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.shape_.reshape(-1).tolist())

    def widened(self, base: Tensor) -> Tensor:
        """The base in the first corner of zeros. Raises Mismatch where it is larger than the target."""
        target = self.shape
        if base.ndim != len(target) or any(
            size > room for size, room in zip(base.shape, target, strict=True)
        ):
            raise Mismatch(f"a weight of {written(base.shape)} does not fit into {written(target)}")
        result = torch.zeros(target, dtype=base.dtype, device=base.device)
        result[tuple(slice(size) for size in base.shape)] = base
        return result

    def dense(self, base: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of the new shape: against the widened weight there is no difference."""
        return torch.zeros(self.shape, dtype=dtype, device=None if base is None else base.device)


@dataclass(frozen=True, eq=False)
class Tokens(Change):
    """Some rows of an embedding replaced: rows (n, width) stand in the places `indices`.

    PEFT's trainable tokens; despite its name on disk the stored tensor holds values, not differences.
    The places are in the configuration beside the file.
    """

    rows_: Tensor = field(metadata={"role": "rows"})
    indices: tuple[int, ...] | None = None
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows, indices = self.rows_, self.indices
        if rows.ndim != 2 or (indices is not None and len(indices) != rows.shape[0]):
            places = "?" if indices is None else len(indices)
            raise Mismatch(f"`rows` is {written(rows.shape)} for {places} tokens")

    @property
    def kind(self) -> str:
        return "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or ()

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        if base is None or self.indices is None:
            raise UsageError("which tokens the rows replace is not known", code="tokens-unknown")
        delta = torch.zeros_like(base)
        places = list(self.indices)
        delta[places] = self.rows_.to(work) - base[places]
        return delta

    def _take(self, start: int, stop: int) -> Change:
        if self.indices is None:
            raise self._uncut(start, stop, "which tokens the rows replace is not known")
        inside = [place for place, index in enumerate(self.indices) if start <= index < stop]
        return Tokens(
            self.rows_[inside],
            tuple(self.indices[place] - start for place in inside),
            cut_shape(self.weight_shape, start, stop),
        )
