"""How many singular values to keep: the rules that merge, extract and resize share.

Targets for all modules together (energy, error, size) are met where it costs least: the singular
values of all modules stand in one row, ordered by what each saves of the squared error per byte, and
are taken from the front. Within a module they descend, so that any beginning of the row is a choice
of ranks; it is the best of its size, but for less than one more value.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import fsum
from typing import Literal, TypeVar

from adapterkit.errors import Json, UsageError

K = TypeVar("K")

LINEAR, CONV = "linear", "conv"
LAYERS = (LINEAR, CONV)
AUTO: Literal["auto"] = "auto"

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}


@dataclass(frozen=True)
class RankRule:
    """What the user asks for. At most one of the first five is given; none keeps every value.

    rank: the same for every module, or by kind of layer ("linear", "conv"); a kind that is not named
    keeps every value.
    energy: the share of ‖delta‖² to keep, over all modules together.
    error: the relative Frobenius error permitted, over all modules together.
    size: bytes that the written file may have at most.
    auto: what stands out of the noise, module by module.
    least, most: bounds of every module's rank.

    Raises UsageError for values that make no sense.
    """

    rank: int | Mapping[str, int] | None = None
    energy: float | None = None
    error: float | None = None
    size: int | None = None
    auto: bool = False
    least: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "error", "size") if getattr(self, name) is not None]
        given += ["auto"] if self.auto else []
        if len(given) > 1:
            raise _bad(f"{' and '.join(given)} are two rules for one rank", "give one of them")
        for rank in self.ranks:
            _require_rank(rank, "a rank")
        _require_rank(self.least, "the least rank")
        if self.most is not None and self.most < self.least:
            raise _bad(
                f"no rank is at least {self.least} and at most {self.most}", "--min-rank bounds --max-rank"
            )
        if self.energy is not None and not 0 < self.energy <= 1:
            raise _bad(f"an energy of {self.energy:g} is no share", "it lies between 0 and 1, such as 0.99")
        if self.error is not None and not 0 <= self.error < 1:
            raise _bad(f"an error of {self.error:g} is no share", "it lies between 0 and 1, such as 0.05")
        if self.size is not None and self.size <= 0:
            raise _bad(f"no file has {self.size} bytes", "give a size such as 50MB")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are named."""
        if self.rank is None:
            return ()
        return (self.rank,) if isinstance(self.rank, int) else tuple(self.rank.values())

    @property
    def highest(self) -> int | None:
        """The greatest rank that can come out of it; None where only the modules themselves tell."""
        named = max(self.ranks, default=None)
        if not isinstance(self.rank, int) and set(LAYERS) - set(self.rank or ()):
            named = None
        known = [rank for rank in (named, self.most) if rank is not None]
        return max(self.least, min(known)) if known else None

    def keeps_all(self, layer: str) -> bool:
        """Whether nothing in it takes a value away from this kind of layer, but `most`."""
        targets = (self.energy, self.error, self.size)
        free = self.rank is None or (not isinstance(self.rank, int) and layer not in self.rank)
        return free and not self.auto and all(target is None for target in targets)

    @property
    def label(self) -> str:
        """It as a part of a file's name: rank16, conv8-linear16, energy0.99, 50MB, auto, exact."""
        if self.size is not None:
            power = max(power for power in range(4) if self.size % 1000**power == 0)
            return f"{self.size // 1000**power}{('B', 'kB', 'MB', 'GB')[power]}"
        if isinstance(self.rank, Mapping):
            return "-".join(f"{layer}{rank}" for layer, rank in self.rank.items())
        for name in ("rank", "energy", "error"):
            if (value := getattr(self, name)) is not None:
                return f"{name}{value:g}"
        return AUTO if self.auto else "exact"

    @property
    def facts(self) -> dict[str, Json]:
        """What was given, for JSON and for the metadata of the result."""
        found: dict[str, Json] = {}
        if self.rank is not None:
            found["rank"] = self.rank if isinstance(self.rank, int) else dict(self.rank)
        for name in ("energy", "error", "size"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        if self.auto:
            found["rank"] = AUTO
        if self.least > 1:
            found["least"] = self.least
        if self.most is not None:
            found["most"] = self.most
        return found


@dataclass(frozen=True)
class Spectrum:
    """What the choice of one module's rank rests on.

    values: singular values, descending.  energy: ‖delta‖², values beyond those known included.
    cost: bytes that one more rank takes in the file.  layer: "linear" or "conv".
    full: the least rank that says the change exactly (the smaller side, or the factors' rank).
    noise: singular values up to this are noise (for `auto`).
    weight: what an error of this module counts for, 1 / ‖base weight‖² where the base is known.
    stays: whether the change can stay as it is, without ranks, where all of it is wanted.
    """

    values: tuple[float, ...]
    energy: float
    cost: int
    layer: str
    full: int
    noise: float = 0.0
    weight: float = field(default=1.0)
    stays: bool = False

    def left_out(self, rank: int) -> float:
        """The weighted squared error of keeping `rank` values."""
        if self.stays and rank >= self.full:
            return 0.0
        known = [value * value for value in self.values]
        beyond = max(0.0, self.energy - fsum(known)) if len(known) < self.full else 0.0
        return self.weight * (fsum(known[rank:]) + beyond)


def allocate(spectra: Mapping[K, Spectrum], rule: RankRule, *, fixed: int = 0) -> dict[K, int]:
    """The rank of every module.

    fixed: bytes of the file that do not depend on ranks, for a rule of size.
    A rank never exceeds `full`, the values that are known and the rule's `most`, and falls below
    `least` only where one of those does; but a change that can stay as it is has all of its ranks,
    known or not, where the rule keeps every value, or where its energy or error cannot be met by those
    that are known. It is 0, which means that the module is left out, where it changes nothing or, by
    `auto`, where nothing stands out of the noise. An energy or an error that cannot be met within these
    bounds is met as nearly as they allow.
    Raises UsageError for a size that not even the least ranks fit into.
    """
    ranks = _allocated(list(spectra.values()), rule, fixed)
    return dict(zip(spectra, ranks, strict=True))


def _allocated(spectra: Sequence[Spectrum], rule: RankRule, fixed: int) -> Sequence[int]:
    caps = [_cap(spectrum, rule) for spectrum in spectra]
    floors = [min(rule.least, cap) for cap in caps]
    if rule.size is not None:
        return _within_size(spectra, rule.size - fixed, floors, caps, fixed)
    if rule.error is not None or rule.energy is not None:
        share = rule.error**2 if rule.error is not None else 1 - (rule.energy or 0)
        permitted = share * fsum(spectrum.weight * spectrum.energy for spectrum in spectra)
        if rule.most is None:
            _let_stay(spectra, permitted, floors, caps)
        return _within_error(spectra, permitted, floors, caps)
    choice = _above_noise if rule.auto else partial(_named, rule)
    chosen = [choice(spectrum) for spectrum in spectra]
    # By `auto` nothing may be left of a module, whatever the least rank.
    return [
        min(cap, max(floor, rank)) if rank else 0
        for floor, cap, rank in zip(floors, caps, chosen, strict=True)
    ]


def cost_of(spectra: Mapping[K, Spectrum], ranks: Mapping[K, int]) -> int:
    """The bytes that these ranks take in the file."""
    return _cost(map(spectra.__getitem__, ranks), ranks.values())


def left_out(spectra: Mapping[K, Spectrum], ranks: Mapping[K, int]) -> float:
    """The weighted squared error of these ranks, all modules together."""
    return _left_out(map(spectra.__getitem__, ranks), ranks.values())


def _cap(spectrum: Spectrum, rule: RankRule) -> int:
    known = min(spectrum.full, len(spectrum.values))
    if spectrum.stays and rule.keeps_all(spectrum.layer):
        known = spectrum.full
    return known if rule.most is None else min(known, rule.most)


def _named(rule: RankRule, spectrum: Spectrum) -> int:
    if isinstance(rule.rank, int):
        return rule.rank
    return (rule.rank or {}).get(spectrum.layer, spectrum.full)


def _above_noise(spectrum: Spectrum) -> int:
    # Descending values are ascending when negated.
    return bisect_left([-value for value in spectrum.values], -spectrum.noise)


def _in_order(
    spectra: Sequence[Spectrum], floors: Sequence[int], caps: Sequence[int]
) -> list[tuple[float, int]]:
    """Every value above the floors, by what it saves per byte: (what it saves, module)."""
    row = []
    for index, spectrum in enumerate(spectra):
        cost, weight = max(spectrum.cost, 1), spectrum.weight
        for value in spectrum.values[floors[index] : caps[index]]:
            saving = weight * value * value
            # Equal savings go to the module that comes first, whose values are then equal as well.
            row.append((-saving / cost, index, saving))
    row.sort()
    return [(saving, index) for _, index, saving in row]


def _let_stay(spectra: Sequence[Spectrum], permitted: float, floors: list[int], caps: list[int]) -> None:
    """Where the values that are known do not suffice, give changes that can stay as they are all of their
    ranks, those that lack most first."""
    lacking = [spectrum.left_out(cap) for spectrum, cap in zip(spectra, caps, strict=True)]
    remaining = fsum(lacking)
    for index in sorted(range(len(spectra)), key=lambda index: -lacking[index]):
        if remaining <= permitted or not lacking[index]:
            return
        if spectra[index].stays:
            floors[index] = caps[index] = spectra[index].full
            remaining -= lacking[index]


def _within_error(
    spectra: Sequence[Spectrum], permitted: float, floors: Sequence[int], caps: Sequence[int]
) -> Sequence[int]:
    """The least ranks, in order of saving per byte, that leave out this much of the squared error."""
    ranks = list(floors)
    row = _in_order(spectra, floors, caps)
    # From the end, so that small numbers are added up among themselves.
    remaining = _left_out(spectra, caps)
    while row and remaining + row[-1][0] <= permitted:
        remaining += row.pop()[0]
    for _, index in row:
        ranks[index] += 1
    return ranks


def _within_size(
    spectra: Sequence[Spectrum], budget: int, floors: Sequence[int], caps: Sequence[int], fixed: int
) -> Sequence[int]:
    """The ranks that leave out least within `budget` bytes, but for less than one more value."""
    ranks = list(floors)
    least = _cost(spectra, floors)
    if least > budget:
        raise UsageError(
            f"{budget + fixed} bytes are too few: the least ranks take {least + fixed}",
            code="size",
            hint=f"the smallest size possible is {least + fixed} bytes; leaving modules out makes it smaller",
            details={"size": budget + fixed, "smallest": least + fixed},
        )
    spare = budget - least
    for _, index in _in_order(spectra, floors, caps):
        # A module whose next value does not fit has no smaller one: its columns are of one size.
        cost = spectra[index].cost
        if cost <= spare:
            ranks[index] += 1
            spare -= cost
    same = _same_for_all(spectra, budget, floors, caps)
    return min(ranks, same, key=lambda one: _left_out(spectra, one))


def _same_for_all(
    spectra: Sequence[Spectrum], budget: int, floors: Sequence[int], caps: Sequence[int]
) -> Sequence[int]:
    """The greatest rank for all modules that fits.

    Where large columns leave a gap at the end, it can be a little better than taking them in order.
    """

    def ranks(same: int) -> list[int]:
        return [min(cap, max(floor, same)) for floor, cap in zip(floors, caps, strict=True)]

    tried = range(1, max(caps, default=0) + 1)
    above = bisect_left(tried, True, key=lambda same: _cost(spectra, ranks(same)) > budget)
    return ranks(above)


def _cost(spectra: Iterable[Spectrum], ranks: Iterable[int]) -> int:
    return sum(spectrum.cost * rank for spectrum, rank in zip(spectra, ranks, strict=True))


def _left_out(spectra: Iterable[Spectrum], ranks: Iterable[int]) -> float:
    return fsum(spectrum.left_out(rank) for spectrum, rank in zip(spectra, ranks, strict=True))


def parse_rank(text: str) -> int | dict[str, int] | Literal["auto"]:
    """A rank as it is typed: `16`, `conv=8,linear=16` or `auto`. Raises UsageError for anything else."""
    if text.strip() == AUTO:
        return AUTO
    if "=" not in text:
        return _number(text, text)
    found: dict[str, int] = {}
    for entry in text.split(","):
        layer, _, number = (part.strip() for part in entry.partition("="))
        if layer not in LAYERS or layer in found:
            raise _bad(f"`{text}`: `{layer}` is no kind of layer, or stands twice", _RANK_HINT)
        found[layer] = _number(number, text)
    return found


_RANK_HINT = "a rank is a number (16), numbers by layer (conv=8,linear=16), or auto"


def _number(text: str, whole: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise _bad(f"`{whole}` is not a rank", _RANK_HINT)
    number = int(text)
    _require_rank(number, "a rank")
    return number


def parse_size(text: str) -> int:
    """Bytes from `50MB`, `47.5 MiB` or `1048576`: MB is 1000², MiB is 1024². Raises UsageError."""
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = found and _UNITS.get(found[2].lower())
    if not found or not unit:
        raise _bad(f"`{text}` is not a size", "a size is a number with its unit: 50MB, 47.5MiB, 900kB")
    return int(float(found[1]) * unit)


def _require_rank(rank: int, what: str) -> None:
    if rank < 1:
        raise _bad(f"{what} of {rank} would leave nothing", "ranks begin at 1; `slice` leaves modules out")


def _bad(message: str, hint: str) -> UsageError:
    return UsageError(message, code="rank-rule", hint=hint)
