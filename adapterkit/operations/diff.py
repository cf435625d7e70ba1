"""diff: are two adapters the same change, whatever their formats?"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from math import isfinite
from typing import cast

from adapterkit.compare import Difference, differences
from adapterkit.errors import Json, Mismatch
from adapterkit.operations.sources import Opened, Source, open
from adapterkit.scale import ScaleFrom
from adapterkit.specs.families import Family

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
    left, right = _alike(a, b, family)
    one = left.load(allow=allow, scale_from=scale_from)
    other = right.load(allow=allow, scale_from=scale_from)
    found = sorted(differences(one, other, cosines=True), key=lambda d: -d.error)
    return Comparison(tuple(found), tolerance)


def _alike(a: Source, b: Source, family: str | None) -> tuple[Opened, Opened]:
    """Both opened as adapters of one base model, the first that explains either as well as any other."""
    left, right = open(a, family=family), open(b, family=family)
    ours, theirs = _families(left), _families(right)
    if ours[0].key == theirs[0].key:
        return left, right
    names = {other.name for other in theirs}
    common = next((one for one in ours if one.name in names and not one.open), None)
    if common is None:
        raise Mismatch(
            f"one is for {ours[0].label}, the other for {theirs[0].label}",
            code="families",
            hint="say --family if one of them was taken for the wrong base model",
        )
    return open(a, family=common.key), open(b, family=common.key)


def _families(opened: Opened) -> list[Family]:
    found = opened.explanation
    return [found.family, *(candidate.family for candidate in found.equals)]
