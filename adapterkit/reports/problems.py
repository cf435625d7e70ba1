"""Errors as people read them."""

from __future__ import annotations

import json

from rich.console import RenderableType
from rich.text import Text

from adapterkit.errors import AdapterkitError
from adapterkit.stores.guards import shown


def error_report(error: AdapterkitError, *, details: bool = False) -> RenderableType:
    """The code and what happened, what to do about it, and on request the facts."""
    text = Text(f"error[{error.code}]", style="red bold")
    text.append(f": {shown(error.message)}", style="not bold default")
    if error.hint:
        text.append("\nhint", style="not bold cyan").append(
            f": {shown(error.hint)}", style="not bold default"
        )
    if details and error.details:
        text.append(f"\ndetails: {json.dumps(error.details)}", style="not bold default dim")
    return text
