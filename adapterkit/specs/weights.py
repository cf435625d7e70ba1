"""What the end of a weight's name says about it: read from formats/weights.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from adapterkit.specs.paths import formats_dir


@dataclass(frozen=True)
class WeightNames:
    """Ends of modules' names, and fronts: what may stand before all names of a model.

    lone_head: what a head is called that no longer has the embedding's numbers.
    """

    embedding: frozenset[str]
    head: frozenset[str]
    lone_head: str
    transposed: frozenset[str]
    fronts: tuple[str, ...]

    def is_embedding(self, module: str) -> bool:
        return _end(module) in self.embedding

    def is_head(self, module: str) -> bool:
        return _end(module) in self.head

    def may_be_transposed(self, module: str) -> bool:
        """Whether some models keep the weight of a module of this name as (in, out)."""
        return _end(module) in self.transposed


def _end(module: str) -> str:
    return module.rpartition(".")[2]


@cache
def weight_names() -> WeightNames:
    document = tomllib.loads((formats_dir() / "weights.toml").read_text("utf-8"))
    return WeightNames(
        frozenset(document["embedding"]),
        frozenset(document["head"]),
        document["head"][0],
        frozenset(document["transposed"]),
        tuple(document["fronts"]),
    )
