"""To another format and back again: the same file, bit for bit, wherever the form allows.

A → B → A gives A's keys and tensors for every family, every ordered pair of its formats and every way of
storing a change that both can write. What becomes of a form when B cuts, stacks or swaps the rows that A
keeps in one tensor is stated in THROUGH.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations

import pytest
import torch
from adapters import (
    FORMS,
    File,
    Module,
    Weight,
    build,
    can,
    converted,
    has_bias,
    patterns,
    small_models,
    weight_of,
)

from adapterkit.compare import differences
from adapterkit.errors import Unrepresentable
from adapterkit.plan import Options
from adapterkit.specs.families import Family, Target, families, family
from adapterkit.specs.names import Row


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with small_models():
        yield


BITS, REFUSED = "bits", "refused"

# What becomes of each form where B keeps A's rows apart, where it keeps them together, and where it has
# the same rows in another order: A's bits again, or a refusal on the way.
THROUGH: dict[str, dict[str, str]] = {
    name: dict(zip(("cut", "stacked", "swapped"), outcome, strict=True))
    for name, outcome in {
        "lora": (BITS, BITS, BITS),
        "lora with biases": (BITS, BITS, BITS),
        "loha": (BITS, BITS, BITS),
        "oft": (BITS, BITS, BITS),
        "oft, rescaled": (BITS, BITS, BITS),
        "ia3 of rows": (BITS, BITS, BITS),
        "diff": (BITS, BITS, BITS),
        "diff with biases": (BITS, BITS, BITS),
        "bias alone": (BITS, BITS, BITS),
        "replacement": (BITS, BITS, BITS),
        "dora of rows": (BITS, BITS, BITS),
        "dora of rows over loha": (BITS, BITS, BITS),
        # The parts of a fused LoKr share their second factor; separate ones do not.
        "lokr": (BITS, REFUSED, BITS),
        "lokr, first factored": (BITS, REFUSED, BITS),
        "lokr, second factored": (BITS, REFUSED, BITS),
        "lokr, both factored": (BITS, REFUSED, BITS),
        # Thirds cut through its blocks, halves do not.
        "lokr, as even as can be": (REFUSED, REFUSED, BITS),
        # What they do to the input is one thing for all rows of a weight.
        "glora": (BITS, REFUSED, BITS),
        "oft of columns": (BITS, REFUSED, BITS),
        "ia3 of columns": (BITS, REFUSED, BITS),
        # Its stages mix rows of the whole weight.
        "boft": (REFUSED, REFUSED, REFUSED),
        # The length of a column is that of all its rows.
        "dora of columns": (REFUSED, REFUSED, REFUSED),
        "dora of columns over lokr": (REFUSED, REFUSED, REFUSED),
        # Only convolutions have a core, and none is ever cut.
        "lora, core": (BITS, BITS, BITS),
        "loha, core": (BITS, BITS, BITS),
        "lokr, core": (BITS, BITS, BITS),
    }.items()
}
# These formats say one thing for all modules of a file, so this is what a file may hold together. (PEFT
# multiplies where LyCORIS adds, so its IA³ is rounded; and PEFT uses alpha where a LoKr has no rank.)
TOGETHER: dict[str, tuple[tuple[str, ...], ...]] = {
    "diffusers": (("lora",), ("lora with biases",), ("dora of rows",)),
    "bfl": (("lora",), ("lora with biases",)),
    "peft": (
        ("lora",),
        ("lora with biases",),
        ("dora of rows",),
        ("loha",),
        ("lokr, as even as can be",),
        ("oft of columns",),
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two formats of a family.

    number: which of the pairs it is, for taking turns.  forms: what a file may hold together.
    """

    family: str
    here: str
    there: str
    number: int
    forms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}, {self.here} by {self.there}"

    @cached_property
    def targets(self) -> tuple[Target, Target]:
        owner = family(self.family)[0]
        return owner.target(self.here), owner.target(self.there)

    @property
    def layouts(self) -> tuple[str, str]:
        here, there = self.targets
        return here.layout, there.layout


def distinct_targets(owner: Family) -> list[str]:
    """The targets that are spelled differently; several names can mean one."""
    seen: dict[object, str] = {}
    for name in owner.target_names():
        target = owner.target(name)
        prefixes = tuple((c, p.text, p.naming) for c, p in sorted(target.prefixes.items()))
        seen.setdefault((target.layout, target.scale, prefixes), name)
    return list(seen.values())


def every_pair() -> Iterator[Pair]:
    number = 0
    for owner in families():
        for here, there in permutations(() if owner.open else distinct_targets(owner), 2):
            both = (owner.target(here).layout, owner.target(there).layout)
            yield Pair(
                owner.key,
                here,
                there,
                number,
                _forms_together(next(iter(owner.components)), both, number // 3),
            )
            number += 1


def _forms_together(component: str, both: Sequence[str], turn: int) -> tuple[str, ...]:
    """All forms, or the next of the sets that both layouts allow and can write."""
    sets = [TOGETHER[layout] for layout in both if layout in TOGETHER]
    if not sets:
        return tuple(FORMS)
    weight = Weight((8, 8), 1)
    possible = [
        forms
        for forms in max(sets, key=len)
        if all(forms in one for one in sets)
        and all(can(layout, form, component, weight) for layout in both for form in forms)
    ]
    return possible[turn % len(possible)]


@dataclass(frozen=True)
class Group:
    """Modules of one file that share rows in the other, and how the other has them."""

    component: str
    rows: tuple[Row, ...]
    relation: str  # renamed, cut, stacked or swapped


@cache
def groups(family_name: str, here: str, there: str, turn: int) -> tuple[Group, ...]:
    """Of every pattern of names the first, a middle or the last module, with what `there` has beside it."""
    owner = family(family_name)[0]
    a, b = owner.target(here), owner.target(there)
    found: dict[tuple[str, str], Group] = {}
    for (component, _), rows in patterns(owner, a).items():
        if component in b.prefixes:
            group = _group(owner, component, rows[turn], a, b)
            if group is not None:
                found[(component, group.rows[0].native)] = group
    return tuple(found.values())


def _group(owner: Family, component: str, row: Row, a: Target, b: Target) -> Group | None:
    ours = owner.names(component, a.prefixes[component].naming)
    theirs = owner.names(component, b.prefixes[component].naming)
    same = theirs.at(row.span, "weight")
    if same is not None:
        return Group(component, (row,), "renamed")
    others = _modules(other for piece in row.span for other in theirs.covering(piece.module))
    rows = _modules(r for other in others for piece in other.span for r in ours.covering(piece.module))
    if not rows or not {p.module for r in rows for p in r.span} <= {p.module for r in others for p in r.span}:
        return None
    relation = "swapped" if len(rows) == len(others) == 1 else "cut" if len(others) > 1 else "stacked"
    return Group(component, tuple(rows), relation)


def _modules(rows: Iterator[Row]) -> list[Row]:
    return list({row.native: row for row in rows if row.param is None}.values())


def modules(pair: Pair) -> list[Module]:
    """Every group of modules in the next form that both formats can write and that comes back."""
    owner = family(pair.family)[0]
    chosen: list[Module] = []
    turns: dict[object, int] = {}
    for group in groups(pair.family, pair.here, pair.there, pair.number % 3):
        forms = [
            name
            for name in pair.forms
            if (group.relation == "renamed" or THROUGH[name][group.relation] == BITS)
            and all(_possible(owner, pair.layouts, group.component, row, name) for row in group.rows)
        ]
        if not forms:
            continue
        turn = turns[tuple(forms)] = turns.get(tuple(forms), pair.number) + 1
        chosen += (Module(group.component, row, forms[turn % len(forms)]) for row in group.rows)
    return chosen


def _possible(owner: Family, both: Sequence[str], component: str, row: Row, name: str) -> bool:
    known, form = owner.network(component), FORMS[name]
    assert known is not None
    weight = weight_of(known, row)
    if weight is None or not form.fits(weight) or (form.of_bias and not has_bias(known, row)):
        return False
    return all(can(layout, name, component, weight) for layout in both)


def check_same_file(before: File, after: File, unused: Collection[str] = ()) -> None:
    """The same keys, and the same bits in every tensor but alphas, which have the same value.

    unused: alphas that may have another, because nobody uses them.
    """
    assert after.tensors.keys() == before.tensors.keys()
    for key, tensor in before.tensors.items():
        if tensor.ndim == 0:
            assert key in unused or float(after.tensors[key]) == float(tensor), key
        else:
            assert after.tensors[key].dtype == tensor.dtype, key
            assert torch.equal(after.tensors[key], tensor), key


def unused_alphas(file: File) -> set[str]:
    """The alphas beside a LoKr of two whole factors."""
    stems = {key.removesuffix(".lokr_w1") for key in file.tensors if key.endswith(".lokr_w1")}
    return {f"{stem}.alpha" for stem in stems if f"{stem}.lokr_w2" in file.tensors}


def check_same_change(before: File, after: File, family_name: str, tolerance: float = 1e-6) -> None:
    compared = list(differences(before.read(family_name), after.read(family_name)))
    assert compared
    worst = max(compared, key=lambda difference: difference.error)
    assert worst.error <= tolerance, worst


def _has_bias(owner: Family, component: str, row: Row) -> bool:
    known = owner.network(component)
    return known is not None and has_bias(known, row)


def scale_for(pair: Pair) -> float:
    """1 where a format has no place for another and folds it into the factors."""
    homeless = "none" in {target.scale for target in pair.targets}
    return 1.0 if homeless or pair.forms == ("lokr, as even as can be",) else 0.5


# Sizes and siblings of a model share its tables: of their pairs only a ring is tried by default.
SIBLINGS = {
    "sd2": "sd1",
    "sdxl_refiner": "sdxl",
    "SD 3 medium": "SD 3.5 medium",
    "SD 3.5 large": "SD 3.5 medium",
}


def pairs_to_try() -> Iterator[object]:
    for pair in every_pair():
        targets = distinct_targets(family(pair.family)[0])
        step = (targets.index(pair.there) - targets.index(pair.here)) % len(targets)
        slow = pair.family in SIBLINGS and step not in (1, len(targets) - 1)
        yield pytest.param(pair, marks=pytest.mark.slow) if slow else pair


@pytest.mark.parametrize("pair", list(pairs_to_try()), ids=str)
def test_there_and_back_again_every_bit_is_where_it_was(pair: Pair) -> None:
    chosen = modules(pair)
    assert chosen
    before = build(pair.family, pair.here, chosen, seed=pair.number, scale=scale_for(pair))
    between = converted(before, pair.family, pair.there)
    after = converted(between, pair.family, pair.here)
    # PEFT has alphas for factors without a rank too, but of its own.
    unused = unused_alphas(before) if "peft" in pair.layouts else ()
    check_same_file(before, after, unused)
    check_same_change(before, between, pair.family)


REFUSALS = [
    (name, relation)
    for name, through in THROUGH.items()
    for relation in through
    if through[relation] == REFUSED
]
# A fused weight of FLUX.1 kept apart, its parts put together, and halves in another order.
WAYS = {
    "cut": ("kohya", "onetrainer"),
    "stacked": ("onetrainer", "kohya"),
    "swapped": ("kohya", "onetrainer"),
}


@pytest.mark.parametrize("name, relation", REFUSALS)
def test_what_cannot_be_said_is_refused_with_what_to_do(name: str, relation: str) -> None:
    here, there = WAYS[relation]
    found = [g for g in groups("flux1", here, there, 0) if g.relation == relation]
    assert found
    for group in found:
        before = build("flux1", here, [Module(group.component, row, name) for row in group.rows])
        with pytest.raises(Unrepresentable) as caught:
            converted(before, "flux1", there)
        assert caught.value.hint


# The pairs whose way through another format rounds, and how: everything else above is exact.
ROUNDED = {
    "a scale folded into the factors": ("flux1", "kohya", "ai-toolkit", "lora", {}),
    "a scale folded into the factors of XLabs": ("flux1", "comfyui", "xlabs", "lora", {}),
    "a scale folded into the factors of old diffusers": ("sdxl", "kohya", "diffusers-2023", "lora", {}),
    "a convolution's core multiplied out": ("sdxl", "kohya", "diffusers", "lora, core", {"as_lora": True}),
    "a product written out as LoRA": ("sd1", "kohya", "diffusers", "loha", {"as_lora": True}),
    "a Kronecker product written out as LoRA": ("sd2", "omi", "peft", "lokr", {"as_lora": True}),
    "a fused Kronecker product cut through": (
        "flux1",
        "kohya",
        "omi",
        "lokr, as even as can be",
        {"as_lora": True},
    ),
    # Of layers without a bias: PEFT's would scale that too.
    "an IA³ that PEFT multiplies": ("sd1", "kohya", "peft", "ia3 of rows", {}),
    "an IA³ of columns that PEFT multiplies": ("sdxl_refiner", "kohya", "peft", "ia3 of columns", {}),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_what_is_rounded_on_the_way_is_the_same_change(case: str) -> None:
    family_name, here, there, name, options = ROUNDED[case]
    owner = family(family_name)[0]
    layout = owner.target(here).layout
    chosen = [
        Module(group.component, row, name)
        for group in groups(family_name, here, there, 1)
        for row in group.rows
        if _possible(owner, [layout], group.component, row, name)
        and not (name == "ia3 of rows" and _has_bias(owner, group.component, row))
    ]
    before = build(family_name, here, chosen, scale=0.3)
    between = converted(before, family_name, there, Options(**options))
    check_same_change(before, between, family_name)
    check_same_change(before, converted(between, family_name, here), family_name)
