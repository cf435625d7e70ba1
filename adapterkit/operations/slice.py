"""slice: a part of an adapter, its parts at other strengths, or one adapter as two."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from adapterkit.adapter import Adapter, Receipt
from adapterkit.alignment import own_target
from adapterkit.blocks import block_of
from adapterkit.deltas import Change
from adapterkit.deltas.strength import at_strength
from adapterkit.derived import derived
from adapterkit.dylora import TrainedBy, first_ranks, trained_by
from adapterkit.errors import Json, Refused, UsageError, located
from adapterkit.operations.convert import Conversion, ConvertOptions, Verify, write_plan
from adapterkit.operations.sources import Source
from adapterkit.operations.sources import open as open_source
from adapterkit.plan import Options, Plan, make_plan
from adapterkit.recut import Preparation
from adapterkit.scale import ScaleFrom
from adapterkit.selection import Module, Selector, divided, modules_of, select
from adapterkit.specs.families import Family, Place
from adapterkit.stores.atomic import destination
from adapterkit.strengths import Strengths, parse_strengths

Changes = dict[Place, tuple[Change, ...]]

LEFT_OUT = "not kept"
AT_ZERO = "strength 0"
IN_THE_OTHER = "in the other file"


@dataclass(frozen=True)
class SliceOptions:
    """What part of an adapter, and how to write it; every field has a command-line option of its name.

    keep, drop: components, blocks, modules' names with wildcards (see `selection.Selector`); nothing
    kept means all, and what is dropped is not kept.  scale: see `strengths.parse_strengths`.
    first_ranks: of a DyLoRA.  trained_by: whose DyLoRA, where the file does not say.
    to: a format; None for the file's own.  as_lora: expand what has an exact low-rank form.
    family, scale_from, allow, verify, force: as for `convert`.
    """

    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    scale: str = ""
    first_ranks: int | None = None
    trained_by: TrainedBy | None = None
    to: str | None = None
    as_lora: bool = False
    family: str | None = None
    scale_from: ScaleFrom | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    verify: Verify = "sample"
    force: bool = False


@dataclass(frozen=True)
class Fate:
    """What became of one change, or of a stretch of rows of one.

    strength: None where it was left out.
    """

    component: str
    block: str
    module: str
    strength: float | None


@dataclass(frozen=True)
class Slicing:
    """The outcome of `slice`: plans, what became of each change, and, unless only planned, the files.

    rest: the plan of what was left out, where that was asked for.
    """

    plan: Plan
    rest: Plan | None
    fates: tuple[Fate, ...]
    conversion: Conversion | None = None
    rest_conversion: Conversion | None = None


def plan_slice(source: Source, options: SliceOptions, *, rest: bool = False) -> Slicing:
    """What `slice` would write, with every error that it would raise before writing.

    rest: plan a second adapter of all that is left out, so that both together are the source.
    Raises UsageError for names that match nothing, Unrepresentable for changes that cannot be cut or
    scaled as asked, and what `load` and `make_plan` raise.
    """
    _require_something(options, rest)
    opened = open_source(source, family=options.family)
    with located(opened.store.label):
        adapter = opened.load(allow=options.allow, scale_from=options.scale_from)
        target = own_target(adapter) if options.to is None else adapter.family.target(options.to)
        opened.explanation.decided(opened.store.label, target.name)
        if options.first_ranks is not None and options.trained_by is None:
            options = replace(options, trained_by=trained_by(adapter.metadata))
        parts = _divide(adapter, options)
        how = Options(as_lora=options.as_lora, allow=frozenset(options.allow))
        plan = make_plan(_kept(adapter, parts, options, rest), target, how)
        other = make_plan(_rest(adapter, parts, options), target, how) if rest else None
        return Slicing(plan, other, tuple(parts.fates))


def slice(
    source: Source,
    output: str | Path,
    options: SliceOptions | None = None,
    *,
    rest: str | Path | None = None,
) -> Slicing:
    """Write a part of an adapter, its parts at the strengths that were asked for.

    rest: where to write what is left out; the two add up to the source.
    Nothing is written unless everything can be planned; each output is read back and compared before
    it takes its name. Raises what `plan_slice` and the writer raise.
    """
    options = options or SliceOptions()
    if rest is not None and Path(rest).absolute() == Path(output).absolute():
        raise UsageError("the part and the rest would be one file", hint="name two files")
    planned = plan_slice(source, options, rest=rest is not None)
    writing = ConvertOptions(verify=options.verify, force=options.force)
    if rest is not None and not planned.plan.layout.folder:
        # Told before the part is written, not after.
        destination(Path(rest), options.force)
    done = replace(planned, conversion=write_plan(planned.plan, Path(output), writing))
    if planned.rest is None or rest is None:
        return done
    return replace(done, rest_conversion=write_plan(planned.rest, Path(rest), writing))


def _require_something(options: SliceOptions, rest: bool) -> None:
    selects = bool(options.keep or options.drop)
    scales = bool(options.scale) or options.first_ranks is not None
    if not selects and not scales:
        raise UsageError(
            "nothing to slice: all would be kept as it is",
            hint="--keep, --drop, --scale or --first-ranks say what is wanted",
        )
    if rest and (scales or not selects):
        raise UsageError(
            "the rest is what --keep and --drop leave out, as it is",
            hint="with --rest give --keep or --drop, and scale each of the two files afterwards",
        )
    if options.trained_by is not None and options.first_ranks is None:
        raise UsageError(
            "whose DyLoRA it is tells how its first ranks count", hint="give --first-ranks as well"
        )
    if options.first_ranks is not None and options.first_ranks < 1:
        raise UsageError(f"{options.first_ranks} ranks are none", hint="give at least 1")


@dataclass
class _Parts:
    """kept: what is written.  left: what --keep and --drop leave out.  fates: of every stretch.

    used: the places of which something is kept.  reasons: why something of a place is not.
    passengers: those that stay.
    """

    kept: Changes = field(default_factory=dict)
    left: Changes = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    used: dict[Place, None] = field(default_factory=dict)
    reasons: dict[Place, str] = field(default_factory=dict)
    passengers: Collection[str] = ()


@dataclass(frozen=True)
class _Choice:
    """What is asked of each module."""

    keep: tuple[Selector, ...]
    drop: tuple[Selector, ...]
    strengths: Strengths

    def of(self, module: Module) -> tuple[bool, float]:
        kept = not self.keep or any(selector.matches(module) for selector in self.keep)
        kept = kept and not any(selector.matches(module) for selector in self.drop)
        return kept, self.strengths.of(module)


def _divide(adapter: Adapter, options: SliceOptions) -> _Parts:
    modules = [
        module for place in adapter.changes for module in modules_of(place, adapter.natives.get(place, ""))
    ]
    read = partial(_selectors, family=adapter.family, modules=modules, passengers=adapter.passengers.keys())
    (keep, _), (drop, dropped) = read(options.keep), read(options.drop)
    choice = _Choice(keep, drop, parse_strengths(options.scale, adapter.family, modules))
    parts = _Parts(passengers=[key for key in adapter.passengers if key not in dropped])
    for place, changes in adapter.changes.items():
        with located(f"`{adapter.natives.get(place, place.span[0].module)}`"):
            _divide_place(parts, adapter, place, changes, choice, options.as_lora)
    if options.first_ranks is not None and options.trained_by is not None:
        parts.kept = _with_first_ranks(adapter, parts.kept, options.first_ranks, options.trained_by)
    return parts


def _selectors(
    texts: Sequence[str], family: Family, modules: Sequence[Module], passengers: Collection[str]
) -> tuple[tuple[Selector, ...], set[str]]:
    """What the texts select: modules, and tensors that travel along by their keys."""
    found: list[Selector] = []
    carried: set[str] = set()
    for text in texts:
        keys = {key for key in passengers if fnmatchcase(key, text)}
        carried |= keys
        if not keys or any(fnmatchcase(module.file, text) for module in modules):
            found.append(select(text, family, modules))
    return tuple(found), carried


def _divide_place(
    parts: _Parts,
    adapter: Adapter,
    place: Place,
    changes: Sequence[Change],
    choice: _Choice,
    as_lora: bool,
) -> None:
    file = adapter.natives.get(place, "")
    asked = {module.name: choice.of(module) for module in modules_of(place, file)}
    if as_lora and len(set(asked.values())) > 1:
        changes = [Preparation(expand=True).of(change) for change in changes]
    for part, taken, (kept, strength) in divided(place, changes, lambda piece: asked[piece.module]):
        block = block_of(adapter.family, place.component, part.span[0].module)
        parts.fates.append(
            Fate(place.component, block, file or part.span[0].module, strength if kept else None)
        )
        if not kept:
            parts.left[part] = taken
            parts.reasons[place] = LEFT_OUT
        elif strength == 0.0:
            parts.reasons[place] = AT_ZERO
        else:
            scaled = (at_strength(change, strength) for change in taken)
            parts.kept[part] = tuple(change for change in scaled if change is not None)
            parts.used[place] = None


def _with_first_ranks(adapter: Adapter, changes: Changes, count: int, by: TrainedBy) -> Changes:
    found: Changes = {}
    for place, several in changes.items():
        with located(f"`{adapter.natives.get(place, place.span[0].module)}`"):
            found[place] = tuple(first_ranks(change, count, by) for change in several)
    if found == changes:
        raise UsageError(
            f"no module has more than {count} ranks",
            code="first-ranks",
            hint="give fewer ranks than they have",
        )
    return found


def _kept(adapter: Adapter, parts: _Parts, options: SliceOptions, rest: bool) -> Adapter:
    """What was asked for, as an adapter."""
    reasons = dict.fromkeys(parts.reasons, IN_THE_OTHER) if rest else parts.reasons
    gone = [key for key in adapter.passengers if key not in parts.passengers]
    dropped = _missing(adapter, parts.used, reasons) | dict.fromkeys(gone, IN_THE_OTHER if rest else LEFT_OUT)
    return _adapter(adapter, parts.kept, dropped, options)


def _rest(adapter: Adapter, parts: _Parts, options: SliceOptions) -> Adapter:
    """What was left out, as an adapter."""
    if not parts.left:
        raise Refused(
            "nothing is left out, so there is no rest",
            code="nothing-left",
            hint="keep less, or drop more of it",
        )
    dropped = _missing(adapter, parts.reasons, dict.fromkeys(parts.used, IN_THE_OTHER))
    return _adapter(adapter, parts.left, dropped | dict.fromkeys(parts.passengers, IN_THE_OTHER), options)


def _missing(adapter: Adapter, present: Collection[Place], reasons: Mapping[Place, str]) -> dict[str, str]:
    """The tensors of the file of which nothing is there, with why; a place that is there keeps its own."""
    stays = {key for place in present for key in _keys(adapter, place)}
    return {
        key: reason
        for place, reason in reasons.items()
        if place not in present
        for key in _keys(adapter, place)
        if key not in stays
    }


def _keys(adapter: Adapter, place: Place) -> list[str]:
    """The tensors of the file that the changes of a place were made of."""
    return [key for roles in adapter.keys.get(place, ()) for key in roles.values()]


def _adapter(
    adapter: Adapter, changes: Changes, dropped: Mapping[str, str], options: SliceOptions
) -> Adapter:
    """The adapter with some of its changes; the receipt says what became of the other tensors."""
    if not changes:
        raise Refused(
            "nothing of the adapter is left", code="nothing-left", hint="keep more, or drop less of it"
        )
    passengers = {key: tensor for key, tensor in adapter.passengers.items() if key not in dropped}
    gone = len(adapter.passengers) - len(passengers)
    read = adapter.receipt
    receipt = Receipt(
        read.total, read.mapped - (len(dropped) - gone), read.carried - gone, {**read.dropped, **dropped}
    )
    made = derived(adapter, changes, operation="slice", facts=_facts(adapter, options))
    keys = {place: keys for place, keys in adapter.keys.items() if place in changes}
    return replace(made, receipt=receipt, passengers=passengers, keys=keys)


def _facts(adapter: Adapter, options: SliceOptions) -> dict[str, Json]:
    """What the metadata says of it."""
    path = adapter.store.path if adapter.store is not None else None
    given: dict[str, Json] = {
        "from": path.name if path is not None else "",
        "keep": list[Json](options.keep),
        "drop": list[Json](options.drop),
        "scale": options.scale,
        "first_ranks": options.first_ranks,
        "trained_by": options.trained_by,
    }
    return {name: value for name, value in given.items() if value}
