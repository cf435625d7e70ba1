"""What `diff` found: the modules that differ most, and whether the adapters are the same."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.compare import Difference
from adapterkit.operations.diff import Comparison
from adapterkit.reports.words import counted, error_words, listed
from adapterkit.stores.guards import shown

MOST = 20


def comparison_report(found: Comparison, *, every: bool) -> RenderableType:
    """Worst first; without `every`, only modules that differ at all, and the first of them."""
    modules = found.modules if every else [d for d in found.modules if d.error != 0][:MOST]
    parts: list[RenderableType] = []
    if modules:
        parts.append(Padding(_table(modules), (0, 0, 1, 0)))
    hidden = sum(d.error != 0 for d in found.modules) - len(modules)
    parts.append(comparison_line(found))
    if hidden > 0:
        parts.append(Text(f"{counted(hidden, 'more module')} not shown; --all shows every one", style="dim"))
    return Group(*parts)


def _table(modules: Sequence[Difference]) -> RenderableType:
    rows = [(error_words(d.error), _cosine(d), shown(d.name)) for d in modules]
    return listed(rows, ("error", "cosine", "module"), numbers=2)


def _cosine(difference: Difference) -> str:
    return "–" if difference.cosine is None else f"{difference.cosine:.6f}"


def comparison_line(found: Comparison) -> Text:
    """The answer in a sentence."""
    total = counted(len(found.modules), "module")
    error = f"greatest relative error {error_words(found.error)} (tolerance {found.tolerance:g})"
    if found.equal:
        return Text("equal", style="green bold").append(f": {total}, {error}", style="not bold default")
    text = f": {len(found.differing)} of {total}, {error}"
    return Text("different", style="red bold").append(text, style="not bold default")
