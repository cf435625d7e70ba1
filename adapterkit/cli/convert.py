"""adapterkit convert"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.batch import each, progress, worst
from adapterkit.cli.inputs import adapters, home, made, results
from adapterkit.cli.options import (
    FORMATS,
    allow_option,
    as_json,
    dtype_option,
    family_option,
    manners,
    require_place,
    scale_option,
    writing_options,
)
from adapterkit.cli.output import Output
from adapterkit.errors import AdapterkitError, Json

if TYPE_CHECKING:
    from adapterkit.operations.convert import Conversion, ConvertOptions, Verify
    from adapterkit.scale import ScaleFrom

Outcomes = Sequence[tuple[str, "Conversion | AdapterkitError"]]


@click.command(short_help="Write adapters in another format, and prove the result.")
@click.argument("sources", nargs=-1, required=True, metavar="IN...")
@click.option(
    "--to",
    required=True,
    callback=FORMATS.optional,
    shell_complete=FORMATS.complete,
    metavar="FORMAT",
    help="`adapterkit formats` lists them.",
)
@click.option("-o", "--output", "place", metavar="OUT", help="A file, or a folder (see above).")
@click.option("--plan", is_flag=True, help="Show the mapping, scale, sizes and losses; write nothing.")
@dtype_option("as they are")
@click.option(
    "--as", "kind", type=click.Choice(["lora"]), help="Expand LoHa, LoKr and others exactly to LoRA."
)
@click.option("--fold", is_flag=True, help="Put the scale into the factors; every reader then sees it.")
@family_option
@allow_option
@scale_option
@writing_options
@as_json
@manners
@click.pass_obj
def convert(
    output: Output,
    sources: tuple[str, ...],
    to: str,
    place: str | None,
    plan: bool,
    dtype: str | None,
    kind: str | None,
    fold: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
    verify: Verify,
    force: bool,
) -> int:
    """Write adapters in another FORMAT, and prove that they are still the same change.

    IN is a file, a PEFT folder, or a folder of adapters: all tensor files and PEFT folders that lie
    directly in it. OUT is the file to write (for peft the folder). With several adapters, or if it
    is a folder or ends in a slash, OUT is a folder that is made if it is missing, and the results
    are called NAME.FORMAT.safetensors (for peft NAME) after their inputs.

    Nothing is lost without consent: what the format cannot say is refused until --allow names it.
    Every output is read back and compared before it takes its name.
    """
    require_place(place, plan)
    found = list(dict.fromkeys(path for source in sources for path in adapters(source)))
    places = {} if plan or place is None else results(found, place, to)
    # From here on torch is needed, which takes a while to load.
    from adapterkit.operations.convert import ConvertOptions

    options = ConvertOptions(
        dtype=dtype,
        as_lora=kind == "lora",
        fold=fold,
        family=family,
        scale_from=scale_from,
        allow=allow,
        verify=verify,
        force=force,
    )
    if plan or place is None:
        return _plan(output, found, to, options)
    with made(home(found, place, to)):
        return _convert(output, places, to, options)


def _plan(output: Output, sources: Sequence[str], to: str, options: ConvertOptions) -> int:
    from adapterkit.operations.convert import plan_conversion
    from adapterkit.reports.conversion import plan_json, plan_report

    outcomes = []
    documents: list[Json] = []
    for source, outcome in each(sources, lambda source: plan_conversion(source, to, options)):
        outcomes.append(outcome)
        if isinstance(outcome, AdapterkitError):
            documents.append({"source": source, **outcome.as_json()})
            if not output.json:
                output.complain(outcome)
        elif output.json:
            documents.append(plan_json(source, outcome))
        else:
            output.show(plan_report(source, outcome))
            if source is not sources[-1]:
                output.show("")
    if output.json:
        output.document("plan", {"plans": documents})
    return worst(outcomes)


def _convert(output: Output, places: Mapping[str, Path], to: str, options: ConvertOptions) -> int:
    from adapterkit.operations.convert import convert as convert_one

    sources = list(places)
    with progress(output, sources) as turn:

        def work(source: str) -> Conversion:
            turn(source)
            return convert_one(source, to, places[source], options)

        outcomes = list(each(sources, work))
    if output.json:
        output.document("convert", {"results": _documents(outcomes)})
    else:
        _show(output, outcomes)
    return worst(outcome for _, outcome in outcomes)


def _documents(outcomes: Outcomes) -> list[Json]:
    from adapterkit.reports.conversion import conversion_json

    return [
        {"source": source, **outcome.as_json()}
        if isinstance(outcome, AdapterkitError)
        else conversion_json(source, outcome)
        for source, outcome in outcomes
    ]


def _show(output: Output, outcomes: Outcomes) -> None:
    from adapterkit.reports.conversion import conversion_line, conversion_report, outcomes_report

    for source, outcome in outcomes:
        if isinstance(outcome, AdapterkitError):
            output.complain(outcome)
        elif output.quiet:
            output.show(conversion_line(outcome))
        elif len(outcomes) == 1 or output.verbose:
            output.show(conversion_report(source, outcome))
    if len(outcomes) > 1 and not output.quiet:
        output.show(outcomes_report(outcomes, output.width))
