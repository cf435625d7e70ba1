"""Run the examples of the documentation; `python docs/examples.py` brings their output up to date.

Blocks run in the order of the page, in one empty folder and one namespace. A `console` block holds
commands behind `$ ` and their output, in 80 columns; a `python` block runs, and a `text` block behind it
holds what it prints. A line `[…]` stands for lines left out; digits of hashes are not compared.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "formats.md", ROOT / "docs" / "library.md")

LEFT_OUT = "[…]"
COLUMNS = "80"
# Seeded numbers differ in their last bits between processors, and so do hashes of them.
_HASH = re.compile(r"\b[0-9a-f]{64}\b")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and where the text lies in the page."""

    language: str
    text: str
    start: int
    stop: int


def blocks(page: str) -> list[Block]:
    return [Block(found[1], found[2], found.start(2), found.end(2)) for found in _BLOCK.finditer(page)]


@dataclass(frozen=True)
class Result:
    """A block with output, and what that output is now."""

    block: Block
    now: str

    @property
    def matches(self) -> bool:
        return _HASH.sub("#", self.now) == _HASH.sub("#", self.block.text)


def abridged(printed: str, like: str) -> str:
    """What was printed, leaving out what `like` leaves out: as many lines from either end."""
    kept = like.splitlines()
    if LEFT_OUT not in kept:
        return printed
    before = kept.index(LEFT_OUT)
    after = len(kept) - before - 1
    lines = printed.splitlines()
    shown = [*lines[:before], LEFT_OUT, *lines[len(lines) - after :]]
    return "".join(f"{line}\n" for line in shown)


@dataclass
class Session:
    """Runs the blocks of one page in the current folder."""

    names: dict[str, object] = field(default_factory=lambda: {"__name__": "example"})

    def run(self, page: str) -> Iterator[Result]:
        printed = ""
        for block in blocks(page):
            if block.language == "console":
                yield self._console(block)
            elif block.language == "python":
                printed = self._python(block)
            elif block.language == "text":
                yield Result(block, abridged(printed, block.text))

    def _python(self, block: Block) -> str:
        captured = io.StringIO()
        with contextlib.redirect_stdout(captured):
            exec(compile(block.text, "<example>", "exec"), self.names)
        return captured.getvalue()

    def _console(self, block: Block) -> Result:
        now = ""
        for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE)[1:]:
            line, _, expected = part.partition("\n")
            now += f"{line}\n{abridged(output_of(line[2:]), expected)}"
        return Result(block, now)


def output_of(line: str) -> str:
    """What a command prints on stdout and stderr: one of ours, or a script of this repository."""
    name, *arguments = shlex.split(line, comments=True)
    if name == "python":
        return _script(ROOT / arguments[0], arguments[1:])
    from click.testing import CliRunner

    from adapterkit.cli.app import app

    if name not in {"adapterkit", "akit"}:
        raise ValueError(f"an example cannot run `{name}`")
    return CliRunner(env={"COLUMNS": COLUMNS, "NO_COLOR": "1"}).invoke(app, arguments).output


def _script(path: Path, arguments: list[str]) -> str:
    before, captured = sys.argv, io.StringIO()
    sys.argv = [str(path), *arguments]
    try:
        with contextlib.redirect_stdout(captured):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return captured.getvalue()


def renewed(page: str) -> str:
    """The page with the output that its examples have now."""
    made = page
    for result in reversed(list(Session().run(page))):
        if not result.matches:
            made = made[: result.block.start] + result.now + made[result.block.stop :]
    return made


def main() -> None:
    import tempfile

    for path in PAGES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            path.write_text(renewed(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
