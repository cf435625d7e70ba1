"""resize: the same change with fewer ranks, chosen so that least of it is lost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter import Adapter
from adapterkit.alignment import aligned, own_target
from adapterkit.checkpoint import Checkpoint, Model, open_checkpoint
from adapterkit.deltas import Change
from adapterkit.errors import Json, Refused, Unrepresentable, located
from adapterkit.linalg.devices import device_of
from adapterkit.linalg.pool import one_thread
from adapterkit.operations.convert import Conversion, ConvertOptions, Verify, plan_options, write_plan
from adapterkit.operations.sources import Source
from adapterkit.operations.sources import open as open_source
from adapterkit.plan import Options, Plan
from adapterkit.proof import total_error
from adapterkit.ranks import RankRule, Spectrum, allocate, cost_of, left_out
from adapterkit.reduction import Reduction, fitted
from adapterkit.resizing import Decomposed, Progress, Settings, decomposed
from adapterkit.scale import ScaleFrom
from adapterkit.specs.families import Place, Target
from adapterkit.specs.layouts import layouts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ResizeOptions:
    """How to resize; every field has a command-line option of its name.

    to: a format; None for the file's own.
    dtype: "fp32", "fp16" or "bf16" for the written factors; None keeps what they are.
    base: the model that the adapter changes. Errors then count relative to its weights; DoRA needs it.
    exact: singular values of whole deltas to rounding, which takes longer.
    device: where to compute, such as "cuda"; None: the processor.
    family, scale_from, allow: see `load`; allow also takes what `convert` does, and "nonfinite"
    leaves modules with such numbers as they are.
    verify, force: see `ConvertOptions`.
    """

    to: str | None = None
    dtype: str | None = None
    base: Model | None = None
    exact: bool = False
    device: str | None = None
    family: str | None = None
    scale_from: ScaleFrom | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    verify: Verify = "sample"
    force: bool = False

    @property
    def writing(self) -> ConvertOptions:
        """What of it concerns the written file."""
        return ConvertOptions(dtype=self.dtype, allow=self.allow, verify=self.verify, force=self.force)


@dataclass(frozen=True, eq=False)
class Resizing:
    """An adapter with the ranks that a rule gave it.

    plan: what is written; `plan.state_dict()` are its tensors, `plan.adapter` is the adapter.
    before: the rank of each place, as it was read.  stayed, faulty: see `resizing.Decomposed`.
    conversion: the files, if any were written.
    measured: the relative error of the written file against the input, all modules together; None
    where nothing was written or verified.
    """

    source: Adapter
    rule: RankRule
    plan: Plan
    reduction: Reduction
    before: Mapping[Place, int]
    stayed: Mapping[str, int]
    faulty: tuple[Place, ...]
    conversion: Conversion | None = None
    measured: float | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the resized adapter, by the keys of the format."""
        return self.plan.state_dict()


@dataclass(frozen=True)
class Point:
    """What one rank for all would give, and what the same bytes give when each goes where it saves most.

    size: bytes of the file, all but exactly.  error, shared: the relative errors of the two ways.
    """

    rank: int
    size: int
    error: float
    shared: float


@dataclass(frozen=True, eq=False)
class Resizable:
    """An adapter whose singular values are known, ready for any rule."""

    source: Adapter
    adapter: Adapter
    target: Target
    options: ResizeOptions
    found: Decomposed
    base: Checkpoint | None

    def at(self, rule: RankRule) -> Resizing:
        """The adapter with the ranks that `rule` gives. Raises what `reduction.fitted` does."""
        plan, reduction = fitted(
            self.adapter,
            self.found.parts,
            rule,
            self.target,
            self._options,
            operation="resize",
            facts=self._facts,
        )
        before = {place: _rank_read(self.source, self.adapter, place) for place in self.found.parts}
        return Resizing(self.source, rule, plan, reduction, before, self.found.stayed, self.found.faulty)

    def curve(self) -> tuple[Point, ...]:
        """Size against error for ranks 1, 2, 4, … up to the highest that is known."""
        least = self.at(RankRule(rank=1)).reduction
        spectra = {place: part.spectrum(least.dtypes[place]) for place, part in self.found.parts.items()}
        fixed = least.size - cost_of(spectra, least.ranks)
        highest = max((min(one.full, len(one.values)) for one in spectra.values()), default=0)
        points = []
        for rank in _doubled(highest):
            same = allocate(spectra, RankRule(rank=rank))
            size = fixed + cost_of(spectra, same)
            best = allocate(spectra, RankRule(size=size), fixed=fixed)
            points.append(Point(rank, size, _error(spectra, same), _error(spectra, best)))
        return tuple(points)

    def write(self, resized: Resizing, output: str | Path) -> Resizing:
        """Write a resizing of this adapter, and measure the error that the written file makes."""
        # Many small tensors: threads inside each would mostly wait for one another.
        with one_thread():
            done = write_plan(resized.plan, Path(output), self.options.writing)
        if self.options.verify == "none":
            return replace(resized, conversion=done)
        family = self.source.family.key
        with open_source(output, family=family) as opened:
            written = opened.load(allow=self.options.allow)
            measured = total_error(self.source, written, base=self._weight)
        return replace(resized, conversion=done, measured=measured)

    @property
    def writes_folder(self) -> bool:
        """Whether what is written is a folder."""
        return bool(layouts()[self.target.layout].folder)

    @property
    def _options(self) -> Options:
        return plan_options(self.options.writing)

    @property
    def _facts(self) -> dict[str, Json]:
        """What the metadata says of it, beside the rule: files by name, without their folders."""
        facts: dict[str, Json] = {}
        if self.source.store is not None and self.source.store.path is not None:
            facts["from"] = self.source.store.path.name
        if self.base is not None and self.base.store.path is not None:
            facts["base"] = self.base.store.path.name
        return facts

    def _weight(self, place: Place) -> Tensor | None:
        return None if self.base is None else self.base.tensor(place.component, place.span, place.param)


def resizable(
    source: Source | Adapter,
    options: ResizeOptions | None = None,
    *,
    rules: Sequence[RankRule] = (),
    progress: Progress | None = None,
) -> Resizable:
    """Read an adapter and find its singular values, once for any number of rules.

    source: what `load` takes, or an adapter in memory.
    rules: those that will be asked for, where that is known: less is then computed.
    progress: called with a stage's name, how much of it is done, and of how much.
    Raises what `load` and `resizing.decomposed` raise.
    """
    options = options or ResizeOptions()
    device = device_of(options.device)
    adapter = source if isinstance(source, Adapter) else _load(source, options)
    with located(adapter.store.label if adapter.store is not None else "in memory"):
        target = adapter.family.target(options.to) if options.to else own_target(adapter)
        lined_up = _aligned(adapter, target)
        base = None if options.base is None else open_checkpoint(options.base, adapter.family.key)
        settings = Settings(
            most=_highest(rules),
            exact=options.exact,
            device=device,
            noise=not rules or any(rule.auto for rule in rules),
            allow=options.allow,
            progress=progress,
        )
        found = decomposed(lined_up, base, settings)
        if not found.parts:
            raise _nothing_to_resize(found)
    return Resizable(adapter, lined_up, target, options, found, base)


def resize(
    source: Source | Adapter,
    output: str | Path | None = None,
    rule: RankRule | None = None,
    options: ResizeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Resizing:
    """The same adapter with the ranks that `rule` gives; without a rule, with no more than it needs.

    source: what `load` takes, or an adapter in memory.
    output: a file, or a folder for formats that are folders; None to write nothing: the result's
    `plan.adapter` and `state_dict()` are then what is wanted.
    Nothing is written unless everything can be; the file is read back and compared before it takes
    its name, and its error is measured. Raises what `resizable`, `Resizable.at` and `convert` raise.
    """
    rule = rule or RankRule()
    ready = resizable(source, options, rules=[rule], progress=progress)
    resized = ready.at(rule)
    return resized if output is None else ready.write(resized, output)


def _load(source: Source, options: ResizeOptions) -> Adapter:
    opened = open_source(source, family=options.family)
    with located(opened.store.label):
        if options.to is not None:
            opened.explanation.decided(opened.store.label, options.to)
    return opened.load(allow=options.allow, scale_from=options.scale_from)


def _nothing_to_resize(found: Decomposed) -> Refused:
    kinds = ", ".join(f"{count} {title}" for title, count in found.stayed.items())
    return Refused(
        f"no module has a rank that could be chosen: {kinds or 'their numbers are not finite'}",
        code="no-ranks",
        hint="bake the adapter into its base and extract the difference as LoRA",
        details={"kinds": dict(found.stayed)},
    )


def _highest(rules: Sequence[RankRule]) -> int | None:
    """The highest rank that any of them can give; None if that is open."""
    known = [rule.highest for rule in rules]
    highest = [rank for rank in known if rank is not None]
    return max(highest) if highest and len(highest) == len(known) else None


def _aligned(adapter: Adapter, target: Target) -> Adapter:
    """The adapter on the target's rows; kinds that cannot be cut so are expanded first."""
    try:
        return aligned(adapter, target)
    except Unrepresentable:
        return aligned(adapter, target, as_lora=True)


def _rank_read(source: Adapter, adapter: Adapter, place: Place) -> int:
    """The rank that a place had: as it was read, else that of the cut or stacked factors."""
    changes = source.changes.get(place) or adapter.changes[place]
    return sum(_rank(change) for change in changes)


def _rank(change: Change) -> int:
    """0 for what has none beside the changes that have."""
    rank = change.rank if change.rank is not None else change.expanded_rank
    if rank is None and not change.needs_base and len(change.shape) >= 2:
        rank = min(change.shape[0], math.prod(change.shape[1:]))
    return rank or 0


def _doubled(highest: int) -> list[int]:
    """1, 2, 4, … and at last `highest`."""
    powers = [2**power for power in range(highest.bit_length()) if 2**power < highest]
    return [*powers, highest] if highest else []


def _error(spectra: Mapping[Place, Spectrum], ranks: Mapping[Place, int]) -> float:
    total = math.fsum(one.weight * one.energy for one in spectra.values())
    return math.sqrt(min(1.0, left_out(spectra, ranks) / total)) if total else 0.0
