"""What a method of merging may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from adapterkit.errors import Json, UsageError

Divide = Literal["strengths", "count", "nothing"]
Inner = Literal["ties", "dare", "dare-ties", "magnitude"]


@dataclass(frozen=True)
class Settings:
    """How a method works; each method uses what concerns it.

    density: the share of numbers that sparse methods keep of each delta.
    divide: what TIES divides the numbers of one sign by: the sum of the sizes of their strengths, so
    that the result is their mean (mergekit's `normalize`), their count, or nothing.
    inner: what KnOTS and Core Space do to the numbers in their bases.
    seed: of the numbers that DARE drops.
    strength: of the result as a whole; the λ of the papers.
    """

    density: float = 0.5
    divide: Divide = "strengths"
    inner: Inner = "ties"
    seed: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(
                f"a density of {self.density:g} is no share",
                code="merge-setting",
                hint="it is the share of numbers to keep, above 0 and at most 1",
            )
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise UsageError(
                f"a merged adapter cannot have strength {self.strength:g} as a whole",
                code="merge-setting",
                hint="give a number above 0; the inputs may have negative strengths of their own",
            )
        for name, value, choices in (
            ("divide", self.divide, get_args(Divide)),
            ("inner", self.inner, get_args(Inner)),
        ):
            if value not in choices:
                raise UsageError(
                    f"`{name}` cannot be `{value}`", code="merge-setting", hint=f"it is {', '.join(choices)}"
                )

    def facts(self, names: tuple[str, ...]) -> dict[str, Json]:
        """These fields, and the strength of the whole where it is not 1, for the metadata of the result."""
        found: dict[str, Json] = {name: getattr(self, name) for name in names}
        return found if self.strength == 1.0 else {**found, "strength": self.strength}
