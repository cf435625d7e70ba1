"""What a name stands for: pieces, spans, rows, and the namings of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod

ZERO = Fraction(0)
ONE = Fraction(1)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one canonical module (of its weight, and of its bias alike) or bare parameter.

    module: its canonical name.
    start, stop: the rows [start, stop), as shares of all its rows.
    weight: its height relative to the other pieces of its span.
    transposed: the native tensor is this one transposed.
    """

    module: str
    start: Fraction = ZERO
    stop: Fraction = ONE
    weight: int = 1
    transposed: bool = False

    def __hash__(self) -> int:
        # Spans are looked up often and Fractions are slow to hash; equality still compares them.
        return hash(self.module)

    @property
    def whole(self) -> bool:
        """Whether it is all rows of its module."""
        return (self.start is ZERO and self.stop is ONE) or (self.start, self.stop) == (ZERO, ONE)


Span = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One native name and the rows it stacks.

    param: None for a module (its weight and its bias); "weight" or "bias" for that tensor of the
    module; "" for a bare parameter.
    """

    native: str
    span: Span
    param: str | None


@dataclass(frozen=True)
class Naming:
    """One spelling of a network; `rows` follow the order of the network's tensors."""

    name: str
    rows: tuple[Row, ...]
    partial: bool

    def find(self, native: str, dot: str = ".") -> Row | None:
        """The row called `native` in a file that writes `dot` for every `.`."""
        table = self._by_native.get(dot)
        if table is None:
            table = self._by_native[dot] = {row.native.replace(".", dot): row for row in self.rows}
        return table.get(native)

    def at(self, span: Span, param: str) -> Row | None:
        """The row with exactly this span: a module's, or a tensor's that is its `param`."""
        return self._by_span.get((span, None)) or self._by_span.get((span, param))

    def covering(self, module: str) -> tuple[Row, ...]:
        """The rows that hold rows of this canonical module."""
        return self._by_module.get(module, ())

    @cached_property
    def _by_native(self) -> dict[str, dict[str, Row]]:
        return {}

    @cached_property
    def _by_span(self) -> dict[tuple[Span, str | None], Row]:
        return {(row.span, row.param): row for row in self.rows}

    @cached_property
    def _by_module(self) -> dict[str, tuple[Row, ...]]:
        table: dict[str, tuple[Row, ...]] = {}
        for row in self.rows:
            for module in dict.fromkeys(piece.module for piece in row.span):
                table[module] = (*table.get(module, ()), row)
        return table


@dataclass(frozen=True)
class Network:
    """An architecture: every canonical tensor with its shape, and the namings it is known by.

    shapes: canonical tensor ("mid_block.resnets.0.conv1.weight") -> shape.
    namings: the canonical one included.
    """

    name: str
    summary: str
    source: str
    canonical: str
    shapes: Mapping[str, tuple[int, ...]]
    namings: Mapping[str, Naming]

    def weight_shape(self, module: str) -> tuple[int, ...] | None:
        """The shape of a module's weight, or of the bare parameter of that name."""
        return self.shapes.get(f"{module}.weight") or self.shapes.get(module)

    def stacked_shape(self, span: Span) -> tuple[int, ...] | None:
        """The shape of the weight that stacks these rows; None if one of its pieces has none."""
        shapes = [self.weight_shape(piece.module) for piece in span]
        known = [shape for shape in shapes if shape is not None]
        if not known or len(known) < len(shapes):
            return None
        rows = sum(
            shape[0] if piece.whole else int(shape[0] * (piece.stop - piece.start))
            for shape, piece in zip(known, span, strict=True)
        )
        return (rows, *known[0][1:])

    @property
    def parameters(self) -> int:
        """How many numbers all its tensors hold."""
        return sum(map(prod, self.shapes.values()))
