"""The options that say how many ranks to keep, shared by merge, extract and resize."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import click

from adapterkit.errors import UsageError
from adapterkit.ranks import AUTO, RankRule, parse_rank, parse_size

Function = TypeVar("Function", bound=Callable[..., Any])

_TARGETS = ("rank", "energy", "error", "size")


def rank_options(function: Function) -> Function:
    """Add the options, and hand the command one argument of them: `rule`."""
    return _with_rules(function, lambda rules: {"rule": _one(rules)})


def several_rank_options(function: Function) -> Function:
    """As `rank_options`, where each target may be given several times: `rules`, one after another."""
    return _with_rules(function, lambda rules: {"rules": tuple(rules)})


def _one(rules: Sequence[RankRule]) -> RankRule:
    if len(rules) > 1:
        raise UsageError(
            f"{len(rules)} rules for one rank",
            code="rank-rule",
            hint="give one of --rank, --energy, --error and --size",
        )
    return rules[0]


def _with_rules(function: Function, pack: Callable[[Sequence[RankRule]], dict[str, object]]) -> Function:
    @functools.wraps(function)
    def command(*args: object, min_rank: int, max_rank: int | None, **options: object) -> object:
        given = {name: cast(tuple[object, ...], options.pop(name)) for name in _TARGETS}
        return function(*args, **options, **pack(_rules(given, min_rank, max_rank)))

    for option in reversed(_options()):
        command = option(command)
    return cast(Function, command)


def _rules(given: dict[str, tuple[object, ...]], least: int, most: int | None) -> list[RankRule]:
    """A rule for each target that was given; one without any target if none was."""
    targets: list[dict[str, Any]] = [
        {"auto": True} if value == AUTO else {name: value}
        for name, values in given.items()
        for value in values
    ]
    return [RankRule(**target, least=least, most=most) for target in targets or [{}]]


def _options() -> list[Callable[[Any], Any]]:
    def parsed(parse: Callable[[str], object]) -> Callable[..., tuple[object, ...]]:
        return lambda context, parameter, values: tuple(map(parse, values))

    return [
        click.option(
            "--rank",
            multiple=True,
            callback=parsed(parse_rank),
            metavar="RANK",
            help="Of every module: 16; by kind of layer: conv=8,linear=16; or auto, all that is not noise.",
        ),
        click.option(
            "--energy",
            multiple=True,
            type=float,
            metavar="SHARE",
            help="Of the squared size of the whole change to keep: 0.99.",
        ),
        click.option(
            "--error",
            multiple=True,
            type=float,
            metavar="SHARE",
            help="The relative error of the whole change to permit: 0.05.",
        ),
        click.option(
            "--size",
            multiple=True,
            callback=parsed(parse_size),
            metavar="BYTES",
            help="The written file at most: 50MB.",
        ),
        click.option(
            "--min-rank",
            type=click.IntRange(min=1),
            default=1,
            metavar="RANK",
            help="Every module at least, as far as its change reaches.",
        ),
        click.option("--max-rank", type=click.IntRange(min=1), metavar="RANK", help="Every module at most."),
    ]
