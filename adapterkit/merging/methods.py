"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapterkit.linalg.decomposition import Decomposition
from adapterkit.merging.settings import Settings
from adapterkit.merging.spectral import core, knots, tsv
from adapterkit.merging.tasks import Task

Factored = Callable[[Sequence[Task], Settings, str, int | None], Decomposition]


@dataclass(frozen=True)
class Method:
    """One way of making several deltas one.

    way: what it works on: the weighted "sum", the "factors", or the "numbers" of the whole deltas.
    exact: whether nothing is left out unless a rank rule asks for it. Of the others, whose results
    have every rank or more than one would want, the largest rank of the inputs is kept.
    uses: the settings that concern it.
    """

    name: str
    title: str
    way: Literal["sum", "factors", "numbers"]
    exact: bool
    source: str = ""
    factored: Factored | None = None
    uses: tuple[str, ...] = ()


_SPARSE = ("density",)
_SIGNS = ("density", "divide")
_RANDOM = ("density", "seed")
_INNER = ("inner", "density", "divide", "seed")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", "weighted sum", "sum", exact=True),
        Method("svd", "weighted sum, truncated", "sum", exact=False),
        Method("ties", "TIES", "numbers", False, "arXiv:2306.01708", uses=_SIGNS),
        Method("dare", "DARE", "numbers", False, "arXiv:2311.03099", uses=_RANDOM),
        Method("dare-ties", "DARE with TIES", "numbers", False, "arXiv:2311.03099", uses=(*_SIGNS, "seed")),
        Method("magnitude", "magnitude pruning", "numbers", False, uses=_SPARSE),
        Method("knots", "KnOTS", "factors", True, "arXiv:2410.19735", knots, _INNER),
        Method("tsv", "TSV-Merge", "factors", True, "arXiv:2412.00081", tsv),
        Method("core", "Core Space", "factors", True, "arXiv:2509.17786", core, _INNER),
        Method("iso-c", "Iso-C", "sum", True, "arXiv:2502.04959"),
    )
}
