"""adapterkit diff"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import allow_option, as_json, family_option, manners, scale_option
from adapterkit.cli.output import Output

if TYPE_CHECKING:
    from adapterkit.scale import ScaleFrom

DIFFERENT = 1


@click.command(short_help="Compare two adapters, whatever their formats.")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-6,
    show_default=True,
    help="The relative error that counts as equal.",
)
@click.option("--all", "every", is_flag=True, help="Every module; default: the 20 that differ most.")
@family_option
@allow_option
@scale_option
@as_json
@manners
@click.pass_obj
def diff(
    output: Output,
    first: str,
    second: str,
    tolerance: float,
    every: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
) -> int:
    """Say whether adapters A and B make the same change, whatever their formats.

    For every module: the relative error of its delta and the cosine of the angle between the two,
    worst first. Exit code 0: equal; 1: different.
    """
    from adapterkit.operations.diff import diff as compare
    from adapterkit.reports.comparison import comparison_line, comparison_report

    found = compare(first, second, family=family, tolerance=tolerance, allow=allow, scale_from=scale_from)
    if output.json:
        output.document("diff", {"a": first, "b": second, **found.as_json()})
    else:
        output.show(comparison_line(found) if output.quiet else comparison_report(found, every=every))
    return 0 if found.equal else DIFFERENT
