"""Numbers and names as people read them, and how facts are set out on the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adapterkit.stores.guards import shown

Fact = tuple[str, "str | Text"]

# Below this many columns a table gives way to lines.
NARROW = 72


def _scaled(count: int, units: Sequence[str]) -> str:
    value, unit = float(count), units[0]
    for larger in units[1:]:
        # What would be written 1000.0 belongs to the next unit.
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{count} {unit}".rstrip() if unit == units[0] else f"{value:.1f} {unit}"


def size(count: int) -> str:
    """Bytes, in powers of 1000 as shops and file managers count them."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def quantity(count: int) -> str:
    """A count of numbers: 56.0 M."""
    return _scaled(count, ("", "K", "M", "B", "T"))


def counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def percent(part: float, whole: float) -> str:
    """Two digits that count: 0.47 %, 12 %."""
    value = 100 * part / whole
    if 0 < value < 0.01:
        return "< 0.01 %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def error_words(error: float) -> str:
    """A relative error; 0 is said only of what is the same bit for bit."""
    if math.isinf(error):
        return "∞"
    return f"{error:.2g}"


def tally(counts: Mapping[str, int], most: int = 4) -> str:
    """`a` if it is all there is, else `a (3), b (2), 4 more`."""
    ordered = Counter(counts).most_common()
    if len(ordered) == 1:
        return ordered[0][0]
    text = ", ".join(f"{name} ({count})" for name, count in ordered[:most])
    return text + (f", {len(ordered) - most} more" if len(ordered) > most else "")


def shape_words(shapes: Iterable[tuple[int, ...]]) -> str:
    """One shape for many tensors: 16×3072, or 320–1280×16 where their sides differ."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for shape in shapes:
        by_length.setdefault(len(shape), []).append(shape)
    return " or ".join(
        "×".join(_side(column) for column in zip(*same, strict=True)) or "scalar"
        for same in by_length.values()
    )


def _side(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def shortened(text: str, length: int) -> str:
    """`text` made safe to show, cut to `length` characters, saying how long it was."""
    if len(text) <= length:
        return shown(text)
    return f"{shown(text[:length])}… ({len(text)} characters)"


def heading(name: object, *rest: str) -> Text:
    text = Text(shown(name), style="bold")
    for part in rest:
        text.append(f"  {part}", style="not bold")
    return text


def text_of(value: str | Text) -> Text:
    """A plain string as it stands, never as markup."""
    return Text(value) if isinstance(value, str) else value


def facts(rows: Iterable[Fact]) -> RenderableType:
    """A label and what it says, line by line; long values go on under themselves."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(Text(label), text_of(value))
    return Padding(grid, (0, 0, 0, 2))


def listed(rows: Iterable[Sequence[str | Text]], header: Sequence[str], numbers: int = 0) -> Table:
    """A table without lines; the first `numbers` columns are set to the right, the last may wrap."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=any(header))
    for index, title in enumerate(header):
        last = index == len(header) - 1
        table.add_column(
            title, justify="right" if index < numbers else "left", no_wrap=not last, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(text_of, row))
    return table
