"""The small texts of a network's table: paths with ranges, parts of a stack, shapes.

formats/README.md is the description of the language; here each text becomes a value. The
vocabulary is closed: whatever is not understood is an error, never a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from adapterkit.errors import SpecError
from adapterkit.specs.spans import ONE, ZERO
from adapterkit.specs.values import Constants

_BRACES = re.compile(r"\{([^{}]*)\}")
_PART = re.compile(r"(?:(\d+)\*)?([^\[\]*]+?)(?:\[(\d+)/(\d+)\])?(\.T)?")


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A dotted path with ranges: `literals` stand around and between `ranges`."""

    text: str
    literals: tuple[str, ...]
    ranges: tuple[range, ...]

    def names(self) -> list[str]:
        """Every path, the last range running fastest."""
        names = [self.literals[0]]
        for numbers, literal in zip(self.ranges, self.literals[1:], strict=True):
            names = [f"{name}{number}{literal}" for name in names for number in numbers]
        return names


@dataclass(frozen=True, slots=True)
class PartPattern:
    """One part of a right-hand side: the rows [start, stop) of a path, as shares of its height."""

    path: PathPattern
    start: Fraction
    stop: Fraction
    weight: int
    transposed: bool

    @property
    def plain(self) -> bool:
        """Whether it is all of its path, as it stands."""
        return (self.start, self.stop, self.weight, self.transposed) == (ZERO, ONE, 1, False)


def parse_path(text: str, constants: Constants, where: str) -> PathPattern:
    """`blocks.{0..3}.norm`. Raises SpecError for anything else between braces."""
    pieces = _BRACES.split(text)
    literals, bodies = tuple(pieces[0::2]), pieces[1::2]
    outside = "0".join(literals)  # the text with every range replaced by a number
    if not outside.isprintable() or any(character in "{}[]* " for character in outside):
        raise SpecError(f"{where}: `{text}` is not a path", hint="a range is written {0..11}")
    if "" in outside.split("."):
        raise SpecError(f"{where}: `{text}` has an empty part between dots")
    return PathPattern(text, literals, tuple(_parse_range(body, text, constants, where) for body in bodies))


def parse_part(text: str, constants: Constants, where: str) -> PartPattern:
    """`4*proj_mlp`, `norm_out.linear[1/2]`, `text_projection.weight.T`."""
    match = _PART.fullmatch(text)
    if match is None:
        raise SpecError(
            f"{where}: `{text}` is not understood", hint="a part is written 4*path[0/2] or path.T"
        )
    weight, path, index, count, transposed = match.groups()
    start, stop = ZERO, ONE
    if count is not None:
        if not int(index) < int(count):
            raise SpecError(f"{where}: `{text}`: parts count from 0 to {int(count) - 1}")
        start, stop = Fraction(int(index), int(count)), Fraction(int(index) + 1, int(count))
    if weight is not None and int(weight) < 1:
        raise SpecError(f"{where}: `{text}` has no height")
    return PartPattern(
        parse_path(path, constants, where), start, stop, int(weight or 1), transposed is not None
    )


def parse_shape(text: str, constants: Constants, where: str) -> tuple[tuple[int, ...], bool]:
    """`320 320 1 1 +b`: the weight's shape, and whether there is a bias of its height."""
    words = [word for given in text.split() for word in str(constants.get(given, given)).split()]
    has_bias = words[-1:] == ["+b"]
    numbers = words[:-1] if has_bias else words
    if not numbers or not all(word.isdigit() and int(word) > 0 for word in numbers):
        raise SpecError(f"{where}: `{text}` is not a shape", hint="write numbers, then +b if there is a bias")
    return tuple(int(word) for word in numbers), has_bias


def check_walk(left: PathPattern, right: PathPattern, where: str) -> None:
    """The n-th range on the left walks with the n-th on the right, so they must be of one length."""
    lengths = [[len(numbers) for numbers in path.ranges] for path in (left, right)]
    if lengths[0] != lengths[1]:
        raise SpecError(
            f"{where}: `{left.text}` and `{right.text}` do not walk together: "
            f"ranges of {lengths[0]} and {lengths[1]} steps",
            code="spec-ranges",
        )


def _parse_range(body: str, text: str, constants: Constants, where: str) -> range:
    first, dots, last = body.partition("..")
    ends = [str(constants.get(end, end)) for end in (first, last)]
    if not dots or not all(end.removeprefix("-").isdecimal() for end in ends):
        hint = f"sizes here give: {', '.join(constants)}" if constants else "a range is written {0..11}"
        raise SpecError(f"{where}: `{{{body}}}` in `{text}` is not a range of integers", hint=hint)
    start, stop = int(ends[0]), int(ends[1]) + 1
    if stop < start:
        raise SpecError(f"{where}: `{{{body}}}` in `{text}` runs backwards")
    return range(start, stop)
