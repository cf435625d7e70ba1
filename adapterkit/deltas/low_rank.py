"""LoRA: a delta that is a product of two thin matrices, possibly with a small core between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, mismatch, require_matrices
from adapterkit.deltas.tensors import computing_dtype, nonzero_columns


@dataclass(frozen=True, eq=False)
class LowRank(Change):
    """scale · up @ down, for linear layers and convolutions.

    A linear up is (o, r), down (r, i). A convolution's down is (r, i, h, w) and its up (o, r, 1, 1);
    either may be stored without its trailing ones. With `mid` (r, r, h, w) the kernel is in the middle
    (LyCORIS calls it Tucker, `lycoris/functional/general.py`: tucker_weight_from_conv):
    delta[o, i, h, w] = scale · Σ up[o, m] mid[m, n, h, w] down[n, i].
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        up, down, mid = tuple(self.up.shape), tuple(self.down.shape), self.mid
        require_matrices(up=self.up, down=self.down, mid=mid)
        if any(side != 1 for side in up[2:]):
            raise mismatch("up", up, "down", down, "a kernel belongs to down, not to up")
        if mid is None and up[1] != down[0]:
            raise mismatch("up", up, "down", down, f"ranks {up[1]} and {down[0]} differ")
        if mid is not None:
            self._check_mid(up, down, tuple(mid.shape))

    def _check_mid(self, up: tuple[int, ...], down: tuple[int, ...], mid: tuple[int, ...]) -> None:
        if mid[0] != up[1]:
            raise mismatch("up", up, "mid", mid, "its first axis is not the rank of up")
        if mid[1] != down[0] or any(side != 1 for side in down[2:]):
            raise mismatch("down", down, "mid", mid, "its second axis is not down's rank")

    @property
    def kind(self) -> str:
        return "lora"

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's sides, () for a linear layer."""
        if self.mid is not None:
            return tuple(self.mid.shape[2:])
        return tuple(self.down.shape[2:]) or (1,) * (self.up.ndim - 2)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1], *self.kernel)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def expanded_rank(self) -> int:
        return self.up.shape[1]

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("up",)

    def low_rank(self) -> LowRank:
        if self.mid is None:
            return self
        work = computing_dtype(self.mid, self.down)
        down = torch.einsum("mn...,ni->mi...", self.mid.to(work), self.down.flatten(1).to(work))
        return replace(self, down=down, mid=None)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(up, down) as plain matrices (o, r) and (r, i · k), with mid multiplied in and no scale."""
        plain = self.low_rank()
        return plain.up.flatten(1), plain.down.flatten(1)

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        up, mid, down = self.up.flatten(1).to(work), self.mid, self.down.flatten(1).to(work)
        if mid is not None:
            down = torch.einsum("mn...,ni->mi...", mid.to(work), down).flatten(1)
        return (up @ down).mul_(self.scale).reshape(self.shape)

    def _take(self, start: int, stop: int) -> Change:
        up = self.up[start:stop]
        used = nonzero_columns(up)
        # Zero columns are other members of a block-diagonal fuse; if all are, the adapter is untrained.
        if self.mid is not None or bool(used.all()) or not bool(used.any()):
            return replace(self, up=up)
        return replace(self, up=up[:, used], down=self.down[used])


@dataclass(frozen=True, eq=False)
class EmbeddingLowRank(LowRank):
    """LoRA of an embedding: up (vocabulary, r), down (r, width), as for any other weight.

    PEFT stores the transposes of both; layouts put the axes right before they come here.
    """

    @property
    def kind(self) -> str:
        return "embedding"
