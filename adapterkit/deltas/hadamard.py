"""LoHa: a delta that is the elementwise product of two products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, check_fits, cut_shape, mismatch, require_matrices
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.tensors import computing_dtype, nonzero_columns
from adapterkit.errors import UsageError


@dataclass(frozen=True, eq=False)
class Hadamard(Change):
    """scale · (w1_a @ w1_b) ⊙ (w2_a @ w2_b), FedPara's product (arXiv:2108.06098).

    w*_a is (o, r), w*_b (r, i · k), flattened for convolutions. With cores t* (r, r, h, w) the
    factors are w*_a (r, o) and w*_b (r, i), and each half is
    half[p, q, h, w] = Σ t[m, n, h, w] w_a[m, p] w_b[n, q].
    (`lycoris/functional/loha.py`.) `weight_shape` is the changed weight's, needed only to tell the
    input channels of a flattened kernel apart.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise UsageError("`t1` and `t2` belong together: one of them is missing", code="roles")
        _check_half("1", self.w1_a, self.w1_b, self.t1)
        _check_half("2", self.w2_a, self.w2_b, self.t2)
        first, second = tuple(self.w1_b.shape[1:]), tuple(self.w2_b.shape[1:])
        if self._out(self.w1_a) != self._out(self.w2_a):
            raise mismatch("w1_a", tuple(self.w1_a.shape), "w2_a", tuple(self.w2_a.shape), "rows differ")
        if first != second or self._kernel(self.t1) != self._kernel(self.t2):
            raise mismatch("w1_b", tuple(self.w1_b.shape), "w2_b", tuple(self.w2_b.shape), "columns differ")
        check_fits("LoHa", self._own_shape, self.weight_shape)

    @property
    def kind(self) -> str:
        return "loha"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or self._own_shape

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def expanded_rank(self) -> int:
        """r²: the product over every pair of ranks."""
        ranks = [a.shape[1] if self.t1 is None else a.shape[0] for a in (self.w1_a, self.w2_a)]
        return ranks[0] * ranks[1]

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("w1_a",)

    def low_rank(self) -> LowRank:
        up_1, down_1 = self._half(self.w1_a, self.w1_b, self.t1)
        up_2, down_2 = self._half(self.w2_a, self.w2_b, self.t2)
        up = torch.einsum("pm,pn->pmn", up_1, up_2).flatten(1)
        down = torch.einsum("mq,nq->mnq", down_1, down_2).flatten(0, 1)
        return LowRank(up, down.reshape(down.shape[0], *self.shape[1:]), self.scale)

    def _half(self, a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
        """One half as (o, r) and (r, i · k)."""
        work = computing_dtype(*self.tensors().values())
        return half(a.to(work), b.to(work), None if core is None else core.to(work))

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        cores = [None if core is None else core.to(work) for core in (self.t1, self.t2)]
        up_1, down_1 = half(self.w1_a.to(work), self.w1_b.to(work), cores[0])
        up_2, down_2 = half(self.w2_a.to(work), self.w2_b.to(work), cores[1])
        return (up_1 @ down_1).mul_(up_2 @ down_2).mul_(self.scale).reshape(self.shape)

    def _take(self, start: int, stop: int) -> Change:
        shape = cut_shape(self.weight_shape, start, stop)
        if self.t1 is not None:
            a_1, a_2 = self.w1_a[:, start:stop], self.w2_a[:, start:stop]
            return replace(self, w1_a=a_1, w2_a=a_2, weight_shape=shape)
        a_1, a_2 = self.w1_a[start:stop], self.w2_a[start:stop]
        if self.w1_b.shape[0] == self.w2_b.shape[0]:
            # Ranks that are zero in both halves are other members of a block-diagonal fuse.
            used = nonzero_columns(a_1) | nonzero_columns(a_2)
            if bool(used.any()) and not bool(used.all()):
                b_1, b_2 = self.w1_b[used], self.w2_b[used]
                return replace(
                    self, w1_a=a_1[:, used], w1_b=b_1, w2_a=a_2[:, used], w2_b=b_2, weight_shape=shape
                )
        return replace(self, w1_a=a_1, w2_a=a_2, weight_shape=shape)

    @property
    def _own_shape(self) -> tuple[int, ...]:
        return (self._out(self.w1_a), *self.w1_b.shape[1:], *self._kernel(self.t1))

    def _out(self, a: Tensor) -> int:
        return a.shape[0] if self.t1 is None else a.shape[1]

    @staticmethod
    def _kernel(core: Tensor | None) -> tuple[int, ...]:
        return () if core is None else tuple(core.shape[2:])


def half(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o, r) and (r, i · k) whose product is `a @ b`, or the core between the transposed a and b."""
    if core is None:
        return a.flatten(1), b.flatten(1)
    return a.T, torch.einsum("mn...,nq->mq...", core, b).flatten(1)


def _check_half(number: str, a: Tensor, b: Tensor, core: Tensor | None) -> None:
    shape_a, shape_b = tuple(a.shape), tuple(b.shape)
    names = f"w{number}_a", f"w{number}_b"
    require_matrices(**{names[0]: a, names[1]: b, f"t{number}": core})
    if core is None:
        if shape_a[1] != shape_b[0]:
            raise mismatch(
                names[0], shape_a, names[1], shape_b, f"ranks {shape_a[1]} and {shape_b[0]} differ"
            )
        return
    shape = tuple(core.shape)
    if len(shape_b) != 2 or shape[:2] != (shape_a[0], shape_b[0]):
        raise mismatch(
            f"t{number}",
            shape,
            names[0],
            shape_a,
            f"its first axes are not the ranks of it and of `{names[1]}`",
        )
