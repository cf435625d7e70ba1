"""adapterkit extract"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import (
    allow_option,
    as_json,
    dtype_option,
    family_option,
    manners,
    require_place,
    to_option,
    writing_options,
)
from adapterkit.cli.output import Output
from adapterkit.cli.progress import stages
from adapterkit.cli.ranks import rank_options

if TYPE_CHECKING:
    from adapterkit.operations.convert import Verify
    from adapterkit.operations.extract import ExtractOptions
    from adapterkit.ranks import RankRule


@click.command(short_help="The difference of a tuned model and its base, as an adapter.")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@click.option("-o", "--output", "place", metavar="OUT", help="The file or folder to write.")
@to_option("Default: kohya; peft for language models.")
@rank_options
@click.option("--alpha", type=float, metavar="ALPHA", help="Of every module; default: its rank.")
@click.option("--full-small", is_flag=True, help="Keep the changes of norms and biases as they are.")
@click.option("--embeddings", is_flag=True, help="Extract embeddings and output layers as well.")
@click.option("--only", multiple=True, metavar="NAME", help="Extract only this; several add up.")
@click.option("--exclude", multiple=True, metavar="NAME", help="Leave this out.")
@click.option("--residual", is_flag=True, help="Show what is left out, module by module.")
@click.option("--exact", is_flag=True, help="Singular values to rounding, not within 0.1 % of the best.")
@click.option("--device", metavar="NAME", help="Where to compute: cuda, cuda:1, mps; default: the processor.")
@dtype_option("the model's own")
@click.option("--plan", is_flag=True, help="Show what would be compared; read headers only.")
@family_option
@allow_option
@writing_options
@as_json
@manners
@click.pass_obj
def extract(
    output: Output,
    tuned: str,
    base: str,
    place: str | None,
    to: str | None,
    rule: RankRule,
    alpha: float | None,
    full_small: bool,
    embeddings: bool,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    residual: bool,
    exact: bool,
    device: str | None,
    dtype: str | None,
    plan: bool,
    family: str | None,
    allow: frozenset[str],
    verify: Verify,
    force: bool,
) -> int:
    """Write what TUNED has more than BASE as an adapter.

    TUNED and BASE are models: a file, an index of shards, or a folder of diffusers or transformers,
    each in a layout of its own. NAME is a component, a block, or a module, as for `slice`.

    Without a rule, ranks are `--rank auto`: all that stands out of the rounding of the weights, at
    most 128. No number is clamped. What is left out is said, with its share of the difference.
    """
    require_place(place, plan)
    from adapterkit.operations.extract import ExtractOptions

    options = ExtractOptions(
        to=to,
        dtype=dtype,
        alpha=alpha,
        full_small=full_small,
        embeddings=embeddings,
        only=only,
        exclude=exclude,
        exact=exact,
        device=device,
        family=family,
        allow=allow,
        verify=verify,
        force=force,
    )
    if plan or place is None:
        return _plan(output, tuned, base, options)
    return _extract(output, tuned, base, place, rule, options, residual)


def _plan(output: Output, tuned: str, base: str, options: ExtractOptions) -> int:
    from adapterkit.operations.extract import plan_extraction
    from adapterkit.reports.extraction import pairing_json, pairing_report

    pairing = plan_extraction(tuned, base, options)
    if output.json:
        output.document("plan", pairing_json(tuned, base, pairing))
    else:
        output.show(pairing_report(tuned, pairing, options))
    return 0


def _extract(
    output: Output,
    tuned: str,
    base: str,
    place: str,
    rule: RankRule,
    options: ExtractOptions,
    residual: bool,
) -> int:
    from adapterkit.operations.extract import extract as extract_one
    from adapterkit.reports.conversion import conversion_line
    from adapterkit.reports.extraction import extraction_json, extraction_report

    with stages(output) as progress:
        done = extract_one(tuned, base, place, rule, options, progress=progress)
    if output.json:
        output.document("extract", extraction_json(tuned, base, done))
    elif output.quiet and done.conversion is not None:
        output.show(conversion_line(done.conversion))
    else:
        output.show(extraction_report(tuned, done, residual=residual or output.verbose))
    return 0
