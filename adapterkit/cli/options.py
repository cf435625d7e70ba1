"""Options that several commands share, and names that an option may be given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import click

from adapterkit.cli.output import Output
from adapterkit.errors import Json, UsageError
from adapterkit.specs.consents import CONSENTS

Function = TypeVar("Function", bound=Callable[..., Any])


def _wish(name: str, value: bool) -> Callable[[click.Context, click.Parameter, bool], None]:
    """A callback that notes a wish when its flag is given, before or behind the command's name."""

    def note(context: click.Context, parameter: click.Parameter, given: bool) -> None:
        if given:
            setattr(context.ensure_object(Output), name, value)

    return note


def _flag(*names: str, sets: str, to: bool, help: str) -> Callable[[Function], Function]:
    return click.option(
        *names, is_flag=True, is_eager=True, expose_value=False, callback=_wish(sets, to), help=help
    )


def manners(function: Function) -> Function:
    """The options about output that stand before and behind any command's name."""
    for flag in reversed(
        [
            _flag(
                "--no-color",
                sets="color",
                to=False,
                help="No colours; NO_COLOR in the environment does the same.",
            ),
            _flag("-q", "--quiet", sets="quiet", to=True, help="Results only, in their shortest form."),
            _flag("-v", "--verbose", sets="verbose", to=True, help="Say more, also about errors."),
        ]
    ):
        function = flag(function)
    return function


def as_json(function: Function) -> Function:
    flag: Callable[[Function], Function] = _flag(
        "--json", sets="json", to=True, help="One JSON document instead of text."
    )
    return flag(function)


@dataclass(frozen=True)
class Names:
    """Names out of a table that is read only when it is needed."""

    one: str
    many: str
    read: Callable[[], Iterable[str]]

    def require(self, name: str) -> str:
        """`name`, if it is one of them; UsageError says which it may have been meant for."""
        names = list(self.read())
        if name in names:
            return name
        near = get_close_matches(name, names, n=1)
        meant = f"did you mean `{near[0]}`? " if near else ""
        raise UsageError(
            f"there is no {self.one} `{name}`",
            code="unknown-name",
            hint=f"{meant}{self.many}: {', '.join(names)}",
            details={self.many: list[Json](names)},
        )

    def optional(self, context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
        return None if name is None else self.require(name)

    def several(
        self, context: click.Context, parameter: click.Parameter, given: Sequence[str]
    ) -> frozenset[str]:
        """Names from `--allow a,b --allow c`."""
        return frozenset(self.require(name.strip()) for text in given for name in text.split(","))

    def complete(self, context: click.Context, parameter: click.Parameter, start: str) -> list[str]:
        return [name for name in self.read() if name.startswith(start)]


def _format_names() -> Iterable[str]:
    from adapterkit.operations.catalogue import formats

    return [known.name for known in formats() if known.writes]


def _family_names() -> Iterable[str]:
    from adapterkit.specs.families import families

    return dict.fromkeys(name for family in families() for name in (family.name, family.key))


FORMATS = Names("format", "formats", _format_names)
FAMILIES = Names("family", "families", _family_names)
LOSSES = Names("consent", "consents", lambda: CONSENTS)


def family_option(function: Function) -> Function:
    option: Callable[[Function], Function] = click.option(
        "--family",
        metavar="NAME",
        callback=FAMILIES.optional,
        shell_complete=FAMILIES.complete,
        help="The base model, where the file alone does not tell.",
    )
    return option(function)


def allow_option(function: Function) -> Function:
    option: Callable[[Function], Function] = click.option(
        "--allow",
        multiple=True,
        callback=LOSSES.several,
        shell_complete=LOSSES.complete,
        metavar="NAME",
        help=f"Consent to a loss: {', '.join(CONSENTS)}. Several: a,b or again.",
    )
    return option(function)


def scale_option(function: Function) -> Function:
    option: Callable[[Function], Function] = click.option(
        "--scale-from",
        type=click.Choice(["alpha", "config"]),
        help="Which scale holds where tensors and configuration differ.",
    )
    return option(function)


def to_option(help: str) -> Callable[[Function], Function]:
    """--to for commands that have a format of their own to fall back on."""
    return click.option(
        "--to", callback=FORMATS.optional, shell_complete=FORMATS.complete, metavar="FORMAT", help=help
    )


def dtype_option(default: str) -> Callable[[Function], Function]:
    return click.option(
        "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help=f"Of the factors; default: {default}."
    )


def writing_options(function: Function) -> Function:
    """How a result is written: what is read back of it, and whether it may replace a file."""
    verify: Callable[[Function], Function] = click.option(
        "--verify",
        type=click.Choice(["none", "sample", "full"]),
        default="sample",
        show_default=True,
        help="Modules to read back and compare.",
    )
    force: Callable[[Function], Function] = click.option(
        "--force", is_flag=True, help="Replace files that exist."
    )
    return verify(force(function))


def require_place(place: str | None, plan: bool) -> None:
    """UsageError where a result is to be written and -o does not say where."""
    if not place and not plan:
        raise UsageError(
            "where to? OUT is missing", hint="-o OUT names it, and --plan only shows what would be"
        )
