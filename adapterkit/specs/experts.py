"""Where the weights of a mixture's experts stand in files: read from formats/experts.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import cast

from adapterkit.specs.paths import formats_dir
from adapterkit.specs.tuner_config import TunerConfig


def tuned_parameters(config: TunerConfig, module: str) -> tuple[str, ...]:
    """The full names of the parameters that PEFT's factors at `module` can be for, the likeliest first.

    PEFT wraps one parameter after the other, in the order of `target_parameters`: the last is outermost.
    """
    parts = module.split(".")
    inner = _document()["inner"]
    depth = len(parts) - len([part for part in parts if part != inner])
    owner = ".".join(part for part in parts if part != inner)
    targets = cast(list[str], config.values.get("target_parameters") or [])
    names = [
        target.rpartition(".")[2]
        for target in reversed(targets)
        if f".{owner}".endswith(f".{target.rpartition('.')[0]}")
    ]
    likely = names[depth : depth + 1]
    return tuple(f"{owner}.{name}" for name in dict.fromkeys([*likely, *names]))


def expert_modules(stacked: str, expert: int) -> Iterator[tuple[str, ...]]:
    """The modules that an expert's part of a stacked tensor can be in a file, on top of each other.

    stacked: the tensor's full name in the model.
    """
    for table in cast(list[Mapping[str, list[str]]], _document()["experts"]):
        for end, parts in table.items():
            if end != "source" and f".{stacked}".endswith(f".{end}"):
                front = stacked[: len(stacked) - len(end)]
                yield tuple(front + part.format(expert) for part in parts)


@cache
def _document() -> Mapping[str, object]:
    return tomllib.loads((formats_dir() / "experts.toml").read_text("utf-8"))
