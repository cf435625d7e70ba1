"""What `merge` made of several adapters, and how these stand to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding

from adapterkit.errors import Json
from adapterkit.merging import Interference
from adapterkit.operations.merge import AT_ZERO, Merging, Source
from adapterkit.reports.conversion import (
    conversion_json,
    file_facts,
    loss_facts,
    note,
    notes_of,
    output_size,
    plan_json,
    receipt_words,
    target_words,
    verified_words,
    written_size,
)
from adapterkit.reports.words import Fact, counted, error_words, facts, heading, listed, percent, size
from adapterkit.specs.layouts import layouts
from adapterkit.stores.guards import shown

# From here on two inputs are called nearly the same.
ALIKE = 0.9
# Below this share of what the inputs are by themselves, their sum is said to cancel.
CANCELLED = 0.2
# Blocks that are shown unless all are wanted.
_MOST = 6
# Adapters that were trained apart have cosines of a few hundredths.
_NOTABLE = 0.05


def merging_report(done: Merging, *, every: bool = False) -> RenderableType:
    """The inputs, how they meet, the ranks and what they leave out, and the receipt; every: all blocks."""
    planned = done.conversion is None
    title = heading("merge", "(a plan; nothing is written)") if planned else heading("merge")
    parts: list[RenderableType] = [title, facts(_facts(done)), _inputs(done)]
    if len(done.sources) > 1:
        parts.append(_meetings(done.interference, every))
    return Group(*parts, *map(note, (*merging_notes(done), *notes_of(done.plan))))


def merging_json(done: Merging) -> dict[str, Json]:
    """All of it: inputs, angles, ranks and errors by module, and the facts of the file."""
    name = done.sources[0].name
    file = plan_json(name, done.plan) if done.conversion is None else conversion_json(name, done.conversion)
    content = {
        "method": done.method.name,
        "settings": asdict(done.settings),
        "inputs": [asdict(source) for source in done.sources],
        "interference": done.interference.as_json(),
        "error": {"ranks": done.error, "measured": done.measured, "modules": done.measured_on},
        "modules": _modules(done),
        "damaged": list(done.damaged),
        "notes": list(merging_notes(done)),
        "result": file,
    }
    return cast(dict[str, Json], content)


def _modules(done: Merging) -> list[dict[str, Json]]:
    """Rank and error of every module whose rank was chosen."""
    if done.reduction is None:
        return []
    errors, natives = done.reduction.errors, done.plan.adapter.natives
    return [
        {
            "component": place.component,
            "module": natives.get(place, place.span[0].module),
            "rank": rank,
            "error": errors[place],
        }
        for place, rank in done.reduction.ranks.items()
    ]


def _facts(done: Merging) -> Iterator[Fact]:
    plan = done.plan
    amount = written_size(done.conversion) if done.conversion else f"{size(output_size(plan))} of tensors"
    yield "method", _method(done)
    yield "to", f"{target_words(plan)}, {amount}"
    yield "ranks", _ranks(done)
    yield "dtype", ", ".join(sorted({info.dtype.lower() for info in plan.header() if len(info.shape) > 1}))
    yield "tensors", receipt_words(plan)
    yield from loss_facts(plan)
    if done.measured is not None:
        modules = counted(done.measured_on, "module")
        yield "error", f"{error_words(done.measured)}, ranks and rounding together, measured on {modules}"
    if done.conversion is not None:
        yield "verified", verified_words(done.conversion)
        yield from file_facts(done.conversion)


def _method(done: Merging) -> str:
    method, settings = done.method, done.settings
    said = [f"{name} {getattr(settings, name)}" for name in method.uses]
    if settings.strength != 1.0:
        said.append(f"strength of the whole {settings.strength:g}")
    source = f" ({method.source})" if method.source else ""
    return ", ".join([f"{method.name}: {method.title}{source}", *said])


def _ranks(done: Merging) -> str:
    ranks = [module.scale.rank for module in done.plan.modules if module.scale and module.scale.rank]
    text = _spread(ranks) if ranks else "none"
    if done.reduction is None:
        return f"{text}, side by side: every rank of every input"
    error = done.error
    if not error:
        return f"{text}: nothing is left out"
    return f"{text}: {percent(done.reduction.energy, 1.0)} of the energy, relative error {error_words(error)}"


def _spread(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{median(ranks):g} ({low}–{high})"


def _inputs(done: Merging) -> RenderableType:
    norms = done.interference.norms()
    rows = [
        (f"{source.strength:g}", f"{norm:.3g}", _amount(source), _source(source))
        for source, norm in zip(done.sources, norms, strict=True)
    ]
    return Padding(listed(rows, ("strength", "norm", "size", "input"), numbers=3), (1, 0, 0, 2))


def _amount(source: Source) -> str:
    return size(source.size) if source.size is not None else "in memory"


def _source(source: Source) -> str:
    spelled = " and ".join(layouts()[name].title for name in source.layouts)
    ranks = f", rank {_spread(source.ranks)}" if source.ranks else ""
    return f"{shown(source.name)}: {spelled}, {counted(source.modules, 'module')}{ranks}"


def _meetings(found: Interference, every: bool) -> RenderableType:
    """The cosine of each pair, over all and in the blocks where it is greatest."""
    rows: list[tuple[str, str, str]] = []
    for first, second in found.pairs():
        names = f"{shown(found.names[first])} and {shown(found.names[second])}"
        rows.append((_number(found.cosine(first, second)), "all", names))
        cosines = {block: found.cosine(first, second, block) for block in found.blocks}
        known = [(block, cosine) for block, cosine in cosines.items() if cosine is not None]
        if not every:
            known = sorted(known, key=lambda one: -abs(one[1]))[:_MOST]
            known = [(block, cosine) for block, cosine in known if abs(cosine) >= _NOTABLE]
        if len(cosines) > 1:
            rows += [(_number(cosine), block, "") for block, cosine in known]
    return Padding(listed(rows, ("cosine", "block", "inputs"), numbers=1), (1, 0, 0, 2))


def _number(cosine: float | None) -> str:
    # Without the sign that rounding leaves of nothing.
    return "–" if cosine is None else f"{round(cosine, 3) + 0.0:+.3f}"


def merging_notes(done: Merging) -> Iterator[str]:
    """What a user should look at before using the result."""
    found = done.interference
    for first, second in found.pairs():
        cosine = found.cosine(first, second)
        if cosine is None or abs(cosine) < ALIKE:
            continue
        pair = f"{found.names[first]} and {found.names[second]}"
        strengths = done.sources[first].strength * done.sources[second].strength
        if strengths * cosine < 0:
            yield f"{pair} nearly cancel each other (cosine {cosine:.2f}, strengths of {_signs(strengths)})"
        elif strengths:
            yield f"{pair} are nearly the same change (cosine {cosine:.2f}): their strengths add up"
    kept = found.kept()
    if kept is not None and kept < CANCELLED and len(done.sources) > 1:
        yield f"the inputs cancel: their sum has {percent(kept, 1.0)} of the energy that they have apart"
    if done.reduction is not None and done.reduction.left_out:
        count = counted(len(done.reduction.left_out), "module")
        yield f"{count} left out: nothing of the change is left there, or nothing that was to be kept"
    if done.damaged:
        names = ", ".join(f"`{name}`" for name in done.damaged[:3])
        yield f"{counted(len(done.damaged), 'module')} not finite, added up as they are: {names}"
    if AT_ZERO in done.receipt.dropped.values():
        yield "an adapter of strength 0 adds nothing"


def _signs(strengths: float) -> str:
    return "one sign" if strengths > 0 else "opposite signs"
