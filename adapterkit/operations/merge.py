"""merge: several adapters of one base model as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.adapter import Adapter, Receipt
from adapterkit.alignment import aligned, own_target
from adapterkit.checkpoint import Model, open_checkpoint
from adapterkit.deltas import Change
from adapterkit.deltas.tensors import same
from adapterkit.derived import derived
from adapterkit.errors import Json, Refused, StoreError, Unrepresentable, UsageError, located
from adapterkit.merging import METHODS, Divide, Inner, Input, Interference, Method, Recipe, Settings, merged
from adapterkit.merging.inputs import natives
from adapterkit.merging.making import wanted_at
from adapterkit.operations.alike import Found, Given, alike, loaded, name_of, names_of
from adapterkit.operations.convert import Conversion, ConvertOptions, Verify, plan_options, write_plan
from adapterkit.operations.sources import Opened
from adapterkit.plan import Options, Plan, make_plan
from adapterkit.proof import total_error
from adapterkit.ranks import RankRule
from adapterkit.reduction import Reduction, fitted
from adapterkit.scale import ScaleFrom
from adapterkit.selection import modules_of
from adapterkit.specs.families import Place, Target
from adapterkit.stores import Store
from adapterkit.stores.guards import shown
from adapterkit.stores.joined import JoinedStore
from adapterkit.strengths import at_strengths, parse_strengths, specs_of

Progress = Callable[[str, int, int], None]

# About how many modules are compared with what was asked for; of methods that form whole deltas fewer.
_SAMPLE, _DENSE_SAMPLE = 32, 6

AT_ZERO = "strength 0"
NOT_THE_FIRST = "another of the same name was kept"


@dataclass(frozen=True)
class MergeOptions:
    """How to merge; every field has a command-line option of its name.

    method: a key of `adapterkit.merging.METHODS`.
    blocks: strengths of parts, `SPEC` for every input or `N:SPEC` for the N-th; see
    `strengths.parse_strengths`.
    density, divide, inner, seed, strength: see `merging.Settings`.
    to: a format; None for that of the first input.  dtype: "fp32", "fp16" or "bf16" for the written
    factors; None for the widest of what is added.
    base: the base model, for DoRA and other changes that depend on it.
    family, scale_from, allow, verify, force: as for `convert`; allow also takes "magnitude", which
    leaves the magnitudes of DoRA out, and "passengers", which keeps the first of several of one name.
    """

    method: str = "linear"
    blocks: Sequence[str] = ()
    density: float = 0.5
    divide: Divide = "strengths"
    inner: Inner = "ties"
    seed: int = 0
    strength: float = 1.0
    to: str | None = None
    dtype: str | None = None
    base: Model | None = None
    family: str | None = None
    scale_from: ScaleFrom | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    verify: Verify = "sample"
    force: bool = False


@dataclass(frozen=True)
class Source:
    """One input as the result tells of it.

    layouts, modules, ranks, size: of the file it came from; size None in memory.
    """

    name: str
    strength: float
    layouts: tuple[str, ...]
    modules: int
    ranks: tuple[int, ...]
    size: int | None


@dataclass(frozen=True)
class Merging:
    """The outcome of `merge`.

    interference: how the inputs stand to each other.  reduction: the ranks that were chosen, None
    where none were to be.  damaged: modules that are not finite and were only added up, by consent.
    measured: √(Σ‖a − b‖² / Σ‖a‖²) of what was written against what was asked for, over `measured_on`
    modules, a sample or all; None where nothing was written or it was not wanted.
    """

    plan: Plan
    method: Method
    settings: Settings
    sources: tuple[Source, ...]
    interference: Interference
    reduction: Reduction | None
    damaged: tuple[str, ...] = ()
    conversion: Conversion | None = None
    measured: float | None = None
    measured_on: int = 0

    @property
    def receipt(self) -> Receipt:
        return self.plan.receipt

    @property
    def error(self) -> float:
        """The relative error of keeping the chosen ranks, all modules together; 0 where all were kept."""
        return self.reduction.error if self.reduction is not None else 0.0


def plan_merge(
    sources: Sequence[Given],
    strengths: Sequence[float] | None = None,
    rule: RankRule | None = None,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Merging:
    """What `merge` would write, with every error that it would raise before writing.

    Everything is computed but the file: `result.plan.state_dict()` is the merged adapter in memory.
    """
    return _plan(sources, strengths, rule or RankRule(), options or MergeOptions(), progress)[0]


def merge(
    sources: Sequence[Given],
    strengths: Sequence[float] | None = None,
    output: str | Path | None = None,
    rule: RankRule | None = None,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Merging:
    """Write several adapters of one base model as one; without `output`, only plan it.

    sources: paths, state dicts, stores, opened files or Adapters, in any formats and of any kinds.
    strengths: one for each, 1 by default.
    rule: which ranks to keep; without a target in it exact methods keep every rank, the others of each
    module the largest that it has in an input.
    Nothing is written unless everything can be; the output is read back and compared before it takes
    its name.
    Raises Mismatch for different base models or shapes, Unrepresentable for changes that cannot be
    merged, UsageError for options that make no sense, and what `load`, `make_plan` and the writer raise.
    """
    options = options or MergeOptions()
    planned, recipe = _plan(sources, strengths, rule or RankRule(), options, progress)
    if output is None:
        return planned
    if not options.force:
        _require_another(recipe.inputs, Path(output))
    writing = ConvertOptions(verify=options.verify, force=options.force, allow=options.allow)
    done = write_plan(planned.plan, Path(output), writing)
    if options.verify == "none":
        return replace(planned, conversion=done)
    measured, count = _measured(recipe, planned, options.verify == "full")
    return replace(planned, conversion=done, measured=measured, measured_on=count)


def _plan(
    sources: Sequence[Given],
    strengths: Sequence[float] | None,
    rule: RankRule,
    options: MergeOptions,
    progress: Progress | None,
) -> tuple[Merging, Recipe]:
    method, settings = _method(options)
    if not sources:
        raise UsageError("nothing to merge", hint="name at least one adapter")
    names = names_of(sources)
    weights = _weights(names, strengths)
    planning = plan_options(ConvertOptions(dtype=options.dtype, allow=options.allow))
    found = alike(sources, names, options.family)
    adapters = [loaded(one, allow=options.allow, scale_from=options.scale_from) for one in found]
    target = own_target(adapters[0]) if options.to is None else adapters[0].family.target(options.to)
    _require_mergeable(found, adapters, names, target)
    inputs = tuple(_inputs(adapters, names, weights, options.blocks, target))
    recipe = Recipe(
        inputs,
        method,
        settings,
        dtype=planning.dtype,
        allow=planning.allow,
        base=None if options.base is None else open_checkpoint(options.base, adapters[0].family.key),
    )
    recipe = _with_rule(recipe, rule)
    made = merged(recipe, progress)
    if not made.changes and all(part.full == 0 for part in made.parts.values()):
        raise Refused(
            "the adapters cancel each other: nothing is left",
            code="nothing-left",
            hint="look at their strengths; the same adapter may be there twice",
        )
    whole = _whole(adapters, inputs, made.changes, planning)
    facts = _facts(options, method, settings, names, weights)
    reduction = None
    if made.parts:
        plan, reduction = fitted(
            whole, made.parts, rule, target, planning, operation="merge", facts=facts, natives=whole.natives
        )
    else:
        plan = make_plan(derived(whole, made.changes, operation="merge", facts=facts), target, planning)
    told = tuple(_told(*one) for one in zip(adapters, names, weights, strict=True))
    return Merging(plan, method, settings, told, made.interference, reduction, made.damaged), recipe


def _method(options: MergeOptions) -> tuple[Method, Settings]:
    if options.method not in METHODS:
        raise UsageError(
            f"there is no method `{options.method}`",
            code="unknown-name",
            hint=f"methods: {', '.join(METHODS)}",
        )
    settings = Settings(options.density, options.divide, options.inner, options.seed, options.strength)
    return METHODS[options.method], settings


def _weights(names: Sequence[str], strengths: Sequence[float] | None) -> tuple[float, ...]:
    weights = tuple(1.0 for _ in names) if strengths is None else tuple(map(float, strengths))
    if len(weights) != len(names):
        raise UsageError(f"{len(names)} adapters and {len(weights)} strengths", hint="give one for each")
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise UsageError(
                f"`{name}`: a strength of {weight} is no number", code="strength-value", hint="give a number"
            )
    if not any(weights):
        raise UsageError("every adapter has strength 0: nothing would be left", hint="give one a strength")
    return weights


def _require_mergeable(
    found: Sequence[Found], adapters: Sequence[Adapter], names: Sequence[str], target: Target
) -> None:
    """Refuse what is ambiguous, and adapters of bases that their configuration changes."""
    for one in found:
        if isinstance(one, Opened):
            one.explanation.decided(one.store.label, target.name)
    for adapter, name in zip(adapters, names, strict=True):
        needed = next((c.needs_itself for c in adapter.tuners.values() if c.needs_itself), None)
        if needed is not None and len(adapters) > 1:
            raise Unrepresentable(
                f"`{name}` depends on `{needed}` of its configuration: its deltas are not those of the base",
                code="config-needed",
                hint="let PEFT convert it to a plain LoRA first",
                details={"field": needed, "input": name},
            )


def _inputs(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    weights: Sequence[float],
    blocks: Sequence[str],
    target: Target,
) -> Iterator[Input]:
    """The inputs on the lines of the target, kinds with a low-rank form as that where several meet."""
    every = specs_of(blocks, len(names))
    for adapter, name, weight, specs in zip(adapters, names, weights, every, strict=True):
        with located(f"`{name}`"):
            for text in specs:
                adapter = _weighed(adapter, text)
            yield Input(name, aligned(adapter, target, as_lora=len(names) > 1), weight)


def _weighed(adapter: Adapter, text: str) -> Adapter:
    modules = [m for place in adapter.changes for m in modules_of(place, adapter.natives.get(place, ""))]
    strengths = parse_strengths(text, adapter.family, modules)
    changes = at_strengths(adapter.changes, strengths, adapter.natives)
    return replace(adapter, changes=changes)


def _with_rule(recipe: Recipe, rule: RankRule) -> Recipe:
    """What the rule means for each module; without a target the largest ranks of the inputs, where the
    method would keep too many."""
    targets = (rule.rank, rule.energy, rule.error, rule.size)
    given = rule.auto or any(target is not None for target in targets)
    largest = not given and not recipe.method.exact
    return replace(
        recipe,
        truncates=given or rule.most is not None,
        most=rule.highest,
        largest=largest,
        settled=rule.rank is not None or largest,
        noise=rule.auto,
    )


def _whole(
    adapters: Sequence[Adapter],
    inputs: Sequence[Input],
    changes: Mapping[Place, tuple[Change, ...]],
    planning: Options,
) -> Adapter:
    """The first adapter with what travels with the others, these changes, and a receipt for all."""
    labels = [f"{one.name}: " if len(inputs) > 1 else "" for one in inputs]
    passengers, again, others = _passengers(adapters, labels, planning.allow)
    dropped = dict.fromkeys(others, NOT_THE_FIRST)
    idle: dict[str, str] = {}
    for adapter, one, label in zip(adapters, inputs, labels, strict=True):
        dropped |= {label + key: why for key, why in adapter.receipt.dropped.items()}
        idle |= {label + key: why for key, why in _without_effect(adapter, one, planning.allow)}
    read = [adapter.receipt for adapter in adapters]
    receipt = Receipt(
        total=sum(one.total for one in read),
        # Passengers that several bring are written once.
        mapped=sum(one.mapped for one in read) + again - len(idle),
        carried=len(passengers),
        dropped={**dropped, **idle},
    )
    return replace(
        inputs[0].adapter,
        changes=changes,
        receipt=receipt,
        natives=natives(inputs),
        keys={place: (_keys(inputs, labels, place),) for place in changes},
        passengers=passengers,
        store=_joined(adapters, [one.name for one in inputs]),
    )


def _keys(inputs: Sequence[Input], labels: Sequence[str], place: Place) -> dict[str, str]:
    """The tensors of all inputs that the changes of a place were made of."""
    return {
        f"{label}{index} {role}": label + key
        for one, label in zip(inputs, labels, strict=True)
        for index, roles in enumerate(one.adapter.keys.get(place, ()))
        for role, key in roles.items()
    }


def _without_effect(adapter: Adapter, one: Input, allow: Collection[str]) -> Iterator[tuple[str, str]]:
    """The tensors of an input that the result does not depend on, with why."""
    for place, several in adapter.keys.items():
        for roles in several:
            if one.strength == 0.0:
                yield from ((key, AT_ZERO) for key in roles.values())
            elif "magnitude" in roles and "magnitude" in allow and place in one.adapter.changes:
                yield roles["magnitude"], "magnitude"


def _passengers(
    adapters: Sequence[Adapter], labels: Sequence[str], allow: Collection[str]
) -> tuple[dict[str, Tensor], int, list[str]]:
    """The passengers of all, how many tensors are there once more, and the keys of those left out.

    Raises Refused for two different ones of one name, unless their loss is allowed.
    """
    kept: dict[str, Tensor] = {}
    again, others = 0, []
    for adapter, label in zip(adapters, labels, strict=True):
        for key, tensor in adapter.passengers.items():
            if key not in kept:
                kept[key] = tensor
            elif same(kept[key], tensor):
                again += 1
            else:
                others.append(label + key)
    if others and "passengers" not in allow:
        raise Refused(
            f"`{others[0]}` is another tensor than the first adapter of that name brings along",
            code="passengers",
            hint="--allow passengers keeps the first",
            details={"keys": list[Json](others)},
        )
    return kept, again, others


def _joined(adapters: Sequence[Adapter], names: Sequence[str]) -> Store | None:
    """The stores of all as one, by which a change of any of their files is noticed."""
    stores = {n: a.store for n, a in zip(names, adapters, strict=True) if a.store is not None}
    if len(adapters) == 1 or not stores:
        return adapters[0].store
    return JoinedStore(next(iter(stores.values())).path, stores)


def _facts(
    options: MergeOptions, method: Method, settings: Settings, names: Sequence[str], weights: Sequence[float]
) -> dict[str, Json]:
    """What the metadata says of it."""
    facts: dict[str, Json] = {
        "method": method.name,
        "inputs": [{"name": n, "strength": w} for n, w in zip(names, weights, strict=True)],
        **settings.facts(method.uses),
    }
    if options.blocks:
        facts["blocks"] = list[Json](options.blocks)
    if options.base is not None:
        facts["base"] = name_of(options.base)
    return facts


def _told(adapter: Adapter, name: str, weight: float) -> Source:
    ranks = sorted({change.rank for several in adapter.changes.values() for change in several if change.rank})
    size = adapter.store.size if adapter.store is not None else None
    return Source(name, weight, adapter.layouts, len(adapter), tuple(ranks), size)


def _require_another(inputs: Sequence[Input], output: Path) -> None:
    """StoreError if the output is one of the inputs, by whatever name."""
    for one in inputs:
        store = one.adapter.store
        try:
            same_file = store is not None and store.path is not None and output.samefile(store.path)
        except (OSError, ValueError):
            continue
        if same_file:
            raise StoreError(
                f"{shown(output)}: is one of the inputs",
                code="exists",
                hint="choose another name; --force writes the result in its place",
            )


def _measured(recipe: Recipe, done: Merging, everything: bool) -> tuple[float | None, int]:
    """How far what was written is from what the method asks for, over how many modules."""
    places = [place for place, changes in done.plan.expected.changes.items() if not _on_base(changes)]
    if done.reduction is not None:
        places += done.reduction.left_out
    most = _DENSE_SAMPLE if recipe.method.way == "numbers" else _SAMPLE
    step = 1 if everything else max(1, len(places) // most)
    chosen = places[::step]
    adapter, dtype = done.plan.adapter, done.plan.options.dtype
    wanted = {place: changes for place in chosen if (changes := wanted_at(recipe, place))}
    written = {
        place: tuple(_rounded(change, dtype) for change in adapter.changes[place])
        for place in chosen
        if place in adapter.changes
    }
    return total_error(replace(adapter, changes=wanted), replace(adapter, changes=written)), len(wanted)


def _on_base(changes: Sequence[Change]) -> bool:
    return any(change.needs_base for change in changes)


def _rounded(change: Change, dtype: torch.dtype | None) -> Change:
    """The change with its factors as they are written."""
    if dtype is None:
        return change
    return change._with(
        {name: t.to(dtype) for name, t in vars(change).items() if isinstance(t, torch.Tensor) and t.ndim > 1}
    )
