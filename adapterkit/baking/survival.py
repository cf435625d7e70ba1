"""How much of a change is left when it has been added to a weight and rounded.

A weight of 0.02 in bf16 has steps of 1e-4, so that changes of 1e-5 are mostly rounded away: the file is
written, no error is raised, and the model behaves as if nothing had been baked.  Here it is measured: the
change that arrived, after − before, is projected on the one that was wanted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from adapterkit.linalg.rounding import beyond, round_to

if TYPE_CHECKING:
    from torch import Tensor

# Dtypes by the names that users say; what they would keep is tried on a few numbers of each block.
_TRIED = {"bf16": "bfloat16", "fp16": "float16"}
# From here on nothing is lost that float32 had, which is what changes are computed in.
_WIDEST = "fp32"
_TRIAL = 1 << 14
# Numbers that are measured at once: three arrays of them fit into a core's cache.
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Kept:
    """What is left of one module's change, or of all of them together.

    ratio: ⟨after − before, wanted − before⟩ / ‖wanted − before‖²: 1 is all, 0 nothing; 1 where nothing
    was wanted, NaN where something is no number. cosine: between the two, less than 1 where noise was
    added, too. norm: ‖wanted − before‖, estimated where only some rows were measured.
    numbers: how many the weights have. beyond: of those measured, how many were too large for the dtype.
    """

    ratio: float
    cosine: float
    norm: float
    numbers: int
    beyond: int = 0


class _Block(NamedTuple):
    """Sums over the measured numbers of one block: ‖d‖², ⟨g, d⟩ and ‖g‖² of wanted d and given g."""

    numbers: int
    measured: int
    wanted: float
    common: float
    given: float
    beyond: int = 0


@dataclass
class _Module:
    blocks: list[_Block] = field(default_factory=list)
    trials: dict[str, list[_Block]] = field(default_factory=lambda: {name: [] for name in _TRIED})


class Survival:
    """Measures block by block; blocks may come in any order and from several threads.

    step: measure every step-th row of a block only, where a look at all of them would take too long.
    Blocks add up exactly, so that their order does not show in the figures.
    """

    def __init__(self, step: int = 1) -> None:
        self._step = step
        self._modules: dict[str, _Module] = {}
        self._lock = threading.Lock()

    def add(
        self, key: str, before: Tensor, wanted: Tensor, after: Tensor, numbers: int | None = None
    ) -> None:
        """One block of rows of the module `key`.

        before: the weight; wanted: weight and change in float32; after: what is written. All of one shape.
        numbers: how many it stands for, where its rows are a sample.
        """
        numbers = wanted.numel() if numbers is None else numbers
        if not wanted.numel():
            return
        before, wanted, after = (
            each[:: self._step] if each.dim() else each for each in (before, wanted, after)
        )
        block = _measured(numbers, before, wanted, after)
        few = max(1, wanted.numel() // _TRIAL)
        flat = [each.reshape(-1)[::few].contiguous() for each in (before, wanted)]
        trials = {name: _trial(flat[0], flat[1], name) for name in _TRIED}
        with self._lock:
            module = self._modules.setdefault(key, _Module())
            module.blocks.append(block)
            for name, trial in trials.items():
                module.trials[name].append(trial)

    def forget(self, key: str) -> None:
        """Leave out what was measured of a module that is to be done again."""
        with self._lock:
            self._modules.pop(key, None)

    @property
    def modules(self) -> Mapping[str, Kept]:
        """What is left of each module's change, by name."""
        return {key: _kept(module.blocks) for key, module in sorted(self._modules.items())}

    @property
    def total(self) -> Kept:
        """All modules as one change, so that each counts by its size."""
        return _kept(block for module in self._modules.values() for block in module.blocks)

    @property
    def predicted(self) -> Mapping[str, Kept]:
        """What the dtypes would leave of all modules if rounded to the nearest, tried on some numbers."""
        found = {
            name: _kept(block for module in self._modules.values() for block in module.trials[name])
            for name in _TRIED
        }
        total = self.total
        return {**found, _WIDEST: Kept(1.0, 1.0, total.norm, total.numbers)}

    def below(self, threshold: float) -> tuple[str, ...]:
        """The modules of which less is left, the worst first; one that is no number counts as nothing."""
        ratios = {key: kept.ratio for key, kept in self.modules.items()}
        low = [key for key, ratio in ratios.items() if not ratio >= threshold]
        return tuple(sorted(low, key=lambda key: (not math.isnan(ratios[key]), ratios[key], key)))

    def would_keep(self, threshold: float) -> str:
        """The narrowest of bf16, fp16 and fp32 that leaves so much of all modules together, by the trial."""
        return next(
            name
            for name, kept in self.predicted.items()
            if name == _WIDEST or (kept.ratio >= threshold and not kept.beyond)
        )


def _measured(numbers: int, before: Tensor, wanted: Tensor, after: Tensor) -> _Block:
    """Sums in float32 over pieces that stay in the cache, accurate to 1e-7, and in float64 over them."""
    import torch

    size = _PIECE if wanted.device.type == "cpu" else wanted.numel()
    pieces = zip(*(torch.split(each.reshape(-1), size) for each in (before, wanted, after)), strict=True)
    sums = [_products(*(each.float() for each in piece)) for piece in pieces]
    squared, common, given = torch.stack(sums).double().sum(0).tolist()
    return _Block(numbers, wanted.numel(), squared, common, given, beyond(wanted, after.dtype))


def _products(before: Tensor, wanted: Tensor, after: Tensor) -> Tensor:
    """‖d‖², ⟨g, d⟩ and ‖g‖² of wanted d and given g."""
    import torch

    change, given = wanted - before, after - before
    return torch.stack([change.dot(change), given.dot(change), given.dot(given)])


def _trial(before: Tensor, wanted: Tensor, name: str) -> _Block:
    import torch

    return _measured(wanted.numel(), before, wanted, round_to(wanted, getattr(torch, _TRIED[name])))


def _kept(blocks: Iterable[_Block]) -> Kept:
    parts = tuple(blocks)
    numbers, too_large = sum(part.numbers for part in parts), sum(part.beyond for part in parts)
    wanted = _sum(part.wanted for part in parts)
    if wanted == 0:
        return Kept(1.0, 1.0, 0.0, numbers, too_large)
    common, given = _sum(part.common for part in parts), _sum(part.given for part in parts)
    lengths = math.sqrt(wanted * given)
    norm = math.sqrt(wanted * numbers / sum(part.measured for part in parts))
    return Kept(common / wanted, common / lengths if lengths else 0.0, norm, numbers, too_large)


def _sum(values: Iterable[float]) -> float:
    """Rounded once, and so the same in any order; NaN if one of them is no finite number."""
    values = tuple(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
