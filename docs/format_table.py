"""Write the tables of the documentation that follow from the program: `python docs/format_table.py`.

A table stands between `<!-- NAME: made by docs/format_table.py -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

from adapterkit.deltas.build import CLASSES
from adapterkit.deltas.change import Change
from adapterkit.operations.catalogue import Format, formats
from adapterkit.specs.consents import CONSENTS
from adapterkit.specs.families import ANY, Family, families
from adapterkit.specs.kinds import KINDS, Kind
from adapterkit.specs.layouts import layouts

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "formats.md")

_MARKED = re.compile(r"(<!-- ([a-z]+): made by docs/format_table\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, one row a line."""
    heads = list(heads)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows))


def format_rows() -> str:
    """Every format by the name that `--to` takes."""
    rows = ((f"[`{one.name}`]({_section(one)})", one.summary, _bases(one)) for one in formats())
    return table(("format", "what it is", "families"), rows)


def _section(known: Format) -> str:
    return f"docs/formats.md#{known.layout.replace('_', '-')}"


def _bases(known: Format) -> str:
    names = ", ".join(known.reads)
    return (
        names
        if known.writes == known.reads
        else f"{names}; "
        + (f"written for {', '.join(known.writes)}" if known.writes else "read, not written")
    )


def family_rows() -> str:
    """Every family by the name that `--family` takes, its sizes in one row."""
    rows = (_family_row(list(sizes)) for _, sizes in groupby(families(), lambda family: family.name))
    return table(("family", "base model", "components and the networks behind them"), rows)


def _family_row(sizes: list[Family]) -> tuple[str, str, str]:
    first = sizes[0]
    named = [family.size for family in sizes if family.size]
    title = first.title + (f" ({', '.join(named)})" if named else "")
    components = (
        _component(name, [family.components[name] for family in sizes]) for name in first.components
    )
    return f"`{first.name}`", title, ", ".join(components)


def _component(name: str, networks: Iterable[str]) -> str:
    distinct = [network for network in dict.fromkeys(networks) if network != ANY]
    return f"`{name}`" + (f" ({', '.join(distinct)})" if distinct else "")


def kind_rows() -> str:
    """Every kind of change: what it needs, whether `--as lora` expands it, and which layouts write it."""
    rows = (
        (
            kind.title,
            "yes" if kind.needs_base else "no",
            "yes" if _expands(name) else "no",
            ", ".join(_writers(kind)),
        )
        for name, kind in KINDS.items()
    )
    return table(("kind", "depends on the weight", "`--as lora`", "written by"), rows)


def _expands(kind: str) -> bool:
    return CLASSES[kind].low_rank is not Change.low_rank


def _writers(kind: Kind) -> Iterable[str]:
    for name, layout in layouts().items():
        if layout.written and kind.name in layout.kinds():
            yield name.replace("_", "-")


def consent_rows() -> str:
    """Every consent that `--allow` takes."""
    return table(("consent", "permits to"), ((f"`{name}`", what) for name, what in CONSENTS.items()))


TABLES: Mapping[str, Callable[[], str]] = {
    "formats": format_rows,
    "families": family_rows,
    "kinds": kind_rows,
    "consents": consent_rows,
}


def with_tables(page: str) -> str:
    """The page with every marked table as it is now."""
    return _MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], page)


def marked(page: str) -> list[str]:
    """The names of a page's tables."""
    return [found[2] for found in _MARKED.finditer(page)]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
