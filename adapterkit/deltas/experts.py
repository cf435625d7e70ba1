"""LoRA of the weights of a mixture's experts, which are one parameter of three axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, mismatch


@dataclass(frozen=True, eq=False)
class ExpertsLowRank(Change):
    """scale · up_e @ down_e for each of `count` experts e: a change of shape (e, o, i).

    up (o, r · e) counts the experts fastest, down (e · r, i) slowest; a parameter that is (e, i, o)
    gets the transposes (`peft/tuners/lora/layer.py`: ParamWrapper.get_delta_weight).
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or self.count < 1 or down[0] % self.count:
            raise mismatch("up", up, "down", down, f"not {self.count} experts of one rank")

    @property
    def kind(self) -> str:
        return "experts"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, self.up.shape[0], self.down.shape[1])

    @property
    def rank(self) -> int:
        return self.down.shape[0] // self.count

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("up",)

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        count, o, i = self.shape
        super()._check_weight((count, o, i) if weight_shape == (count, i, o) else weight_shape)

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        up = self.up.to(work).reshape(self.up.shape[0], self.rank, self.count)
        down = self.down.to(work).reshape(self.count, self.rank, self.down.shape[1])
        delta = torch.einsum("ore,eri->eoi", up, down).mul_(self.scale)
        return delta.mT if base is not None and base.shape != delta.shape else delta

    def _take(self, start: int, stop: int) -> Change:
        up = self.up.reshape(self.up.shape[0], self.rank, self.count)[:, :, start:stop]
        down = self.down.reshape(self.count, self.rank, -1)[start:stop]
        return replace(self, up=up.flatten(1), down=down.flatten(0, 1), count=stop - start)
