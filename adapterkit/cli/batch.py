"""One command on many inputs: a bad one does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from adapterkit.cli.output import Output, guarded
from adapterkit.errors import AdapterkitError

Result = TypeVar("Result")

# One file smaller than this is done before a bar could be read.
_BIG = 200_000_000


def each(
    sources: Sequence[str], work: Callable[[str], Result]
) -> Iterator[tuple[str, Result | AdapterkitError]]:
    """The result of every source, or its error. The error of a single one is the command's own."""
    for source in sources:
        try:
            with guarded():
                result = work(source)
        except AdapterkitError as error:
            if len(sources) == 1:
                raise
            yield source, error
        else:
            yield source, result


def worst(outcomes: Iterable[object]) -> int:
    """The exit code for all of them."""
    return max((one.exit_code for one in outcomes if isinstance(one, AdapterkitError)), default=0)


@contextmanager
def progress(output: Output, sources: Sequence[str]) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where somebody sees it and there is something to wait for.

    Yields what is to be called with each source when its turn comes.
    """
    console = output.progress_console()
    if console is None or (len(sources) == 1 and _size(sources[0]) < _BIG):
        yield lambda source: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    from adapterkit.stores.guards import shown

    name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    count = [MofNCompleteColumn()] if len(sources) > 1 else []
    columns = (name, BarColumn(20), *count, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        # The length of a single conversion is not known: its bar only moves.
        task = bar.add_task("", total=len(sources) if len(sources) > 1 else None, completed=-1)

        def turn(source: str) -> None:
            bar.update(task, description=shown(Path(source).name), advance=1)

        yield turn


def _size(source: str) -> int:
    path = Path(source)
    return path.stat().st_size if path.is_file() else 0
