"""Two checkpoints side by side: which tensors of the output both have all rows of.

Headers suffice, so that all that can be told before comparing numbers is told before.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import Json, Mismatch, UsageError
from adapterkit.selection import Module, modules_of, select
from adapterkit.specs.families import Names, OpenNames, Place, Target
from adapterkit.specs.layouts import layouts
from adapterkit.specs.names import Row, Span
from adapterkit.specs.weights import weight_names
from adapterkit.stores.model_folder import CONFIG

Form = Literal["linear", "conv", "embedding", "head", "vector", "parameter", "experts"]

# Below this share of tensors that have one shape, two models of one family are of two sizes.
_ALIKE = 0.5
_REAL = ("F", "BF")


@dataclass(frozen=True)
class Line:
    """One tensor of the output, and what the checkpoints have of it.

    shape: that of the weight, (o, i[, h, w]); of its first rows, that both have, where they have
    different numbers of them.  tall: the rows of the base's.  new: rows that only the tuned one has.
    keys: the tuned checkpoint's tensors that it is made of.
    """

    place: Place
    native: str
    form: Form
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    tall: int = 0
    new: int = 0

    @property
    def name(self) -> str:
        """The canonical name, as reports say it."""
        modules = " + ".join(dict.fromkeys(piece.module for piece in self.place.span))
        return f"{self.place.component}.{modules}" + (".bias" if self.place.param == "bias" else "")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Pairing:
    """Lines to compare, and everything that is not compared.

    apart: the tuned checkpoint's tensors that make up no line -> why: "unknown" (no table has a name
    for them), "new" (the base has none), "nameless" (the output has no name), "shape", "integer",
    "tied" (the same numbers as an embedding), "not selected".
    lacking: the base's tensors that the tuned one has not, by key.
    notes: what a reader should know.
    """

    tuned: Checkpoint
    base: Checkpoint
    target: Target
    lines: tuple[Line, ...]
    apart: Mapping[str, str]
    lacking: tuple[str, ...]
    notes: tuple[str, ...]


def pair(
    tuned: Checkpoint,
    base: Checkpoint,
    target: Target,
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Pairing:
    """Match two checkpoints line by line.

    only, exclude: components, blocks or modules by name, with wildcards; see `adapterkit.selection`.
    Raises Mismatch if they are of different models, UsageError for a name that nothing has.
    """
    if tuned.family is not base.family:
        raise Mismatch(
            f"{tuned.store.label} is {tuned.family.label}, and {base.store.label} is {base.family.label}",
            code="base-family",
            hint="the base is the model that the tuned one was made from; "
            "--family says what both are, where it was taken for another",
            details={"tuned": tuned.family.key, "base": base.family.key},
        )
    tuned, base = _one_naming(tuned, base)
    pairing = _Pairing(tuned, base, target)
    for component in tuned.components:
        pairing.add(component)
    pairing.require_one_size()
    lines = _selected(pairing, only, exclude)
    return Pairing(
        tuned,
        base,
        target,
        tuple(lines),
        pairing.rest(),
        tuple(key for key in base.held if key not in pairing.met),
        tuple(_notes(pairing, lines)),
    )


@dataclass
class _Pairing:
    tuned: Checkpoint
    base: Checkpoint
    target: Target
    lines: list[Line] = field(default_factory=list)
    apart: dict[str, str] = field(default_factory=dict)
    met: set[str] = field(default_factory=set)
    misfits: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def add(self, component: str) -> None:
        prefix = self.target.prefixes.get(component)
        if prefix is None:
            return
        dot = layouts()[self.target.layout].dot
        for row, place in self._places(component, prefix.naming):
            self._add(place, prefix.text + row.native.replace(".", dot))

    def _places(self, component: str, naming: str) -> Iterator[tuple[Row, Place]]:
        """Every tensor that the output could have: of its naming, or without a table the tuned one's own."""
        names: Names = self.tuned.family.names(component, naming)
        if isinstance(names, OpenNames):
            for each in self.tuned.held.values():
                if each.component == component:
                    # What is kept transposed is compared as the layer has it.
                    span = names.covering(each.row.native)[0].span
                    yield Row(each.row.native, span, None), Place(component, span, each.param)
            return
        network = self.tuned.family.network(component)
        assert network is not None
        for row in network.namings[naming].rows:
            if row.param is not None:
                yield row, Place(component, row.span, row.param)
                continue
            for param in ("weight", "bias"):
                if f"{row.span[0].module}.{param}" in network.shapes:
                    yield row, Place(component, row.span, param)

    def _add(self, place: Place, native: str) -> None:
        at = (place.component, place.span, place.param)
        here, there = self.tuned.shape(*at), self.base.shape(*at)
        keys = self.tuned.keys(*at)
        self.met.update(self.base.keys(*at))
        if here is None:
            return
        if there is None:
            self.apart.update(dict.fromkeys(keys, "new"))
        elif not all(self.tuned.store.tensors[key].dtype.startswith(_REAL) for key in keys):
            self.apart.update(dict.fromkeys(keys, "integer"))
        elif _same(here, there):
            self.lines.append(Line(place, native, _form(place, here), here, keys, here[0]))
        elif _grown(place, here, there):
            shape = (min(here[0], there[0]), *here[1:])
            new = max(0, here[0] - there[0])
            self.lines.append(Line(place, native, _form(place, here), shape, keys, there[0], new))
        else:
            self.misfits.append((native, here, there))
            self.apart.update(dict.fromkeys(keys, "shape"))

    def require_one_size(self) -> None:
        """Mismatch where most tensors have other shapes than the base's, or nothing is shared at all."""
        count = len(self.misfits) + len(self.lines)
        if count and len(self.lines) >= _ALIKE * count:
            return
        if not count:
            raise Mismatch(
                f"{self.tuned.store.label} and {self.base.store.label} have no tensor in common",
                code="base-shapes",
                hint="give both as the same parts of one model, in any layout",
            )
        name, here, there = self.misfits[0]
        raise Mismatch(
            f"{len(self.misfits)} of {count} tensors have other shapes than the base's: "
            f"`{name}` is {list(here)}, the base's is {list(there)}",
            code="base-shapes",
            hint="the base is the model that the tuned one was made from",
            details={"tensor": name, "tuned": list[Json](here), "base": list[Json](there)},
        )

    def rest(self) -> dict[str, str]:
        """Why each of the tuned checkpoint's tensors that make up no line does not."""
        used = {key for line in self.lines for key in line.keys}
        found = {}
        for key in self.tuned.store.tensors:
            if key not in used:
                known = "nameless" if key in self.tuned.held else "unknown"
                found[key] = self.apart.get(key, known)
        return found


def _selected(pairing: _Pairing, only: Sequence[str], exclude: Sequence[str]) -> list[Line]:
    """The lines that are wanted; the others' tensors are noted as not selected."""
    family = pairing.tuned.family
    modules: list[Module] = [m for line in pairing.lines for m in modules_of(line.place, line.native)]
    wanted = [select(text, family, modules) for text in only]
    unwanted = [select(text, family, modules) for text in exclude]
    kept: list[Line] = []
    left: list[Line] = []
    for line in pairing.lines:
        mine = modules_of(line.place, line.native)
        inside = not wanted or any(selector.matches(module) for selector in wanted for module in mine)
        outside = any(selector.matches(module) for selector in unwanted for module in mine)
        (kept if inside and not outside else left).append(line)
    if not kept:
        raise UsageError(
            "nothing is selected: --exclude takes away all that --only names",
            code="no-match",
            hint="`extract --plan` shows what there is",
        )
    still = {key for line in kept for key in line.keys}
    pairing.apart.update({key: "not selected" for line in left for key in line.keys if key not in still})
    pairing.lines = kept
    return _without_tied(pairing)


def _without_tied(pairing: _Pairing) -> list[Line]:
    """The lines without heads that are their embeddings: one tensor is compared once."""
    tied = _is_tied(pairing.tuned)
    embedded = [line for line in pairing.lines if line.form == "embedding"]
    heads = [
        line
        for line in pairing.lines
        if line.form == "head" and (tied or any(_shares(pairing.tuned, line, one) for one in embedded))
    ]
    pairing.apart.update({key: "tied" for line in heads for key in line.keys})
    pairing.lines = [line for line in pairing.lines if line not in heads]
    if not pairing.lines:
        raise UsageError(
            f"nothing is selected but `{heads[0].name}`, which is tied to the embedding",
            code="no-match",
            hint="select the embedding: both are one tensor",
        )
    return pairing.lines


def _shares(model: Checkpoint, one: Line, two: Line) -> bool:
    """Whether two lines are one tensor in memory, as in a model's own state dict."""
    if one.shape != two.shape or model.store.path is not None:
        return False
    first, second = (model.store.tensor(line.keys[0]) for line in (one, two))
    return first.data_ptr() == second.data_ptr()


def _is_tied(model: Checkpoint) -> bool:
    """Whether the configuration says that the head is the embedding."""
    config = model.store.sidecars.get(CONFIG)
    if not isinstance(config, dict):
        return False
    text = config.get("text_config")
    return any(bool(c.get("tie_word_embeddings")) for c in (config, text) if isinstance(c, dict))


def _notes(pairing: _Pairing, lines: Sequence[Line]) -> Iterator[str]:
    yield from (f"{pairing.tuned.store.label}: {text}" for text in pairing.tuned.store.warnings)
    yield from (f"{pairing.base.store.label}: {text}" for text in pairing.base.store.warnings)
    for line in lines:
        if line.new:
            yield f"`{line.name}` has {line.new} rows more than the base's; an adapter cannot add rows"
        elif line.tall > line.shape[0]:
            yield f"`{line.name}` has {line.tall - line.shape[0]} rows fewer than the base's"
    embedded = [line for line in lines if line.form == "embedding"]
    if embedded and pairing.tuned.family.open and not any(line.form == "head" for line in lines):
        yield "the output layer is tied to the embedding, or is not there: one tensor, compared once"


def _same(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether two shapes are the same, a linear layer being a convolution of one element."""
    return here == there or (
        here[:2] == there[:2] and math.prod(here) == math.prod(there) and min(len(here), len(there)) == 2
    )


def _grown(place: Place, here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether only the number of tokens differs."""
    return len(here) == 2 and here[1:] == there[1:] and _form(place, here) in ("embedding", "head")


def _form(place: Place, shape: tuple[int, ...]) -> Form:
    names = weight_names()
    modules = {piece.module for piece in place.span}
    if place.param == "bias" or len(shape) < 2:
        return "vector"
    if place.param == "":
        return "experts" if len(shape) == 3 else "parameter"
    if any(map(names.is_embedding, modules)):
        return "embedding"
    if any(map(names.is_head, modules)):
        return "head"
    return "conv" if math.prod(shape[2:]) > 1 else "linear"


def _one_naming(tuned: Checkpoint, base: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both with the same names where no table says them: one may lack what stands before all of them.

    transformers saves a model without a head under shorter names. The longer ones are kept: those of
    the model that is run.
    """
    if not tuned.family.open:
        return tuned, base
    best = (_shared(tuned, base), tuned, base)
    if 2 * best[0] >= min(len(tuned.held), len(base.held)):
        return tuned, base
    for front in weight_names().fronts:
        longer = tuned.with_front(f"{front}."), base.with_front(f"{front}.")
        for one, two in ((longer[0], base), (tuned, longer[1])):
            if (count := _shared(one, two)) > best[0]:
                best = (count, one, two)
    return best[1], best[2]


def _shared(one: Checkpoint, two: Checkpoint) -> int:
    names: list[Counter[tuple[str, Span, str]]] = [
        Counter((each.component, each.row.span, each.param) for each in model.held.values())
        for model in (one, two)
    ]
    return (names[0] & names[1]).total()
