"""The command line: parse, one call, show."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line on the arguments of this process, and exit."""
    from adapterkit.cli.app import app

    signal.signal(signal.SIGTERM, _terminated)
    app(prog_name=None if sys.argv[0].endswith("__main__.py") else "adapterkit")


def _terminated(number: int, frame: FrameType | None) -> None:
    # An exception rather than the default death, so that temporary files are removed.
    raise SystemExit(128 + number)
