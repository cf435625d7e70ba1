"""What `convert` will do, and the receipt for what it did."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.errors import AdapterkitError, Json
from adapterkit.operations.convert import Conversion
from adapterkit.operations.inspect import ScaleCount
from adapterkit.plan import Plan
from adapterkit.reports.inspection import scale_words
from adapterkit.reports.moves import RENAMED, Move, moves
from adapterkit.reports.words import NARROW, Fact, counted, error_words, facts, heading, listed, size
from adapterkit.specs.layouts import layouts
from adapterkit.specs.tuner_config import METADATA_KEY
from adapterkit.stores.guards import shown

Outcome = Conversion | AdapterkitError


def plan_report(source: str, plan: Plan) -> RenderableType:
    """The mapping by pattern, the scale, the sizes and the losses; nothing has been written."""
    rows: list[Fact] = [
        ("from", source_words(plan)),
        ("to", f"{target_words(plan)}, {size(output_size(plan))} of tensors"),
        *_scale_facts(plan),
        ("tensors", receipt_words(plan)),
        *loss_facts(plan),
    ]
    notes = map(note, (*_odd_input(plan), *_kept_names(plan)))
    return Group(heading(source, "(a plan; nothing is written)"), facts(rows), *_moves(plan), *notes)


def _moves(plan: Plan) -> Iterator[RenderableType]:
    """The mapping, what happens to rows under a heading; plain renaming, which is most of it, last."""
    by_how: dict[str, list[Move]] = {}
    for move in sorted(moves(plan), key=lambda move: move.how == RENAMED):
        by_how.setdefault(move.how, []).append(move)
    for how, alike in by_how.items():
        total = sum(move.count * len(move.sources) for move in alike)
        yield Padding(Text(f"{how} ({counted(total, 'module')})", style="cyan"), (1, 0, 0, 2))
        rows = [(str(move.count), _names(move)) for move in alike]
        yield Padding(listed(rows, ("", ""), numbers=1), (0, 0, 0, 2))


def _names(move: Move) -> Text:
    text = Text("\n".join(move.sources))
    for target in move.targets:
        text.append("\n→ ", style="dim").append(target)
    return text


def conversion_report(source: str, done: Conversion) -> RenderableType:
    """The receipt of one conversion."""
    plan = done.plan
    rows: list[Fact] = [
        ("from", source_words(plan)),
        ("to", f"{target_words(plan)}, {written_size(done)}"),
        ("tensors", f"{receipt_words(plan)}; {_tensor_count(plan)} out"),
        *_scale_facts(plan),
        *loss_facts(plan),
        ("verified", verified_words(done)),
        *file_facts(done),
    ]
    return Group(heading(source), facts(rows), *map(note, notes_of(plan)))


def source_words(plan: Plan) -> str:
    spelled = " and ".join(layouts()[name].title for name in plan.adapter.layouts)
    modules = counted(len(plan.adapter), "module")
    return f"{spelled} for {plan.adapter.family.label}: {modules}, {_input_size(plan)}"


def target_words(plan: Plan) -> str:
    return f"{plan.target.name}: {counted(_module_count(plan), 'module')}"


def _module_count(plan: Plan) -> int:
    return len({(module.component, module.native) for module in plan.modules})


def _tensor_count(plan: Plan) -> int:
    return len(plan.header())


def _input_size(plan: Plan) -> str:
    store = plan.adapter.store
    return size(store.size) if store is not None else "in memory"


def output_size(plan: Plan) -> int:
    return sum(info.nbytes for info in plan.header())


def written_size(done: Conversion) -> str:
    return size(sum(written.size for written in done.written))


def receipt_words(plan: Plan) -> str:
    """The sum that must come out even."""
    receipt = plan.receipt
    parts = f"{receipt.mapped} mapped + {receipt.carried} carried + {len(receipt.dropped)} dropped"
    return f"{receipt.total} in = {parts}"


def _scales(plan: Plan) -> list[ScaleCount]:
    counts = Counter((scale.value, scale.source) for scale in plan.adapter.scales.values())
    return [ScaleCount(value, source, count) for (value, source), count in counts.most_common()]


def _scale_facts(plan: Plan) -> Iterator[Fact]:
    """Where the scale came from and where it goes."""
    if not (scales := _scales(plan)):
        return
    if _folds(plan):
        home = "put into the factors"
        if plan.rounded:
            home += f", rounding {len(plan.rounded)} of {counted(len(plan.modules), 'module')}"
    else:
        home = "kept beside each module" if plan.target.scale == "alpha" else f"kept in {plan.target.scale}"
    yield "scale", f"{scale_words(scales)} → {home}"


def _folds(plan: Plan) -> bool:
    return plan.options.fold or plan.target.scale == "none"


def loss_facts(plan: Plan) -> Iterator[Fact]:
    """What was left out, and why that is no loss or who consented to it."""
    if plan.idle:
        yield "left out", f"{counted(len(plan.idle), 'module')} that would change nothing: exactly zero"
    for reason, count in Counter(plan.receipt.dropped.values()).items():
        yield "lost", Text(f"{counted(count, 'tensor')}: {reason}", style="yellow")
    if plan.lost:
        names = list(dict.fromkeys(plan.adapter.natives[source.place] for source in plan.lost))
        text = ", ".join(shown(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
        yield "", Text(text, style="yellow")


def verified_words(done: Conversion) -> str:
    found = done.verification
    if found is None:
        return "no (--verify none)"
    modules = f"{found.compared} of {counted(found.modules, 'module')}"
    return f"{modules} read back, greatest relative error {error_words(found.error)}"


def file_facts(done: Conversion) -> Iterator[Fact]:
    """Every file, those with tensors with their hash."""
    hashes = iter(done.written)
    for path in done.files:
        yield "written", shown(path)
        if path.suffix != ".json":
            yield "sha256", next(hashes).sha256


def note(text: str) -> RenderableType:
    return Padding(Text.assemble(("note: ", "yellow"), shown(text)), (0, 0, 0, 2))


def notes_of(plan: Plan) -> Iterator[str]:
    """What is odd about the input, and what may go wrong in a program that reads the output."""
    yield from _odd_input(plan)
    yield from _kept_names(plan)
    yield from _unseen_scale(plan)


def _odd_input(plan: Plan) -> Iterator[str]:
    yield from plan.adapter.store.warnings if plan.adapter.store is not None else ()


def _kept_names(plan: Plan) -> Iterator[str]:
    """Programs have names of their own for modules; without a table one cannot become the other."""
    if plan.adapter.family.open and plan.target.layout not in plan.adapter.layouts:
        yield (
            "no table of this model is known, so the names of its modules stay as they are; "
            "a program that has other names for them will not find them"
        )


def _unseen_scale(plan: Plan) -> Iterator[str]:
    """Readers that pass over the place where the scale is kept see another strength."""
    plain = all(scale.value == 1 for scale in plan.adapter.scales.values())
    if plan.target.scale == METADATA_KEY and not _folds(plan) and not plain:
        other = f"readers that ignore {plan.target.scale} see another strength"
        yield f"{other}; --fold puts the scale into the factors"


def result_of(done: Conversion) -> Path:
    """The one file, or the folder of several."""
    return done.files[0] if len(done.files) == 1 else Path(os.path.commonpath(done.files))


def conversion_line(done: Conversion) -> Text:
    """Where the result is, and nothing else."""
    return Text(shown(result_of(done)))


def outcomes_report(outcomes: Sequence[tuple[str, Outcome]], width: int) -> RenderableType:
    """A line for each of many inputs, and how many went well."""
    rows = [_outcome(source, outcome) for source, outcome in outcomes]
    table: RenderableType
    if width >= NARROW:
        table = listed(rows, ("size", "error", "adapter"), numbers=1)
    else:
        table = facts((error, Text.assemble(name, f" {amount}")) for amount, error, name in rows)
    done = [outcome for _, outcome in outcomes if isinstance(outcome, Conversion)]
    notes = dict.fromkeys(text for one in done for text in notes_of(one.plan))
    total = Text(f"{len(done)} of {counted(len(outcomes), 'adapter')} converted", style="bold")
    return Group(Padding(table, (0, 0, 0, 2)), total, *map(note, notes))


def _outcome(source: str, outcome: Outcome) -> tuple[str, str, Text]:
    """Size, greatest relative error or the code of what went wrong, and names."""
    if isinstance(outcome, AdapterkitError):
        return "failed", outcome.code, Text(shown(source), style="red")
    worst = outcome.verification
    text = Text(f"{shown(source)} → {shown(result_of(outcome))}")
    if dropped := outcome.receipt.dropped:
        text.append(f", {counted(len(dropped), 'tensor')} dropped", style="yellow")
    amount = size(sum(written.size for written in outcome.written))
    return amount, error_words(worst.error) if worst else "unverified", text


def plan_json(source: str, plan: Plan) -> dict[str, Json]:
    """A plan's facts, every module by name."""
    content = {
        "source": source,
        "from": list(plan.adapter.layouts),
        "family": plan.adapter.family.name,
        "to": plan.target.name,
        "modules": {"in": len(plan.adapter), "out": _module_count(plan)},
        "tensors": {**asdict(plan.receipt), "out": _tensor_count(plan)},
        "scales": [asdict(scale) for scale in _scales(plan)],
        "scale_home": "factors" if _folds(plan) else plan.target.scale,
        "rounded": list(plan.rounded),
        "idle": list(plan.idle),
        "lost": {plan.adapter.natives[source.place]: reason for source, reason in plan.lost.items()},
        "moves": [asdict(move) for move in moves(plan)],
        "warnings": list(_odd_input(plan)),
        "bytes": {"in": plan.adapter.store.size if plan.adapter.store else None, "out": output_size(plan)},
    }
    return cast(dict[str, Json], content)


def conversion_json(source: str, done: Conversion) -> dict[str, Json]:
    """The plan's facts and the receipt."""
    found = done.verification
    verification = {**asdict(found), "error": found.error} if found else None
    written = {
        "files": [str(path) for path in done.files],
        "written": [asdict(one) for one in done.written],
        "verification": verification,
    }
    return {**plan_json(source, done.plan), **cast(dict[str, Json], written)}
