"""adapterkit inspect"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

import click

from adapterkit.cli.batch import each, worst
from adapterkit.cli.options import as_json, family_option, manners
from adapterkit.cli.output import Output, as_error
from adapterkit.errors import AdapterkitError, Json

if TYPE_CHECKING:
    from adapterkit.operations.inspect import Inspection, KeyGroup


@dataclass(frozen=True)
class Wanted:
    """What of a file is to be shown."""

    keys: bool
    metadata: bool
    hashes: bool
    family: str | None


@dataclass(frozen=True)
class Look:
    """What was wanted of a file; a file that nothing explains still has keys and metadata to show."""

    found: Inspection | AdapterkitError
    keys: tuple[KeyGroup, ...] | None
    metadata: Mapping[str, str] | None


@click.command(short_help="Say what a file is: format, base model, ranks, scales.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--keys", is_flag=True, help="Every key, grouped by pattern, with dtype and shape.")
@click.option("--metadata", is_flag=True, help="All metadata; --json gives long values in full.")
@click.option("--hash", "hashes", is_flag=True, help="Read the whole file for SHA-256, AutoV2 and AutoV3.")
@family_option
@as_json
@manners
@click.pass_obj
def inspect(
    output: Output, files: tuple[str, ...], keys: bool, metadata: bool, hashes: bool, family: str | None
) -> int:
    """Say what each FILE is: format, base model, components, ranks, scales, problems.

    A FILE is a safetensors file, a PyTorch file (read without running it), a PEFT folder or an
    index of shards. Only headers are read, unless --hash is given.
    """
    wanted = Wanted(keys, metadata, hashes, family)
    documents: list[Json] = []
    errors: list[AdapterkitError] = []
    for source, outcome in each(files, lambda source: _look(source, wanted)):
        look = Look(outcome, None, None) if isinstance(outcome, AdapterkitError) else outcome
        if isinstance(look.found, AdapterkitError):
            errors.append(look.found)
        if output.json:
            documents.append(_facts(source, look))
        else:
            _show(output, source, look, first=source is files[0])
    if output.json:
        output.document("inspect", {"files": documents})
    return worst(errors)


def _look(source: str, wanted: Wanted) -> Look:
    from adapterkit.operations.inspect import inspect as inspect_file
    from adapterkit.operations.inspect import key_groups
    from adapterkit.operations.sources import store_of

    with store_of(source) as store:
        keys = key_groups(store) if wanted.keys else None
        metadata = dict(store.metadata) if wanted.metadata else None
        try:
            found = inspect_file(store, family=wanted.family, hashes=wanted.hashes)
        except AdapterkitError as error:
            if keys is None and metadata is None:
                raise
            return Look(as_error(error), keys, metadata)
    return Look(replace(found, path=source), keys, metadata)


def _show(output: Output, source: str, look: Look, *, first: bool) -> None:
    from rich.text import Text

    from adapterkit.reports import inspection
    from adapterkit.reports.words import heading

    if not first and not output.quiet:
        output.show(Text())
    if isinstance(look.found, AdapterkitError):
        output.complain(look.found)
        if look.keys is not None or look.metadata is not None:
            output.show(heading(source))
    elif output.quiet:
        output.show(inspection.inspection_line(look.found))
    else:
        output.show(inspection.inspection_report(look.found, output.width))
    if look.keys is not None:
        output.show(inspection.keys_report(look.keys, output.width))
    if look.metadata is not None:
        output.show(inspection.metadata_report(look.metadata, output.width))


def _facts(source: str, look: Look) -> dict[str, Json]:
    facts: dict[str, Json] = {"path": source, **look.found.as_json()}
    if look.keys is not None:
        facts["keys"] = cast(Json, [asdict(group) for group in look.keys])
    if look.metadata is not None:
        facts["metadata"] = cast(Json, look.metadata)
    return facts
