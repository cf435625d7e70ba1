"""How many singular values to keep: the rules that merge, extract and resize share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankRule:
    """What the user asks for. At most one of the first five is given; none keeps every value.

    rank: the same for every module, or by kind of layer ("linear", "conv").
    energy: the share of ‖delta‖² to keep, over all modules together.
    error: the relative Frobenius error permitted, over all modules together.
    size: bytes that the written file may have at most.
    auto: what stands out of the noise, module by module.
    least, most: bounds of every module's rank.
    """

    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None
    auto: bool = False
    least: int = 1
    most: int | None = None


@dataclass(frozen=True)
class Spectrum:
    """What the choice of one module's rank rests on.

    values: singular values, descending.  energy: ‖delta‖², values beyond those known included.
    cost: bytes that one more rank takes in the file.  layer: "linear" or "conv".
    full: the least rank that says the change exactly (the smaller side, or the factors' rank).
    noise: singular values up to this are noise (for `auto`).
    weight: what an error of this module counts for, 1 / ‖base weight‖² where the base is known.
    """

    values: tuple[float, ...]
    energy: float
    cost: int
    layer: str
    full: int
    noise: float = 0.0
    weight: float = field(default=1.0)
