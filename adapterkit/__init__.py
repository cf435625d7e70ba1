"""adapterkit: LoRA adapters in every community format, read, converted and proven.

    import adapterkit

    adapterkit.convert("style.safetensors", "diffusers", "style_diffusers.safetensors")

Importing this package is quick: torch is imported by the functions that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.adapter import Adapter
    from adapterkit.errors import AdapterkitError
    from adapterkit.operations.bake import BakeOptions, bake, plan_baking
    from adapterkit.operations.bake_files import Baking
    from adapterkit.operations.catalogue import explain, formats
    from adapterkit.operations.convert import Conversion, ConvertOptions, convert, plan_conversion, save
    from adapterkit.operations.diff import Comparison, diff
    from adapterkit.operations.extract import Extraction, ExtractOptions, extract, plan_extraction
    from adapterkit.operations.inspect import Inspection, inspect
    from adapterkit.operations.merge import MergeOptions, Merging, merge, plan_merge
    from adapterkit.operations.resize import Resizable, ResizeOptions, Resizing, resizable, resize
    from adapterkit.operations.slice import SliceOptions, Slicing, plan_slice, slice
    from adapterkit.operations.sources import Opened, load, open
    from adapterkit.operations.unbake import restore
    from adapterkit.ranks import RankRule

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterkitError",
    "BakeOptions",
    "Baking",
    "Comparison",
    "Conversion",
    "ConvertOptions",
    "ExtractOptions",
    "Extraction",
    "Inspection",
    "MergeOptions",
    "Merging",
    "Opened",
    "RankRule",
    "Resizable",
    "ResizeOptions",
    "Resizing",
    "SliceOptions",
    "Slicing",
    "bake",
    "convert",
    "diff",
    "explain",
    "extract",
    "formats",
    "inspect",
    "load",
    "merge",
    "open",
    "plan_baking",
    "plan_conversion",
    "plan_extraction",
    "plan_merge",
    "plan_slice",
    "resizable",
    "resize",
    "restore",
    "save",
    "slice",
]

_HOMES = {
    "Adapter": "adapterkit.adapter",
    "AdapterkitError": "adapterkit.errors",
    "BakeOptions": "adapterkit.operations.bake",
    "Baking": "adapterkit.operations.bake_files",
    "Comparison": "adapterkit.operations.diff",
    "Conversion": "adapterkit.operations.convert",
    "ConvertOptions": "adapterkit.operations.convert",
    "ExtractOptions": "adapterkit.operations.extract",
    "Extraction": "adapterkit.operations.extract",
    "Inspection": "adapterkit.operations.inspect",
    "MergeOptions": "adapterkit.operations.merge",
    "Merging": "adapterkit.operations.merge",
    "Opened": "adapterkit.operations.sources",
    "RankRule": "adapterkit.ranks",
    "Resizable": "adapterkit.operations.resize",
    "ResizeOptions": "adapterkit.operations.resize",
    "Resizing": "adapterkit.operations.resize",
    "SliceOptions": "adapterkit.operations.slice",
    "Slicing": "adapterkit.operations.slice",
    "bake": "adapterkit.operations.bake",
    "convert": "adapterkit.operations.convert",
    "diff": "adapterkit.operations.diff",
    "explain": "adapterkit.operations.catalogue",
    "extract": "adapterkit.operations.extract",
    "formats": "adapterkit.operations.catalogue",
    "inspect": "adapterkit.operations.inspect",
    "load": "adapterkit.operations.sources",
    "merge": "adapterkit.operations.merge",
    "open": "adapterkit.operations.sources",
    "plan_baking": "adapterkit.operations.bake",
    "plan_conversion": "adapterkit.operations.convert",
    "plan_extraction": "adapterkit.operations.extract",
    "plan_merge": "adapterkit.operations.merge",
    "plan_slice": "adapterkit.operations.slice",
    "resizable": "adapterkit.operations.resize",
    "resize": "adapterkit.operations.resize",
    "restore": "adapterkit.operations.unbake",
    "save": "adapterkit.operations.convert",
    "slice": "adapterkit.operations.slice",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `adapterkit` has no attribute `{name}`")
