"""adapterkit: LoRA adapters in every community format, read, converted and proven.

    import adapterkit
    adapterkit.convert("style.safetensors", "diffusers", "style_diffusers.safetensors")

Importing this package is quick: torch is imported by the functions that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adapterkit.adapter import Adapter
    from adapterkit.errors import AdapterkitError
    from adapterkit.operations.convert import Conversion, ConvertOptions, convert, plan_conversion
    from adapterkit.operations.sources import load
    from adapterkit.operations.sources import store_of as open

_HOMES = {
    "Adapter": "adapterkit.adapter",
    "AdapterkitError": "adapterkit.errors",
    "Conversion": "adapterkit.operations.convert",
    "ConvertOptions": "adapterkit.operations.convert",
    "convert": "adapterkit.operations.convert",
    "load": "adapterkit.operations.sources",
    "plan_conversion": "adapterkit.operations.convert",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `adapterkit` has no attribute `{name}`")
