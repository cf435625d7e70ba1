"""adapterkit slice"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import (
    allow_option,
    as_json,
    family_option,
    manners,
    require_place,
    scale_option,
    to_option,
    writing_options,
)
from adapterkit.cli.output import Output

if TYPE_CHECKING:
    from adapterkit.dylora import TrainedBy
    from adapterkit.operations.convert import Verify
    from adapterkit.scale import ScaleFrom


@click.command(short_help="Keep, drop or scale parts of an adapter, or make two of one.")
@click.argument("source", metavar="FILE")
@click.option("-o", "--output", "place", metavar="OUT", help="The file or folder to write.")
@click.option("--keep", multiple=True, metavar="NAME", help="Keep only this; several add up.")
@click.option("--drop", multiple=True, metavar="NAME", help="Leave this out.")
@click.option(
    "--scale", multiple=True, metavar="STRENGTHS", help="A number, NAME=NUMBER, a preset, or block weights."
)
@click.option("--rest", metavar="OUT2", help="Write what is left out there; both add up to FILE.")
@click.option("--first-ranks", type=int, metavar="N", help="Of a DyLoRA: its first ranks, as trained.")
@click.option(
    "--trained-by",
    type=click.Choice(["kohya", "lycoris", "other"]),
    help="Whose DyLoRA it is, where the file does not say.",
)
@to_option("Another format than the file's own.")
@click.option(
    "--as", "kind", type=click.Choice(["lora"]), help="Expand LoHa, LoKr and others exactly to LoRA."
)
@click.option("--plan", is_flag=True, help="Show what would be kept; write nothing.")
@family_option
@allow_option
@scale_option
@writing_options
@as_json
@manners
@click.pass_obj
def slice(
    output: Output,
    source: str,
    place: str | None,
    keep: tuple[str, ...],
    drop: tuple[str, ...],
    scale: tuple[str, ...],
    rest: str | None,
    first_ranks: int | None,
    trained_by: TrainedBy | None,
    to: str | None,
    kind: str | None,
    plan: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
    verify: Verify,
    force: bool,
) -> int:
    """Keep or drop parts of an adapter, scale them, or make two adapters of one.

    NAME is a component (text_encoder), a block (IN04, IN04-IN08, D07), or a module by its canonical
    name, its original one, or the file's; * stands for any part of it (IN*, *.attn2.*). What is
    dropped is not kept.

    All of it is exact: strengths go into the scale, and fused tensors are cut between their parts.
    """
    require_place(place, plan)
    from adapterkit.operations.slice import SliceOptions, plan_slice
    from adapterkit.operations.slice import slice as slice_one
    from adapterkit.reports.slicing import slicing_json, slicing_line, slicing_report

    options = SliceOptions(
        keep=keep,
        drop=drop,
        scale=",".join(scale),
        first_ranks=first_ranks,
        trained_by=trained_by,
        to=to,
        as_lora=kind == "lora",
        family=family,
        scale_from=scale_from,
        allow=allow,
        verify=verify,
        force=force,
    )
    if plan or place is None:
        sliced = plan_slice(source, options, rest=rest is not None)
    else:
        sliced = slice_one(source, place, options, rest=rest)
    if output.json:
        output.document("slice", slicing_json(source, sliced))
    elif output.quiet and sliced.conversion is not None:
        output.show(slicing_line(sliced))
    else:
        output.show(slicing_report(source, sliced))
    return 0
