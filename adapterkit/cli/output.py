"""Where results, diagnostics and errors go, and in which form."""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from adapterkit.errors import AdapterkitError, Json, StoreError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SCHEMA = 1
BROKEN_PIPE = 141

# What the reports draw with, for terminals whose encoding has no such characters.
_PLAIN = str.maketrans(
    {
        "→": "->",
        "…": "...",
        "×": "x",
        "–": "-",
        "∞": "inf",
        "³": "3",
        "²": "2",
        "‖": "||",
        "·": "*",
        "≤": "<=",
    }
)


class Fault(AdapterkitError):
    """`this is a fault of adapterkit: ZeroDivisionError: division by zero`"""

    exit_code = 3
    default_code = "fault"


def as_error(error: Exception) -> AdapterkitError:
    """Any failure as one that can be shown: the system's, or else a fault of ours; never without a hint."""
    if isinstance(error, AdapterkitError):
        shown = error
    elif isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        shown = StoreError(f"{name}{(error.strerror or str(error)).lower()}", code="system")
    else:
        what = f"{type(error).__name__}: {error}"
        hint = "please report it; -v shows where it happened"
        shown = Fault(f"this is a fault of adapterkit: {what}", hint=hint)
    shown.hint = shown.hint or _general_hint(shown.code)
    return shown


def _general_hint(code: str) -> str:
    """What `explain` says of a code, for errors that have nothing better to say."""
    from adapterkit.operations.catalogue import error_texts

    return error_texts().get(code, "")


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever fails inside fails as an AdapterkitError."""
    try:
        yield
    except Exception as error:
        raise as_error(error) from error


@dataclass
class Output:
    """The user's wishes about output, and the two streams.

    json: one document on stdout and nothing else there.  quiet: results only, in their shortest
    form.  verbose: also the facts of errors, and where unexpected ones happened.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True

    @property
    def width(self) -> int:
        """How many columns a report may use."""
        return self._console(sys.stdout).width

    def show(self, report: RenderableType) -> None:
        """A result, on stdout; a line that `quiet` promises is one, however wide."""
        from rich.text import Text

        whole = self.quiet and isinstance(report, Text)
        _write(sys.stdout, self._text(report, sys.stdout, whole=whole))

    def document(self, command: str, content: Mapping[str, Json]) -> None:
        """The one JSON document of a command, on stdout."""
        facts: dict[str, Json] = {"schema": SCHEMA, "command": command, **content}
        # ASCII only, so that any terminal, log and pipe takes it.
        _write(sys.stdout, json.dumps(_finite(facts), indent=2, allow_nan=False) + "\n")

    def say(self, report: RenderableType) -> None:
        """A diagnostic, on stderr."""
        _write(sys.stderr, self._text(report, sys.stderr))

    def complain(self, error: Exception) -> AdapterkitError:
        """Say on stderr what went wrong."""
        from adapterkit.reports.problems import error_report

        shown = as_error(error)
        if self.verbose and isinstance(shown, Fault):
            _write(sys.stderr, "".join(traceback.format_exception(error)))
        self.say(error_report(shown, details=self.verbose))
        return shown

    def fail(self, error: Exception) -> int:
        """Say what went wrong where it is looked for; the exit code."""
        if not self.json:
            return self.complain(error).exit_code
        shown = as_error(error)
        facts: dict[str, Json] = {"schema": SCHEMA, **shown.as_json()}
        _write(sys.stdout, json.dumps(_finite(facts), indent=2, allow_nan=False) + "\n")
        return shown.exit_code

    def progress_console(self) -> Console | None:
        """The console for a progress bar; None where nobody would see it."""
        console = self._console(sys.stderr)
        return console if console.is_terminal and not (self.quiet or console.is_dumb_terminal) else None

    def _text(self, report: RenderableType, stream: TextIO, *, whole: bool = False) -> str:
        console = self._console(stream)
        with console.capture() as captured:
            console.print(report, soft_wrap=whole)
        text = captured.get()
        if console.color_system is None:
            # Tables fill their columns up; without colours nobody sees where they end.
            text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
        return text

    def _console(self, stream: TextIO) -> Console:
        from rich.console import Console

        plain = not self.color or bool(os.environ.get("NO_COLOR"))
        return Console(
            file=stream, color_system=None if plain else "auto", markup=False, emoji=False, highlight=False
        )


def _write(stream: TextIO, text: str) -> None:
    """Write at once, in whatever characters the stream has."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # What is left in the buffer would fail once more at exit, with a message that helps nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        raise


def _finite(value: Json) -> Json:
    """JSON has no infinity; it becomes a string."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
