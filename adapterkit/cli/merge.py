"""adapterkit merge"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import (
    allow_option,
    as_json,
    dtype_option,
    family_option,
    manners,
    require_place,
    scale_option,
    to_option,
    writing_options,
)
from adapterkit.cli.output import Output
from adapterkit.cli.progress import stages
from adapterkit.cli.ranks import rank_options
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.merging import Divide, Inner
    from adapterkit.operations.convert import Verify
    from adapterkit.operations.merge import MergeOptions
    from adapterkit.ranks import RankRule
    from adapterkit.scale import ScaleFrom

METHODS = ("linear", "svd", "ties", "dare", "dare-ties", "magnitude", "knots", "tsv", "core", "iso-c")
_STRENGTH = re.compile(r"(.+)=([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")


@click.command(short_help="Several adapters as one.")
@click.argument("sources", nargs=-1, required=True, metavar="IN[=STRENGTH]...")
@click.option("-o", "--output", "place", metavar="OUT", help="The file or folder to write.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="linear",
    show_default=True,
    help="How they become one; docs/merging.md compares them.",
)
@rank_options
@click.option(
    "--blocks",
    multiple=True,
    metavar="[N:]STRENGTHS",
    help="Of the parts of the N-th adapter, or of all: NAME=NUMBER, a preset, or block weights.",
)
@click.option("--strength", type=float, default=1.0, metavar="NUMBER", help="Of the result as a whole; 1.")
@click.option(
    "--density",
    type=float,
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Of the numbers that sparse methods keep.",
)
@click.option(
    "--divide",
    type=click.Choice(["strengths", "count", "nothing"]),
    default="strengths",
    show_default=True,
    help="What TIES divides agreeing numbers by.",
)
@click.option(
    "--inner",
    type=click.Choice(["ties", "dare", "dare-ties", "magnitude"]),
    default="ties",
    show_default=True,
    help="What knots and core do in their bases.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of what DARE drops.")
@click.option("--base", metavar="MODEL", help="The base model, for DoRA and others that depend on it.")
@to_option("Default: that of the first adapter.")
@dtype_option("the widest of the adapters'")
@click.option("--plan", is_flag=True, help="Compute all and show it; write nothing.")
@family_option
@allow_option
@scale_option
@writing_options
@as_json
@manners
@click.pass_obj
def merge(
    output: Output,
    sources: tuple[str, ...],
    place: str | None,
    method: str,
    rule: RankRule,
    blocks: tuple[str, ...],
    strength: float,
    density: float,
    divide: Divide,
    inner: Inner,
    seed: int,
    base: str | None,
    to: str | None,
    dtype: str | None,
    plan: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
    verify: Verify,
    force: bool,
) -> int:
    """Write several adapters of one base model as one.

    IN=STRENGTH is an adapter and what it is multiplied by: style.safetensors=0.8, without it 1, and
    negative to take an adapter away. Formats, kinds and ranks may differ.

    `linear` is exact: the result makes the sum of the changes, with as many ranks as they have
    together, until --rank, --energy, --error or --size says how many to keep.
    """
    from adapterkit.operations.merge import MergeOptions

    options = MergeOptions(
        method=method,
        blocks=blocks,
        density=density,
        divide=divide,
        inner=inner,
        seed=seed,
        strength=strength,
        to=to,
        dtype=dtype,
        base=base,
        family=family,
        scale_from=scale_from,
        allow=allow,
        verify=verify,
        force=force,
    )
    return _merge(output, sources, None if plan else place, plan, rule, options)


def _merge(
    output: Output,
    given: Sequence[str],
    place: str | None,
    plan: bool,
    rule: RankRule,
    options: MergeOptions,
) -> int:
    require_place(place, plan)
    from adapterkit.operations.merge import merge as merge_all
    from adapterkit.reports.conversion import conversion_line
    from adapterkit.reports.merging import merging_json, merging_report

    sources, strengths = zip(*map(strengthened, given), strict=True)
    with stages(output) as progress:
        done = merge_all(sources, strengths, place, rule, options, progress=progress)
    if output.json:
        output.document("merge", merging_json(done))
    elif output.quiet and done.conversion is not None:
        output.show(conversion_line(done.conversion))
    else:
        output.show(merging_report(done, every=output.verbose))
    return 0


def strengthened(text: str) -> tuple[str, float]:
    """The adapter that an argument names and its strength; what exists under the whole text is a path.

    Raises UsageError where an adapter exists under the name before the last `=`, but no number follows.
    """
    found = _STRENGTH.fullmatch(text)
    if found is None or Path(text).exists():
        path, sign, rest = text.rpartition("=")
        if sign and not Path(text).exists() and Path(path).exists():
            raise UsageError(
                f"`{rest}` in `{text}` is not a strength",
                hint="write ADAPTER=NUMBER, such as style.safetensors=0.8",
            )
        return text, 1.0
    return found[1], float(found[2])
