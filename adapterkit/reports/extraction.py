"""What `extract` would compare, what it took out of the difference, and what it left there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.blocks import block_of
from adapterkit.errors import Json
from adapterkit.operations.extract import Extraction, ExtractOptions, Outcome
from adapterkit.pairing import Line, Pairing
from adapterkit.reports.conversion import file_facts, note, verified_words, written_size
from adapterkit.reports.words import Fact, counted, error_words, facts, heading, listed, percent
from adapterkit.stores.guards import shown

# One, several.
_FORMS = {
    "linear": ("linear layer", "linear layers"),
    "conv": ("convolution", "convolutions"),
    "embedding": ("embedding", "embeddings"),
    "head": ("output layer", "output layers"),
    "vector": ("norm or bias", "norms and biases"),
    "parameter": ("bare parameter", "bare parameters"),
    "experts": ("stack of experts", "stacks of experts"),
}
_REMEDY = {
    "embedding": "--embeddings takes them",
    "head": "--embeddings takes them",
    "vector": "--full-small keeps them",
    "parameter": "--full-small keeps them",
    "rank": "a higher rank keeps more",
    "noise": "--rank or --energy keeps more",
}
_WHY = {
    "rank": "cut off by the ranks",
    "noise": "no more than noise",
    "nonfinite": "not finite",
    "untranslatable": "without a form in the format",
    "unknown": "unknown to the tables",
    "new": "not in the base",
    "nameless": "without a name in the format",
    "shape": "of another shape than the base's",
    "integer": "not real numbers",
    "tied": "tied to the embedding",
}


def pairing_report(tuned: str, pairing: Pairing, options: ExtractOptions) -> RenderableType:
    """What both models have, component by component, and what is not compared; numbers are not read."""
    rows: list[Fact] = [
        ("models", _models(pairing)),
        ("to", pairing.target.name),
        *((name, _lines(lines)) for name, lines in _by_component(pairing.lines).items()),
        *_apart_facts(pairing.apart),
    ]
    measured = _only_measured(pairing.lines, options)
    if measured:
        rows.append(("measured", measured))
    notes = map(note, _notes(pairing))
    return Group(heading(tuned, "(a plan; nothing is read but headers)"), facts(rows), *notes)


def _only_measured(lines: Sequence[Line], options: ExtractOptions) -> str:
    """The forms that are compared, but not extracted with these options."""
    taken = ["linear", "conv"]
    taken += ["vector", "parameter"] if options.full_small else []
    taken += ["embedding", "head"] if options.embeddings else []
    left = [form for form in dict.fromkeys(line.form for line in lines) if form not in taken]
    return "; ".join(_FORMS[form][1] + (f" ({_REMEDY[form]})" if form in _REMEDY else "") for form in left)


def _models(pairing: Pairing) -> str:
    both = [name for name in pairing.tuned.components if name in pairing.base.components]
    return f"{pairing.tuned.family.label}: {', '.join(both)}"


def _by_component(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.place.component, []).append(line)
    return found


def _lines(lines: Sequence[Line]) -> str:
    counts = Counter(line.form for line in lines)
    return ", ".join(counted(count, *_FORMS[form]) for form, count in counts.most_common())


def _apart_facts(apart: Mapping[str, str]) -> Iterator[Fact]:
    for why, count in Counter(apart.values()).most_common():
        yield "not compared", f"{counted(count, 'tensor')} {_WHY.get(why, why)}"


def _notes(pairing: Pairing) -> Iterator[str]:
    yield from pairing.notes
    if pairing.lacking:
        yield f"{counted(len(pairing.lacking), 'tensor')} of the base are not in the tuned model"


def extraction_report(tuned: str, done: Extraction, *, residual: bool = False) -> RenderableType:
    """What was extracted, with which ranks and which share of the difference; residual: module by module."""
    rows: list[Fact] = [
        ("models", _models(done.pairing)),
        ("to", _target(done)),
        ("kept", _kept(done)),
        *_left_facts(done),
        ("tensors", _sum(done)),
    ]
    if done.conversion is not None:
        rows += [("verified", verified_words(done.conversion)), *file_facts(done.conversion)]
    parts: list[RenderableType] = [heading(tuned), facts(rows), _blocks(done)]
    if residual:
        parts.append(_residual(done))
    return Group(*parts, *map(note, (*_warnings(done), *_notes(done.pairing))))


def _target(done: Extraction) -> str:
    extracted = [outcome.rank for outcome in done.outcomes if outcome.what == "extracted"]
    text = f"{done.plan.target.name}: {counted(len(extracted), 'module')}"
    if extracted:
        text += f", rank {_spread(extracted)}"
    whole = sum(outcome.what == "whole" for outcome in done.outcomes)
    text += f", {counted(whole, 'tensor')} whole" if whole else ""
    return text + (f", {written_size(done.conversion)}" if done.conversion is not None else "")


def _spread(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{median(ranks):g} ({low}–{high})"


def _kept(done: Extraction) -> str:
    error = math.sqrt(max(0.0, 1.0 - done.kept))
    text = f"{percent(done.kept, 1.0)} of the difference's energy, relative error {error_words(error)}"
    if (proof := done.proof) is not None:
        text += (
            f"; on {counted(proof.modules, 'module')} read back {error_words(proof.measured)}, "
            f"predicted {error_words(proof.predicted)}"
        )
    return text


def _left_facts(done: Extraction) -> Iterator[Fact]:
    """What is left out, the largest share first."""
    for why, energy in sorted(done.left.items(), key=lambda item: -item[1]):
        what = _WHY.get(why) or f"in {_FORMS[why][1]}"
        remedy = f"; {_REMEDY[why]}" if why in _REMEDY else ""
        yield "left out", Text(f"{percent(energy, done.energy)} {what}{remedy}", style="yellow")


def _sum(done: Extraction) -> str:
    """The sum that must come out even."""
    counts = Counter(done.tensors.values())
    parts = [f"{count} {_outcome_words(what)}" for what, count in counts.most_common()]
    return f"{len(done.tensors)} = {' + '.join(parts)}"


def _outcome_words(what: str) -> str:
    if what in _FORMS:
        return f"{_FORMS[what][1]} left out"
    return _WHY.get(what, what)


def _blocks(done: Extraction) -> RenderableType:
    """Block by block: how much it changed, and how much of that is kept."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in done.outcomes:
        if outcome.energy == 0 and outcome.what != "extracted":
            continue
        component = outcome.line.place.component
        block = block_of(done.pairing.tuned.family, component, outcome.line.place.span[0].module)
        name = component if block == component else f"{component} {block}"
        groups.setdefault(name, []).append(outcome)
    rows = [_block_row(name, outcomes, done.energy) for name, outcomes in groups.items()]
    return Padding(listed(rows, ("modules", "rank", "share", "error", "block"), numbers=4), (1, 0, 0, 2))


def _block_row(name: str, outcomes: Sequence[Outcome], total: float) -> tuple[str, ...]:
    ranks = [outcome.rank for outcome in outcomes if outcome.what == "extracted"]
    finite = [outcome for outcome in outcomes if math.isfinite(outcome.energy)]
    energy = math.fsum(outcome.energy for outcome in finite)
    left = math.fsum(outcome.left for outcome in finite)
    error = error_words(math.sqrt(min(1.0, left / energy))) if energy else "–"
    share = percent(energy, total) if total else "–"
    return str(len(ranks)), _spread(ranks) if ranks else "–", share, error, name


def _residual(done: Extraction) -> RenderableType:
    """Every tensor that is not in the adapter as it is, the largest loss first."""
    left = [outcome for outcome in done.outcomes if outcome.left]
    left.sort(key=lambda outcome: -outcome.left if math.isfinite(outcome.left) else -math.inf)
    rows = [
        (
            percent(outcome.left, done.energy) if math.isfinite(outcome.left) else "–",
            error_words(outcome.error),
            error_words(outcome.change),
            str(outcome.rank) if outcome.rank else _FORMS.get(outcome.what, (outcome.what,))[0],
            shown(outcome.line.name),
        )
        for outcome in left
    ]
    return Padding(listed(rows, ("left", "error", "change", "rank", "module"), numbers=4), (1, 0, 0, 2))


def _warnings(done: Extraction) -> Iterator[str]:
    if done.suspicious:
        yield "most matrices differ by more than half of their size: is this the base it was made from?"
    wanted = done.rule.error if done.rule.error is not None else math.sqrt(1 - (done.rule.energy or 0.0))
    if wanted < 1 and done.reduction.error > wanted * (1 + 1e-6) + 1e-6:
        yield (
            f"what was asked for takes ranks above {done.rule.highest}, the error is "
            f"{error_words(done.reduction.error)}; --max-rank permits them"
        )


def pairing_json(tuned: str, base: str, pairing: Pairing) -> dict[str, Json]:
    """Every line, and why each other tensor is not compared."""
    content = {
        "tuned": tuned,
        "base": base,
        "family": pairing.tuned.family.key,
        "to": pairing.target.name,
        "lines": [_line_json(line) for line in pairing.lines],
        "not_compared": dict(pairing.apart),
        "lacking": list(pairing.lacking),
        "notes": list(pairing.notes),
        "elements": sum(line.elements for line in pairing.lines),
    }
    return cast(dict[str, Json], content)


def _line_json(line: Line) -> dict[str, Json]:
    facts = {
        "module": line.name,
        "native": line.native,
        "form": line.form,
        "shape": list(line.shape),
        "new_rows": line.new,
    }
    return cast(dict[str, Json], facts)


def extraction_json(tuned: str, base: str, done: Extraction) -> dict[str, Json]:
    """Everything: each line with its rank and what is left of it, each tensor with what became of it."""
    conversion = done.conversion
    content = {
        "tuned": tuned,
        "base": base,
        "family": done.pairing.tuned.family.key,
        "to": done.plan.target.name,
        "rule": done.rule.facts,
        "kept": done.kept,
        "energy": done.energy,
        "left": dict(done.left),
        "modules": [
            {
                **_line_json(outcome.line),
                "outcome": outcome.what,
                "rank": outcome.rank,
                "change": outcome.change,
                "energy": outcome.energy,
                "left": outcome.left,
                "error": outcome.error,
            }
            for outcome in done.outcomes
        ],
        "tensors": dict(Counter(done.tensors.values())),
        "not_compared": dict(done.pairing.apart),
        "lacking": list(done.pairing.lacking),
        "notes": [*_warnings(done), *done.pairing.notes],
        "proof": asdict(done.proof) if done.proof else None,
        "files": [str(path) for path in conversion.files] if conversion else [],
        "written": [asdict(one) for one in conversion.written] if conversion else [],
    }
    return cast(dict[str, Json], content)
