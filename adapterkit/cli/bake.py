"""adapterkit bake"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterkit.cli.merge import strengthened
from adapterkit.cli.options import allow_option, as_json, family_option, manners, require_place, scale_option
from adapterkit.cli.output import Output
from adapterkit.cli.progress import bytes_done
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.linalg.rounding import Rounding
    from adapterkit.operations.bake import BakeOptions
    from adapterkit.scale import ScaleFrom


@click.command(short_help="Put adapters into a base model's weights, and take them out again.")
@click.argument("base", metavar="BASE")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[=STRENGTH]...")
@click.option("-o", "--output", "place", metavar="OUT", help="A file for a file, a folder for a folder.")
@click.option(
    "--blocks", multiple=True, metavar="[N:]STRENGTHS", help="Of parts: a preset, a list, NAME=NUMBER."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8"]),
    help="Of the tensors that change; default: each keeps its own.",
)
@click.option(
    "--round",
    "rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="To the nearest number, or up or down by chance, so that the mean is kept.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Of chance.")
@click.option("--dequantize", is_flag=True, help="Read a quantised base as bf16.")
@click.option("--device", metavar="NAME", help="Where to compute: cuda, cuda:1; default: the processor.")
@click.option("--keep-undo", is_flag=True, help="Write OUT.undo, which gives the base back byte for byte.")
@click.option("--undo", is_flag=True, help="BASE was baked: restore what it was (see above).")
@click.option("--in-place", is_flag=True, help="Let the output take the place of BASE.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted run finished of a folder.")
@click.option("--no-hash", is_flag=True, help="No SHA-256 of what is written: quicker.")
@click.option("--plan", is_flag=True, help="Show what would be done to which tensors; write nothing.")
@family_option
@allow_option
@scale_option
@click.option("--force", is_flag=True, help="Replace files that exist.")
@as_json
@manners
@click.pass_obj
def bake(
    output: Output,
    base: str,
    adapters: tuple[str, ...],
    place: str | None,
    blocks: tuple[str, ...],
    dtype: str | None,
    rounding: Rounding,
    seed: int,
    dequantize: bool,
    device: str | None,
    keep_undo: bool,
    undo: bool,
    in_place: bool,
    resume: bool,
    no_hash: bool,
    plan: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
    force: bool,
) -> int:
    """Write BASE with the changes of adapters in its weights, in BASE's own files and layout.

    BASE is a file, an index of shards, or a folder of diffusers or transformers. Adapters may have
    any format; ADAPTER=STRENGTH multiplies one: style.safetensors=0.8. All changes are summed in
    float32 and rounded once; tensors that nothing changes stay as they are, byte for byte.

    With --undo, BASE is what was baked: `--undo BAKED -o BASE` restores it byte for byte from
    BAKED.undo, or from another undo file that is named; `--undo BAKED ADAPTER=STRENGTH -o BASE`
    subtracts adapters, up to rounding.
    """
    if not undo:
        require_place(place, plan)
    from adapterkit.operations.bake import BakeOptions

    options = BakeOptions(
        blocks=blocks,
        dtype=dtype,
        rounding=rounding,
        seed=seed,
        dequantize=dequantize,
        device=device,
        family=family,
        scale_from=scale_from,
        allow=allow,
        hashes=not no_hash,
        keep_undo=keep_undo,
        resume=resume,
        in_place=in_place,
        force=force,
    )
    given = [strengthened(text) for text in adapters]
    if undo:
        return _undo(output, base, given, place, options)
    return _bake(output, base, given, None if plan else place, options)


def _bake(
    output: Output, base: str, given: Sequence[tuple[str, float]], place: str | None, options: BakeOptions
) -> int:
    from adapterkit.operations.bake import bake as bake_in
    from adapterkit.operations.bake import plan_baking

    if place is None:
        plan = plan_baking(base, given, options)
        from adapterkit.reports.baking import bake_plan_json, bake_plan_report

        if output.json:
            output.document("plan", bake_plan_json(base, plan))
        else:
            output.show(bake_plan_report(base, plan))
        return 0
    with bytes_done(output) as progress:
        done = bake_in(base, given, place, options, progress=progress)
    from adapterkit.reports.baking import baking_json, baking_line, baking_report

    if output.json:
        output.document("bake", baking_json(base, done))
    elif output.quiet:
        output.show(baking_line(done, place))
    else:
        output.show(baking_report(base, done, verbose=output.verbose))
    return 0


def _undo(
    output: Output, baked: str, given: Sequence[tuple[str, float]], place: str | None, options: BakeOptions
) -> int:
    from adapterkit.operations.unbake import is_undo_file, restore, subtract
    from adapterkit.reports import baking as reports

    if place is None:
        raise UsageError("where to? OUT is missing", hint="-o OUT names the file or folder of the base")
    if not given or (len(given) == 1 and is_undo_file(given[0][0])):
        restored = restore(baked, given[0][0] if given else None, place, force=options.force)
        if output.json:
            output.document("undo", reports.restoring_json(baked, place, restored))
        else:
            report = reports.restoring_report(baked, place, restored)
            output.show(reports.baking_line(restored, place) if output.quiet else report)
        return 0
    with bytes_done(output) as progress:
        done = subtract(baked, given, place, options, progress=progress)
    if output.json:
        output.document("undo", reports.baking_json(baked, done))
    else:
        report = reports.subtracting_report(baked, done)
        output.show(reports.baking_line(done, place) if output.quiet else report)
    return 0
