"""docs/commands.md and the command line say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from adapterkit.cli.app import app
from adapterkit.cli.output import Output
from adapterkit.specs.consents import CONSENTS

PAGE = (Path(__file__).parent.parent / "docs" / "commands.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
COMMON = "All commands"


def options(command: click.Command) -> set[str]:
    with click.Context(command, **app.context_settings) as context:
        return {
            name for option in command.get_params(context) for name in option.opts if name.startswith("-")
        }


def described(section: str) -> set[str]:
    """The options in the first column of a section's tables."""
    cells = [line.split("|")[1] for line in SECTIONS[section].splitlines() if line.startswith("| `-")]
    return {name for cell in cells for name in re.findall(r"`(--?[a-z-]+)", cell)}


def common() -> set[str]:
    return set.intersection(*(options(command) for command in app.commands.values())) | options(app)


def test_every_command_has_a_section_and_every_section_is_a_command() -> None:
    assert set(SECTIONS) - {COMMON} == set(app.commands)
    assert all(f"[`{name}`](#{name})" in PAGE for name in app.commands)


@pytest.mark.parametrize("name", sorted(app.commands))
def test_the_options_of_a_command_are_those_of_its_section(name: str) -> None:
    assert described(name) == options(app.commands[name]) - common()


def test_the_options_of_all_commands_are_those_described_for_all() -> None:
    assert described(COMMON) == common()


@pytest.mark.parametrize("name", sorted(app.commands))
def test_choices_are_described(name: str) -> None:
    for option in app.commands[name].params:
        if isinstance(option.type, click.Choice):
            assert f"`{option.opts[0]} " + "\\|".join(option.type.choices) in SECTIONS[name]


def test_consents_stand_there_in_the_words_of_the_program() -> None:
    rows = dict(re.findall(r"^\| `([a-z]+)` \| (.+) \|$", SECTIONS["convert"], re.MULTILINE))
    assert rows == CONSENTS


EXAMPLES = re.findall(r"^\$ adapterkit (.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_is_a_command_that_can_be_given(line: str) -> None:
    name, *arguments = shlex.split(line)
    with app.commands[name].make_context(name, arguments, obj=Output()):
        pass


def test_every_command_has_an_example() -> None:
    assert {line.split()[0] for line in EXAMPLES} == set(app.commands)


def test_the_page_is_no_wider_than_the_others() -> None:
    assert max(map(len, PAGE.splitlines())) <= 110
