"""diff: are two adapters the same change, whatever their formats?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from math import isfinite
from typing import cast

from adapterkit.compare import Difference, differences
from adapterkit.errors import Json
from adapterkit.operations.alike import alike, loaded, names_of
from adapterkit.operations.sources import Source
from adapterkit.scale import ScaleFrom

# Rounding in float32 may differ by this much between two exact forms of one change.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Comparison:
    """modules: worst first.  equal: whether none differs by more than the tolerance."""

    modules: tuple[Difference, ...]
    tolerance: float

    @property
    def equal(self) -> bool:
        return all(difference.error <= self.tolerance for difference in self.modules)

    @property
    def differing(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.modules if d.error > self.tolerance)

    @property
    def error(self) -> float:
        return self.modules[0].error if self.modules else 0.0

    def as_json(self) -> dict[str, Json]:
        rows = [{**asdict(d), "error": d.error if isfinite(d.error) else "inf"} for d in self.modules]
        return cast(
            dict[str, Json],
            {
                "equal": self.equal,
                "tolerance": self.tolerance,
                "differing": len(self.differing),
                "modules": rows,
            },
        )


def diff(
    a: Source,
    b: Source,
    *,
    family: str | None = None,
    tolerance: float = TOLERANCE,
    allow: Collection[str] = (),
    scale_from: ScaleFrom | None = None,
) -> Comparison:
    """Compare two adapters of one family module by module.

    allow, scale_from: as `load` takes them, for both.
    Raises Mismatch if they are for different base models, and what `load` raises.
    """
    found = alike([a, b], names_of([a, b]), family)
    one, other = (loaded(each, allow=allow, scale_from=scale_from) for each in found)
    worst_first = sorted(differences(one, other, cosines=True), key=lambda d: -d.error)
    return Comparison(tuple(worst_first), tolerance)
