"""From singular values to an adapter of chosen ranks: the way that resize, merge and extract share.

A part is one pair of factors of the output before its rank is chosen. Choosing ranks, making the
factors and planning the file belong together, because a limit on the file's size holds for all of
it: the header as well, which grows with the digits of the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adapterkit.adapter import Adapter, Receipt
from adapterkit.deltas import Change, EmbeddingLowRank, LowRank
from adapterkit.derived import derived
from adapterkit.errors import Json, UsageError
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.pool import each
from adapterkit.metadata import output_metadata
from adapterkit.peft_config import component_config
from adapterkit.plan import Options, Plan, make_plan
from adapterkit.ranks import CONV, LINEAR, RankRule, Spectrum, allocate, cost_of
from adapterkit.specs.families import Place, Target
from adapterkit.stores.header import build_header

# Singular values smaller than this, beside the largest, are what float64 arithmetic leaves of zeros.
_ZERO = 2.0**-40

Finish = Callable[[LowRank], Change]


@dataclass(frozen=True, eq=False)
class Part:
    """A change of one place of the output, decomposed.

    shape: the weight's, (o, i[, h, w]).
    scale: what multiplies up @ down in memory; alpha is then scale · rank.
    embedding: whether it is LoRA of an embedding.
    noise, weight: see `ranks.Spectrum`.
    dtype: of its factors unless the options say another; None: that of what is at the place now.
    original: a change that stays as it is, bit for bit, where the rank chosen is no less than its own,
    or where factors of that rank would be no smaller than it is (a whole delta).
    beside: changes of the place that stay.
    finish: what is made of the new factors; DoRA puts its magnitudes around them.
    alpha: where it is given, the scale is alpha / rank.
    """

    decomposition: Decomposition
    shape: tuple[int, ...]
    scale: float = 1.0
    embedding: bool = False
    noise: float = 0.0
    weight: float = 1.0
    dtype: torch.dtype | None = None
    original: Change | None = None
    beside: tuple[Change, ...] = ()
    finish: Finish | None = None
    alpha: float | None = None

    @property
    def full(self) -> int:
        """The least rank that says the change exactly."""
        values = self.decomposition.values
        if self.decomposition.rank < min(self.decomposition.shape):
            exact = float(values.square().sum()) >= self.decomposition.energy * (1 - _ZERO)
            if not exact:
                return min(self.decomposition.shape)
        return int((values > _ZERO * values[0]).sum()) if values.numel() else 0

    @property
    def layer(self) -> str:
        """A kernel of one element is a linear layer, as trainers count it."""
        return CONV if math.prod(self.shape[2:]) > 1 else LINEAR

    def spectrum(self, dtype: torch.dtype) -> Spectrum:
        """What the choice of its rank rests on, with factors written in `dtype`."""
        numbers = self.shape[0] + math.prod(self.shape[1:])
        return Spectrum(
            values=tuple(self.decomposition.values.tolist()),
            energy=self.decomposition.energy,
            cost=numbers * dtype.itemsize,
            layer=self.layer,
            full=self.full,
            noise=self.noise,
            weight=self.weight,
            stays=self.original is not None and self.original.rank is None,
        )

    def keeps(self, rank: int) -> bool:
        """Whether the original stays."""
        if self.original is None or rank == 0:
            return False
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        own = self.original.rank
        return own <= rank if own is not None else rank * (rows + columns) >= rows * columns

    def left_out(self, rank: int) -> float:
        """‖delta − what is kept‖², before rounding."""
        return 0.0 if self.keeps(rank) else self.decomposition.left_out(rank)

    def error(self, rank: int) -> float:
        """‖delta − what is kept‖ / ‖delta‖, before rounding."""
        return 0.0 if self.keeps(rank) else self.decomposition.error(rank)

    def change(self, rank: int, dtype: torch.dtype) -> Change:
        """The best change of that rank."""
        if self.original is not None and self.keeps(rank):
            return self.original
        scale = (self.scale if self.alpha is None else self.alpha / rank) or 1.0
        up, down = self.decomposition.factors(rank, scale)
        ones = (1,) * len(self.shape[2:])
        kind = EmbeddingLowRank if self.embedding else LowRank
        made = kind(
            _rounded(up.reshape(*up.shape, *ones), dtype),
            _rounded(down.reshape(rank, *self.shape[1:]), dtype),
            scale,
        )
        return self.finish(made) if self.finish else made


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype).contiguous()


@dataclass(frozen=True, eq=False)
class Reduction:
    """What was kept of each part.

    ranks: 0 where a part was left out.  changes: of the parts that were not.
    dtypes: of the factors.  size: bytes of all files that will be written.
    """

    parts: Mapping[Place, Part]
    ranks: Mapping[Place, int]
    changes: Mapping[Place, Change]
    dtypes: Mapping[Place, torch.dtype]
    size: int

    @property
    def left_out(self) -> tuple[Place, ...]:
        """The places of which nothing is kept."""
        return tuple(place for place, rank in self.ranks.items() if rank == 0)

    @property
    def errors(self) -> dict[Place, float]:
        """Per place ‖delta − kept‖ / ‖delta‖, before rounding."""
        return {place: part.error(self.ranks[place]) for place, part in self.parts.items()}

    @property
    def error(self) -> float:
        """The relative Frobenius error over all parts together, before rounding."""
        return self._error(dict.fromkeys(self.parts, 1.0))

    @property
    def weighted_error(self) -> float:
        """The same with each part's weight, as rules of error and energy count it."""
        return self._error({place: part.weight for place, part in self.parts.items()})

    def _error(self, weights: Mapping[Place, float]) -> float:
        parts = self.parts.items()
        total = math.fsum(weights[place] * part.decomposition.energy for place, part in parts)
        beyond = math.fsum(weights[place] * part.left_out(self.ranks[place]) for place, part in parts)
        return math.sqrt(min(1.0, beyond / total)) if total else 0.0

    @property
    def energy(self) -> float:
        """The share of ‖delta‖² that is kept."""
        return 1.0 - self.error**2


def fitted(
    adapter: Adapter,
    parts: Mapping[Place, Part],
    rule: RankRule,
    target: Target,
    options: Options | None = None,
    *,
    operation: str = "resize",
    facts: Mapping[str, Json] | None = None,
    natives: Mapping[Place, str] | None = None,
) -> tuple[Plan, Reduction]:
    """Choose ranks by `rule`, put the new factors in place of what was there, and plan the file.

    What `adapter` changes elsewhere stays. A part of which nothing is kept is left out, its tensors
    are dropped in the receipt. With a rule of size all files together, headers and configuration
    included, are at most that large.
    operation, facts, natives: see `adapterkit.derived.derived`.
    Raises UsageError for a size that is too small, and what `make_plan` raises.
    """
    fitting = _Fitting(
        adapter,
        parts,
        target,
        options or Options(),
        operation,
        {**rule.facts, **(facts or {})},
        natives or {},
    )
    if rule.size is None:
        return fitting.at(allocate(fitting.spectra, rule))
    fixed = 0
    while True:
        try:
            ranks = allocate(fitting.spectra, rule, fixed=fixed)
        except UsageError:
            return fitting.smallest(rule, rule.size)
        plan, reduction = fitting.at(ranks)
        if reduction.size <= rule.size:
            return plan, reduction
        # What ranks do not pay for grows a little with their digits; never less than what was too much.
        fixed = max(reduction.size - cost_of(fitting.spectra, ranks), fixed + 1)


@dataclass
class _Fitting:
    """One adapter on its way to the ranks it will have; factors are made once for each rank tried."""

    adapter: Adapter
    parts: Mapping[Place, Part]
    target: Target
    options: Options
    operation: str
    facts: Mapping[str, Json]
    natives: Mapping[Place, str]
    dtypes: dict[Place, torch.dtype] = field(init=False)
    spectra: dict[Place, Spectrum] = field(init=False)
    made: dict[Place, tuple[int, Change]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtypes = {place: self._dtype(place, part) for place, part in self.parts.items()}
        self.spectra = {place: part.spectrum(self.dtypes[place]) for place, part in self.parts.items()}

    def _dtype(self, place: Place, part: Part) -> torch.dtype:
        if self.options.dtype is not None:
            return self.options.dtype
        return part.dtype or stored_dtype(self.adapter.changes.get(place, ()))

    def at(self, ranks: Mapping[Place, int]) -> tuple[Plan, Reduction]:
        wanted = {place: rank for place, rank in ranks.items() if rank}
        missing = [place for place, rank in wanted.items() if self.made.get(place, (0, None))[0] != rank]
        made = each(lambda place: self.parts[place].change(wanted[place], self.dtypes[place]), missing)
        self.made |= {place: (wanted[place], one) for place, one in zip(missing, made, strict=True)}
        changes = {place: self.made[place][1] for place in wanted}
        plan = make_plan(self._adapter(changes), self.target, self.options)
        return plan, Reduction(self.parts, ranks, changes, self.dtypes, file_size(plan))

    def smallest(self, rule: RankRule, size: int) -> tuple[Plan, Reduction]:
        """The plan of the least ranks. UsageError, with the size that it takes, if that is above `size`."""
        plan, reduction = self.at(allocate(self.spectra, replace(rule, size=None, rank=rule.least)))
        if reduction.size > size:
            raise UsageError(
                f"{size} bytes are too few: with the least ranks the file has {reduction.size}",
                code="size",
                hint=f"--size {reduction.size}B is the smallest; leaving modules out makes it smaller",
                details={"size": size, "smallest": reduction.size},
            )
        return plan, reduction

    def _adapter(self, changes: Mapping[Place, Change]) -> Adapter:
        every: dict[Place, tuple[Change, ...]] = dict(self.adapter.changes)
        for place, part in self.parts.items():
            new = (changes[place],) if place in changes else ()
            every[place] = (*new, *part.beside)
        made = derived(self.adapter, every, operation=self.operation, facts=self.facts, natives=self.natives)
        return replace(made, receipt=_receipt(self.adapter, [p for p in self.parts if not every[p]]))


def _receipt(adapter: Adapter, gone: list[Place]) -> Receipt:
    """The adapter's receipt when these places have nothing left."""
    keys = {key: "zero" for place in gone for roles in adapter.keys.get(place, ()) for key in roles.values()}
    read = adapter.receipt
    return replace(read, mapped=read.mapped - len(keys), dropped={**read.dropped, **keys})


def stored_dtype(changes: tuple[Change, ...]) -> torch.dtype:
    """The dtype of the matrices that make up these changes; float32 where they differ or are no floats."""
    found = {t.dtype for change in changes for t in change.tensors().values() if t.ndim >= 2}
    dtype = found.pop() if len(found) == 1 else torch.float32
    return dtype if dtype.is_floating_point else torch.float32


def file_size(plan: Plan) -> int:
    """The bytes of all files that writing the plan makes."""
    metadata = output_metadata(plan)
    if not plan.layout.folder:
        header = plan.header()
        return len(build_header(header, metadata)) + sum(info.nbytes for info in header)
    total = 0
    for component in plan.components:
        header = plan.header(component)
        config = json.dumps(component_config(plan, component), ensure_ascii=False, indent=2)
        total += len(build_header(header, metadata)) + sum(info.nbytes for info in header)
        total += len(config.encode()) + 1
    return total
