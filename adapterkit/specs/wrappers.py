"""What training frameworks leave around module names, taken away before a key is looked up."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from typing import cast

from adapterkit.specs.paths import formats_dir

# What may follow a slot in a name that carries no adapter name.
_NO_ADAPTER_NAME = frozenset({"weight", "bias"})


@dataclass(frozen=True)
class Wrappers:
    remove: frozenset[str]
    front: tuple[str, ...]

    def strip(self, key: str) -> str:
        """`key` without wrapper components; most keys come back as they are."""
        if any(name in key for name in self.remove):
            key = ".".join(part for part in key.split(".") if part not in self.remove)
        while front := next((name for name in self.front if key.startswith(f"{name}.")), ""):
            key = key[len(front) + 1 :]
        return key


@cache
def wrappers() -> Wrappers:
    document = tomllib.loads((formats_dir() / "wrappers.toml").read_text("utf-8"))
    return Wrappers(frozenset(cast(list[str], document["remove"])), tuple(document["front"]))


def strip_adapter_name(key: str, slots: frozenset[str]) -> tuple[str, str]:
    """`x.lora_A.default.weight` and `x.default.lora_A.weight` as (`x.lora_A.weight`, `default`).

    A raw `state_dict()` of a PEFT model keeps the adapter's name, a free word without dots,
    behind each of the layout's slots; some trainers put it before.
    """
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part not in slots:
            continue
        if i > 0 and parts[i - 1] == "default":
            return ".".join(parts[: i - 1] + parts[i:]), "default"
        if i + 1 < len(parts) and parts[i + 1] not in _NO_ADAPTER_NAME:
            name = parts[i + 1]
            # `modules_to_save` is a slot that is no part of the stored name itself.
            kept = [] if part == "modules_to_save" else [part]
            return ".".join(parts[:i] + kept + parts[i + 2 :]), name
        break
    return key, ""
