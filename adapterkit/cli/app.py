"""The group of all commands, and what every way of ending means for the exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from adapterkit import __version__
from adapterkit.cli import bake, catalogue, convert, diff, extract, inspect, merge, resize, slice
from adapterkit.cli.options import manners
from adapterkit.cli.output import Output
from adapterkit.errors import UsageError

INTERRUPTED = 130


class App(click.Group):
    """A group that shows errors in our words and exits with our codes (see `adapterkit.errors`)."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        # The parser may fail before it comes to --json, and its error is wanted as JSON all the same.
        output = Output(json="--json" in (sys.argv[1:] if args is None else args))
        try:
            code = super().main(args, *rest, **{**extra, "standalone_mode": False}, obj=output)
        except click.Abort:
            code = INTERRUPTED
        except click.ClickException as error:
            code = output.fail(_usage(error))
        except Exception as error:
            raise SystemExit(output.fail(error)) from error
        raise SystemExit(code)


def _usage(error: click.ClickException) -> UsageError:
    """click's message, as our own errors are written."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    hint = f"`{context.command_path} --help` says how" if context is not None else ""
    return UsageError(message[:1].lower() + message[1:].rstrip("."), hint=hint)


@click.group(
    cls=App,
    name="adapterkit",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, message="adapterkit %(version)s")
@manners
@click.pass_context
def app(context: click.Context) -> int:
    """LoRA adapters in every community format: look into them, convert them, and prove it.

    Exit codes: 0 done; 1 a difference, or refused for want of consent (--allow); 2 bad usage, or
    a file that cannot be read or written; 3 a fault of adapterkit; 130 interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
    return 0


for command in (
    inspect.inspect,
    convert.convert,
    diff.diff,
    merge.merge,
    extract.extract,
    resize.resize,
    slice.slice,
    bake.bake,
    catalogue.formats,
    catalogue.explain,
):
    app.add_command(command)
