"""What `bake` will do, what it did, and how much of the changes is left in the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.baking.plan import ABSENT, APPLIED, AT_ZERO, OVERRULED, BakePlan
from adapterkit.baking.survival import Kept
from adapterkit.errors import Json
from adapterkit.operations.bake_files import Baking
from adapterkit.operations.unbake import Restoring, error_of
from adapterkit.reports.conversion import note
from adapterkit.reports.words import Fact, counted, error_words, facts, heading, listed, size, tally
from adapterkit.specs.kinds import KINDS
from adapterkit.stores.guards import shown

_WHY = {
    ABSENT: "of weights that the base does not have",
    AT_ZERO: "at strength 0",
    OVERRULED: "replaced by another adapter",
}
_FEW = 8
_NOTHING = 1e-6
# What is said to be kept whole.
_WHOLE = 0.9995


def bake_plan_report(base: str, plan: BakePlan) -> RenderableType:
    """What would be done to which tensors; nothing has been written."""
    rows = [
        *_common(plan),
        ("output", f"{size(plan.size)} of tensors, {_dtypes(plan)}"),
        ("memory", f"about {size(plan.memory)}"),
    ]
    title = heading(base, "(a plan; nothing is written)")
    return Group(title, facts(rows), _table(plan), *map(note, plan.notes))


def baking_report(base: str, done: Baking, *, verbose: bool = False) -> RenderableType:
    """The receipt of one bake; verbose: what is left of each tensor's change, the least first."""
    rows: list[Fact] = [*_common(done.plan), ("kept", _kept(done)), *_files(done)]
    parts: list[RenderableType] = [heading(base), facts(rows), _table(done.plan)]
    if verbose:
        parts.append(_survival(done))
    return Group(*parts, *map(note, (*done.notes, *done.plan.notes, *_advice(done))))


def baking_line(done: Baking | Restoring, output: str) -> Text:
    return Text(shown(output))


def subtracting_report(base: str, done: Baking) -> RenderableType:
    """The receipt of a subtraction, with the error that remains."""
    error = error_of(done)
    about = f"at most about {error_words(error)}" if error > _NOTHING else f"less than {_NOTHING:g}"
    text = f"{about} of the changes: they were rounded twice"
    rows: list[Fact] = [*_common(done.plan), ("error", text), *_files(done)]
    return Group(heading(base, "(adapters subtracted)"), facts(rows))


def restoring_report(baked: str, output: str, done: Restoring) -> RenderableType:
    """What came back, byte for byte."""
    rows: list[Fact] = [("undo", shown(done.undo)), ("restored", "byte for byte, held against their hashes")]
    for name, written in done.files.items():
        rows += [("written", shown(_in(output, name, done))), ("sha256", written.sha256)]
    return Group(heading(baked, "(the base restored)"), facts(rows))


def bake_plan_json(base: str, plan: BakePlan) -> dict[str, Json]:
    """Every change with what becomes of it, and every tensor that will be another."""
    content = {
        "base": base,
        "family": plan.base.family.key,
        "adapters": [{"name": one.name, "strength": one.strength} for one in plan.ingredients],
        "changes": [asdict(fate) for fate in plan.fates],
        "outcomes": dict(plan.outcomes),
        "tensors": {"total": plan.changed + plan.untouched, "changed": plan.changed, "new": list_new(plan)},
        "changed": [
            {
                "name": key,
                "dtype": each.after.dtype,
                "shape": list(each.after.shape),
                "shares": len(each.shares),
            }
            for key, each in plan.tensors.items()
        ],
        "size": plan.size,
        "memory": plan.memory,
        "configuration": {front: dict(fields) for front, fields in plan.edits.items()},
        "notes": list(plan.notes),
    }
    return cast(dict[str, Json], content)


def list_new(plan: BakePlan) -> list[str]:
    return [each.key for each in plan.new.values()]


def baking_json(base: str, done: Baking) -> dict[str, Json]:
    """The plan, the files with their hashes, and what is left of each tensor's change."""
    content = {
        **bake_plan_json(base, done.plan),
        "files": [
            {"path": str(path), "sha256": written.sha256 or None, "size": written.size}
            for path, written in zip(done.files, done.written, strict=True)
        ],
        "undo": str(done.undo) if done.undo else None,
        "resumed": list(done.resumed),
        "kept": {**asdict(done.total), "tensors": {key: asdict(one) for key, one in done.kept.items()}},
        "would_keep": done.would_keep or None,
        "notes": [*done.notes, *done.plan.notes],
    }
    return cast(dict[str, Json], content)


def restoring_json(baked: str, output: str, done: Restoring) -> dict[str, Json]:
    files = [
        {"path": _in(output, name, done), "sha256": written.sha256, "size": written.size}
        for name, written in done.files.items()
    ]
    return cast(dict[str, Json], {"baked": baked, "undo": str(done.undo), "files": files})


def _in(output: str, name: str, done: Restoring) -> str:
    return str(Path(output) / name) if Path(output).is_dir() else output


def _common(plan: BakePlan) -> list[Fact]:
    rows: list[Fact] = [("base", f"{plan.base.family.label}: {', '.join(plan.base.components)}")]
    for one in plan.ingredients:
        kinds = Counter(
            KINDS[fate.kind.removeprefix("dora ")].title + (" with DoRA" if " " in fate.kind else "")
            for fate in plan.fates
            if fate.adapter == one.name
        )
        rows.append(("adapter", f"{one.name} × {one.strength:g}: {tally(kinds)}"))
    rows += [("changes", _changes(plan)), ("tensors", _tensors(plan))]
    return rows


def _changes(plan: BakePlan) -> str:
    outcomes = plan.outcomes
    parts = [f"{outcomes[APPLIED]} applied"]
    parts += [f"{outcomes[what]} {why}" for what, why in _WHY.items() if outcomes[what]]
    return f"{outcomes.total()} = {' + '.join(parts)}"


def _tensors(plan: BakePlan) -> str:
    total = plan.changed + plan.untouched
    new = f"; {counted(len(plan.new), 'new one')}" if plan.new else ""
    return f"{total} = {plan.changed} changed + {plan.untouched} untouched{new}"


def _dtypes(plan: BakePlan) -> str:
    return tally(Counter(info.dtype.lower() for info in plan.header.values()))


def _kept(done: Baking) -> str | Text:
    total = done.total
    text = f"{_share(total)} of the changes after rounding"
    if done.kept and total.ratio < _WHOLE:
        worst = min(done.kept, key=lambda key: done.kept[key].ratio)
        text += f", least of `{worst}`: {_share(done.kept[worst])}"
    return text


def _share(kept: Kept) -> str:
    return f"{kept.ratio:.1%}" if kept.ratio < _WHOLE else "100%"


def _files(done: Baking) -> Iterator[Fact]:
    for path, written in list(zip(done.files, done.written, strict=True))[:_FEW]:
        yield "written", f"{shown(path)}, {size(written.size)}"
        if written.sha256:
            yield "sha256", written.sha256
    if len(done.files) > _FEW:
        yield "written", f"{len(done.files) - _FEW} files more (--json names them)"
    if done.resumed:
        yield "resumed", f"{counted(len(done.resumed), 'file')} had been finished before"
    if done.undo is not None:
        yield "undo", f"{shown(done.undo)}, {size(done.undo.stat().st_size)}"


def _table(plan: BakePlan) -> RenderableType:
    """Changed tensors by component and dtype."""
    rows = Counter(
        (plan.base.held[each.source].component, each.before.dtype.lower(), each.after.dtype.lower())
        for each in plan.tensors.values()
    )
    lines = [
        (str(count), before if before == after else f"{before} → {after}", component)
        for (component, before, after), count in rows.items()
    ]
    return Padding(listed(lines, ("tensors", "dtype", "component"), numbers=1), (1, 0, 0, 2))


def _survival(done: Baking) -> RenderableType:
    ordered = sorted(done.kept.items(), key=lambda item: item[1].ratio)
    rows = [(_share(kept), f"{kept.cosine:.4f}", f"{kept.norm:.3g}", key) for key, kept in ordered]
    return Padding(listed(rows, ("kept", "cosine", "norm", "tensor"), numbers=3), (1, 0, 0, 2))


def _advice(done: Baking) -> Iterator[str]:
    if done.would_keep:
        yield f"--dtype {done.would_keep} would keep the changes"
