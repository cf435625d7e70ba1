"""LoKr: a delta that is the Kronecker product of two matrices, each possibly factored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, check_fits, cut_shape, mismatch, require_matrices
from adapterkit.deltas.hadamard import half
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.tensors import computing_dtype, written
from adapterkit.errors import Mismatch, UsageError


@dataclass(frozen=True, eq=False)
class Kronecker(Change):
    """scale · w1 ⊗ w2 (arXiv:2309.14859): row (l, k) and column (m, n) of it is w1[l, m] · w2[k, n].

    w1 is (l, m) or w1_a @ w1_b; w2 is (k, n[, h, w]), or w2_a (k, r) @ w2_b (r, n · kernel), or with a
    core t2 (r, r, h, w) between w2_a (r, k) and w2_b (r, n), as in `lycoris/functional/lokr.py`. The
    weight has l · k rows and m · n columns. `weight_shape` tells a flattened kernel's sides.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, whole, a, b in (
            ("w1", self.w1, self.w1_a, self.w1_b),
            ("w2", self.w2, self.w2_a, self.w2_b),
        ):
            if whole is None and (a is None or b is None):
                raise UsageError(f"LoKr needs `{name}`, or `{name}_a` and `{name}_b`", code="roles")
            if whole is not None and (a is not None or b is not None):
                raise UsageError(f"LoKr has both `{name}` and its factors", code="roles")
        if self.t2 is not None and self.w2 is not None:
            raise UsageError("LoKr has both `w2` and a core `t2`", code="roles")
        require_matrices(**self.tensors())
        flat = {"w1": self.w1, "w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a}
        for name, factor in {**flat, "w2_b": None if self.t2 is None else self.w2_b}.items():
            if factor is not None and factor.ndim != 2:
                raise Mismatch(f"`{name}` is {written(factor.shape)}: not a matrix")
        self._check_ranks()
        check_fits("LoKr", self._own_shape, self.weight_shape)

    def _check_ranks(self) -> None:
        if self.w1_a is not None and self.w1_b is not None and self.w1_a.shape[1] != self.w1_b.shape[0]:
            raise mismatch("w1_a", tuple(self.w1_a.shape), "w1_b", tuple(self.w1_b.shape), "ranks differ")
        if self.w2_a is None or self.w2_b is None:
            return
        a, b = tuple(self.w2_a.shape), tuple(self.w2_b.shape)
        if self.t2 is None and a[1] != b[0]:
            raise mismatch("w2_a", a, "w2_b", b, f"ranks {a[1]} and {b[0]} differ")
        if self.t2 is not None and tuple(self.t2.shape[:2]) != (a[0], b[0]):
            raise mismatch("t2", tuple(self.t2.shape), "w2_a", a, "its first axes are not the ranks")

    @property
    def kind(self) -> str:
        return "lokr"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or self._own_shape

    @property
    def rank(self) -> int | None:
        """That of w2's factors, else of w1's; None where neither is factored."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    @property
    def expanded_rank(self) -> int:
        """The product of the ranks that the two matrices can have at most."""
        rows, columns = self.block, math.prod(self.shape[1:]) // self._across
        first, second = [self.shape[0] // rows, self._across], [rows, columns]
        if self.w1_b is not None:
            first.append(self.w1_b.shape[0])
        if self.w2_a is not None:
            second.append(self.w2_a.shape[1] if self.t2 is None else self.w2_a.shape[0])
        return min(first) * min(second)

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("w1",) if self.w1 is not None else ("w1_a",)

    @property
    def block(self) -> int:
        """The rows of w2: rows of the weight can be cut at its multiples only."""
        if self.w2 is not None:
            return self.w2.shape[0]
        assert self.w2_a is not None
        return self.w2_a.shape[0] if self.t2 is None else self.w2_a.shape[1]

    def low_rank(self) -> LowRank:
        """Rank(w1) · rank(w2) by the small factors: (P ⊗ U)(Q ⊗ V) = PQ ⊗ UV."""
        work = computing_dtype(*self.tensors().values())
        up_1, down_1 = _thin(*self._first(work))
        up_2, down_2 = _thin(*self._second(work))
        down = _kron(down_1, down_2)
        return LowRank(_kron(up_1, up_2), down.reshape(down.shape[0], *self.shape[1:]), self.scale)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """w1 and w2 in float64, multiplied out, a kernel flattened and no scale in them."""
        work = torch.float64
        return _multiplied(*self._first(work)), _multiplied(*self._second(work))

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        first, second = (_multiplied(*pair) for pair in (self._first(work), self._second(work)))
        return (_kron(first, second) * self.scale).reshape(self.shape)

    def _take(self, start: int, stop: int) -> Change:
        block = self.block
        if start % block or stop % block:
            raise self._uncut(start, stop, f"they cut through its blocks of {block} rows")
        rows = slice(start // block, stop // block)
        name = self.fold_roles[0]
        first = self.w1 if self.w1 is not None else self.w1_a
        assert first is not None
        return self._with({name: first[rows], "weight_shape": cut_shape(self.weight_shape, start, stop)})

    def _first(self, work: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """w1 as a pair of factors, or (None, whole)."""
        if self.w1_a is not None and self.w1_b is not None:
            return self.w1_a.to(work), self.w1_b.to(work)
        assert self.w1 is not None
        return None, self.w1.to(work)

    def _second(self, work: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """w2 as a pair of factors with the kernel flattened, or (None, whole)."""
        if self.w2_a is not None and self.w2_b is not None:
            core = None if self.t2 is None else self.t2.to(work)
            return half(self.w2_a.to(work), self.w2_b.to(work), core)
        assert self.w2 is not None
        return None, self.w2.flatten(1).to(work)

    @property
    def _own_shape(self) -> tuple[int, ...]:
        first = self.w1 if self.w1 is not None else self.w1_a
        second = self.w2 if self.w2 is not None else self.w2_b
        assert first is not None and second is not None
        kernel = tuple(self.t2.shape[2:]) if self.t2 is not None else tuple(second.shape[2:])
        return (first.shape[0] * self.block, self._across * second.shape[1], *kernel)

    @property
    def _across(self) -> int:
        """The columns of w1."""
        factor = self.w1 if self.w1 is not None else self.w1_b
        assert factor is not None
        return factor.shape[1]


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product; torch's own fails on some strides."""
    return torch.einsum("lm,kn->lkmn", a, b).reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _multiplied(up: Tensor | None, down: Tensor) -> Tensor:
    return down if up is None else up @ down


def _thin(up: Tensor | None, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with no more ranks than the matrix has rows or columns."""
    if up is not None and up.shape[1] <= min(up.shape[0], down.shape[1]):
        return up, down
    whole = _multiplied(up, down)
    rows, columns = whole.shape
    if rows <= columns:
        return torch.eye(rows, dtype=whole.dtype, device=whole.device), whole
    return whole, torch.eye(columns, dtype=whole.dtype, device=whole.device)
