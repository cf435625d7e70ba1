"""PEFT's and LyCORIS's relatives of LoRA that need more than two factors, or something from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, cut_shape, mismatch, require_matrices
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.tensors import computing_dtype
from adapterkit.errors import Unrepresentable


@dataclass(frozen=True, eq=False)
class AdaLora(Change):
    """alpha / (ranknum + 1e-5) · up @ (e ⊙ down), AdaLoRA (arXiv:2303.10512).

    up (o, r), down (r, i), e (r, 1). `scale` is alpha / r with the r of these tensors, as for every
    other kind. ranknum is a number PEFT sets to the rank before pruning and does not save
    (`peft/tuners/adalora/layer.py`, `model.py`: resize_modules_by_rank_pattern), so `initial_rank`
    comes from the configuration; without either, r. Pruning may leave no rank at all.
    """

    up: Tensor
    down: Tensor
    e: Tensor
    ranknum: Tensor | None = None
    scale: float = 1.0
    initial_rank: int | None = None

    def __post_init__(self) -> None:
        up, down, e = tuple(self.up.shape), tuple(self.down.shape), tuple(self.e.shape)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0]:
            raise mismatch("up", up, "down", down, "ranks differ")
        if self.e.numel() != down[0]:
            raise mismatch("e", e, "down", down, "not one value per rank")

    @property
    def kind(self) -> str:
        return "adalora"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("up",)

    @property
    def expanded_rank(self) -> int:
        return max(1, self.rank)

    def low_rank(self) -> LowRank:
        if self.rank == 0:
            return LowRank(self.up.new_zeros(self.shape[0], 1), self.down.new_zeros(1, self.shape[1]))
        work = computing_dtype(self.e, self.down)
        down = self.e.to(work).reshape(-1, 1) * self.down.to(work)
        initial = float(self.ranknum) if self.ranknum is not None else float(self.initial_rank or self.rank)
        return LowRank(self.up, down, self.scale * self.rank / (initial + 1e-5))

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        return self.low_rank().dense(None, work)

    def _take(self, start: int, stop: int) -> Change:
        return replace(self, up=self.up[start:stop])


@dataclass(frozen=True, eq=False)
class Vera(Change):
    """diag(b) · B · diag(d) · A, VeRA (arXiv:2310.11454): b (o), d (r), with A and B shared by all weights.

    A is (r, at least i) and B (at least o, r), of which the first columns and rows count; a file may
    leave them out, to be made from a seed. `weight_shape` tells i.
    """

    b: Tensor
    d: Tensor
    shared_a: Tensor | None = field(default=None, metadata={"role": None})
    shared_b: Tensor | None = field(default=None, metadata={"role": None})
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        a, b = self.shared_a, self.shared_b
        require_matrices(shared_a=a, shared_b=b)
        if a is not None and a.shape[0] != self.d.numel():
            raise mismatch("shared_a", tuple(a.shape), "d", tuple(self.d.shape), "ranks differ")
        if b is not None and (b.shape[1] != self.d.numel() or b.shape[0] < self.b.numel()):
            raise mismatch("shared_b", tuple(b.shape), "b", tuple(self.b.shape), "too small for it")

    @property
    def kind(self) -> str:
        return "vera"

    @property
    def shape(self) -> tuple[int, ...]:
        if self.weight_shape is not None or self.shared_a is None:
            return self.weight_shape or ()
        return (self.b.numel(), self.shared_a.shape[1])

    @property
    def rows(self) -> int:
        return self.b.numel()

    @property
    def rank(self) -> int:
        return self.d.numel()

    @property
    def expanded_rank(self) -> int:
        return self.rank

    def low_rank(self) -> LowRank:
        if self.shared_a is None or self.shared_b is None:
            raise Unrepresentable(
                "VeRA's shared matrices are not in the file",
                code="shared-missing",
                hint="save the adapter with `save_projection=True`",
            )
        work = computing_dtype(self.b, self.d, self.shared_a, self.shared_b)
        up = self.b.to(work).reshape(-1, 1) * self.shared_b[: self.rows].to(work)
        down = self.d.to(work).reshape(-1, 1) * self.shared_a[:, : self.shape[1]].to(work)
        return LowRank(up, down)

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        known = self if base is None or self.weight_shape else replace(self, weight_shape=tuple(base.shape))
        return known.low_rank().dense(None, work)

    def _take(self, start: int, stop: int) -> Change:
        shared_b = None if self.shared_b is None else self.shared_b[start:stop]
        shape = cut_shape(self.weight_shape, start, stop)
        return replace(self, b=self.b[start:stop], shared_b=shared_b, weight_shape=shape)


@dataclass(frozen=True, eq=False)
class TLora(Change):
    """p · diag(lambda) · q less its own initial value, T-LoRA as LyCORIS saves it.

    The initial value is a slice of a decomposition of the base that the file neither holds nor names
    (`lycoris/modules/tlora.py`: sig_type), and how many ranks count depends on the timestep: the
    tensors can be carried, not computed.
    """

    p: Tensor
    q: Tensor
    lambda_: Tensor = field(metadata={"role": "lambda"})
    scale: float = 1.0

    def __post_init__(self) -> None:
        p, q = tuple(self.p.shape), tuple(self.q.shape)
        if len(p) < 2 or len(q) < 2 or p[1] != q[0] or self.lambda_.numel() != q[0]:
            raise mismatch("p", p, "q", q, f"ranks differ, or from the {self.lambda_.numel()} of `lambda`")

    @property
    def kind(self) -> str:
        return "tlora"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.p.shape[0], self.q.shape[1], *self.q.shape[2:])

    @property
    def rank(self) -> int:
        return self.q.shape[0]

    def dense(self, base: Tensor | None = None, dtype: torch.dtype = torch.float32) -> NoReturn:
        """Raises Unrepresentable: what is subtracted from it is not in the file."""
        raise Unrepresentable(
            "T-LoRA's initial values are not in the file, so its delta is not known",
            code="initial-missing",
            hint="keep it in its own format",
        )
