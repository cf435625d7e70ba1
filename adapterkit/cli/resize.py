"""adapterkit resize"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.inputs import made, stem
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
from adapterkit.cli.ranks import several_rank_options
from adapterkit.errors import Json, UsageError
from adapterkit.ranks import RankRule

if TYPE_CHECKING:
    from adapterkit.operations.convert import Verify
    from adapterkit.operations.resize import Resizable, Resizing
    from adapterkit.scale import ScaleFrom


@click.command(short_help="Give an adapter fewer ranks, where they are missed least.")
@click.argument("source", metavar="FILE")
@click.option("-o", "--output", "place", metavar="OUT", help="A file, or a folder (see above).")
@several_rank_options
@to_option("Another format than the file's own.")
@dtype_option("as they are")
@click.option(
    "--base", metavar="MODEL", help="The model it changes: errors relative to its weights; for DoRA."
)
@click.option("--exact", is_flag=True, help="Singular values of whole deltas to rounding.")
@click.option("--device", metavar="NAME", help="Where to compute, such as cuda; default: the processor.")
@click.option("--plan", is_flag=True, help="Show size against error for a range of ranks; write nothing.")
@family_option
@allow_option
@scale_option
@writing_options
@as_json
@manners
@click.pass_obj
def resize(
    output: Output,
    source: str,
    place: str | None,
    rules: tuple[RankRule, ...],
    to: str | None,
    dtype: str | None,
    base: str | None,
    exact: bool,
    device: str | None,
    plan: bool,
    family: str | None,
    allow: frozenset[str],
    scale_from: ScaleFrom | None,
    verify: Verify,
    force: bool,
) -> int:
    """Write an adapter again with the ranks that one of --rank, --energy, --error and --size gives.

    A rank is the same for every module; the other three are met by all modules together, each with
    the ranks that save most of the error per byte. Without any of them no module keeps more ranks
    than its change has, and nothing is lost. The scale stays as it was.

    Several may be given, which costs hardly more than one. Then, or if OUT is a folder or ends in a
    slash, OUT is a folder that is made if it is missing, and the results are called
    NAME.rank16.safetensors, NAME.50MB.safetensors and so on.
    """
    require_place(place, plan)
    # From here on torch is needed, which takes a while to load.
    from adapterkit.operations.resize import ResizeOptions, resizable

    options = ResizeOptions(
        to=to,
        dtype=dtype,
        base=base,
        exact=exact,
        device=device,
        family=family,
        scale_from=scale_from,
        allow=allow,
        verify=verify,
        force=force,
    )
    with stages(output) as progress:
        # The plan's table goes up to the highest rank there is.
        asked = (RankRule(), *rules) if plan else rules
        ready = resizable(source, options, rules=asked, progress=progress)
        if plan or place is None:
            return _plan(output, source, ready, rules)
        folder = _folder(place, ready, rules)
        with made(folder):
            found = []
            for rule in rules:
                path = Path(place) if folder is None else folder / _name(source, ready, rule)
                found.append(ready.write(ready.at(rule), path))
    _show(output, source, found)
    return 0


def _folder(place: str, ready: Resizable, rules: Sequence[RankRule]) -> Path | None:
    """The folder in which results get names of their own; None if `place` is the name of the only one."""
    ends = place.endswith((os.sep, os.altsep or os.sep))
    existing = Path(place).is_dir() and not ready.writes_folder
    if len(rules) == 1 and not existing and not ends:
        return None
    if Path(place).exists() and not Path(place).is_dir():
        raise UsageError(
            f"`{place}` is a file, and {len(rules)} results need a folder",
            hint="name a folder with -o; it is made if it is missing",
        )
    labels = [rule.label for rule in rules]
    if len(set(labels)) < len(labels):
        raise UsageError("two of the rules are the same", code="rank-rule", hint="give each once")
    return Path(place)


def _name(source: str, ready: Resizable, rule: RankRule) -> str:
    return f"{stem(source)}.{rule.label}" + ("" if ready.writes_folder else ".safetensors")


def _plan(output: Output, source: str, ready: Resizable, rules: Sequence[RankRule]) -> int:
    from adapterkit.reports.resizing import choices_json, choices_report, resizing_json, resizing_report

    points = ready.curve()
    found = [ready.at(rule) for rule in rules if rule.facts]
    if output.json:
        plans: list[Json] = [resizing_json(source, one) for one in found]
        output.document("plan", {**choices_json(source, points), "plans": plans})
        return 0
    output.show(choices_report(source, ready, points))
    for one in found:
        output.show("")
        output.show(resizing_report(source, one))
    return 0


def _show(output: Output, source: str, found: Sequence[Resizing]) -> None:
    from adapterkit.reports.resizing import (
        resizing_json,
        resizing_line,
        resizing_report,
        resizings_report,
    )

    if output.json:
        results: list[Json] = [resizing_json(source, one) for one in found]
        output.document("resize", {"results": results})
    elif output.quiet:
        for one in found:
            output.show(resizing_line(one))
    elif len(found) == 1 or output.verbose:
        for one in found:
            output.show(resizing_report(source, one))
    else:
        output.show(resizings_report(source, found))
