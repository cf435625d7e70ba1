"""adapterkit formats, adapterkit explain"""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

import click

from adapterkit.cli.options import as_json, manners
from adapterkit.cli.output import Output
from adapterkit.errors import Json


@click.command(short_help="List the formats there are.")
@as_json
@manners
@click.pass_obj
def formats(output: Output) -> int:
    """List the formats, what each is, and the base models it is known for."""
    from rich.text import Text

    from adapterkit.operations.catalogue import formats as every_format
    from adapterkit.reports.catalogue import formats_report

    found = every_format()
    if output.json:
        output.document("formats", {"formats": cast(Json, [asdict(one) for one in found])})
    elif output.quiet:
        output.show(Text("\n".join(one.name for one in found)))
    else:
        output.show(formats_report(found, output.width))
    return 0


@click.command(short_help="Explain a key, a format or an error.")
@click.argument("topic")
@as_json
@manners
@click.pass_obj
def explain(output: Output, topic: str) -> int:
    """Explain TOPIC: a tensor's key, a format, or the code of an error or problem."""
    from adapterkit.operations.catalogue import explain
    from adapterkit.reports.catalogue import answer_report

    answer = explain(topic)
    if output.json:
        output.document("explain", answer.as_json())
    else:
        output.show(answer_report(answer, output.width))
    return 0
