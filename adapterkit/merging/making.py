"""From the inputs to the changes of the output, place by place: what each method asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.blocks import block_of
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Change, EmbeddingLowRank, ExpertsLowRank, Magnitude, Whole
from adapterkit.deltas.tensors import common_dtype, written
from adapterkit.errors import Mismatch, Refused, Unrepresentable, located
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.dense_svd import dense_svd
from adapterkit.linalg.pool import each
from adapterkit.linalg.product_svd import factored_svd, truncated_svd
from adapterkit.merging.elementwise import combined, sum_of
from adapterkit.merging.inputs import Contribution, Input, contributions, natives, places
from adapterkit.merging.interference import Interference, Meeting, inner_products
from adapterkit.merging.methods import Method
from adapterkit.merging.settings import Settings
from adapterkit.merging.spectral import isotropic, scaled
from adapterkit.merging.stacks import Stack
from adapterkit.merging.sums import replacements, summed
from adapterkit.merging.tasks import Task, task_of
from adapterkit.reduction import Part
from adapterkit.resizing import noise_of
from adapterkit.specs.families import Family, Place

Progress = Callable[[str, int, int], None]

# Above this share of the short side; as in `adapterkit.decompose`.
_MANY_RANKS = 0.4


@dataclass(frozen=True, eq=False)
class Recipe:
    """All that a merge was asked for.

    truncates: whether a rank rule holds.  most: the greatest rank that can be wanted, if that is known.
    largest: whether every module gets the largest rank that an input has there.
    settled: whether every module gets the greatest rank that can be wanted, or as much of it as it has.
    noise: whether a rule asks what is noise.
    dtype: of the output's factors; None for the widest of what is added.
    base: the base model, for changes that depend on it.
    """

    inputs: tuple[Input, ...]
    method: Method
    settings: Settings
    truncates: bool = False
    most: int | None = None
    largest: bool = False
    settled: bool = False
    noise: bool = False
    dtype: torch.dtype | None = None
    allow: frozenset[str] = frozenset()
    base: Checkpoint | None = None

    @property
    def family(self) -> Family:
        return self.inputs[0].adapter.family

    def most_of(self, tasks: Sequence[Task]) -> int | None:
        """The greatest rank that can be wanted of one weight."""
        ranks = [self.most] if self.most is not None else []
        return min([*ranks, max(task.rank for task in tasks)] if self.largest else ranks, default=None)


@dataclass(frozen=True, eq=False)
class Made:
    """What is known of one place.

    changes: the output's, where no rank is to be chosen.  part: what one is to be chosen for.
    tasks: what the inputs do there; () where they are no plain deltas of a matrix.
    gram: their inner products, None without tasks.
    """

    changes: tuple[Change, ...]
    part: Part | None
    tasks: tuple[Task, ...]
    gram: Tensor | None

    @property
    def finite(self) -> bool:
        return self.gram is None or bool(self.gram.isfinite().all())


@dataclass(frozen=True, eq=False)
class Merged:
    """The output's changes and parts by place, and how the inputs stand to each other.

    damaged: modules with numbers that are not finite, which were added up as they are by consent.
    """

    changes: Mapping[Place, tuple[Change, ...]]
    parts: Mapping[Place, Part]
    interference: Interference
    damaged: tuple[str, ...]


def merged(recipe: Recipe, progress: Progress | None = None) -> Merged:
    """Merge all places.

    Raises Unrepresentable for changes that cannot be merged, Mismatch where shapes differ, and Refused
    (code "nonfinite") for numbers that are not finite; each names the module.
    """
    every = places(recipe.inputs)
    names = natives(recipe.inputs)

    def finished(count: int) -> None:
        if progress is not None:
            progress("merging", count, len(every))

    # The largest first: no thread is left alone with a large one at the end.
    order = sorted(every, key=lambda place: -_work(recipe, place))
    found = dict(zip(order, each(lambda place: made_at(recipe, place), order, finished), strict=True))
    meeting = Meeting([one.name for one in recipe.inputs])
    damaged = []
    for place in every:
        made = found[place]
        if not made.finite:
            damaged.append(names.get(place, place.span[0].module))
        elif made.gram is not None:
            block = block_of(recipe.family, place.component, place.span[0].module)
            meeting.add(block, made.tasks, made.gram)
    return Merged(
        {place: found[place].changes for place in every if found[place].changes},
        {place: part for place in every if (part := found[place].part)},
        meeting.result(),
        tuple(damaged),
    )


def made_at(recipe: Recipe, place: Place) -> Made:
    """Merge one place."""
    found = [_prepared(recipe, place, one) for one in contributions(recipe.inputs, place)]
    if not found:
        return Made((), None, (), None)
    tasks = tuple(_tasks(found))
    if not tasks:
        return Made(_other(recipe, place, found), None, (), None)
    _require_one_shape(found, tasks)
    quickly = recipe.settled and recipe.method.name != "iso-c"
    stack = Stack(tasks, torch.float32 if quickly else torch.float64)
    decomposes = _decomposes(recipe, found, tasks)
    sums = decomposes and recipe.method.way == "sum"
    gram = stack.inner_products() if sums else inner_products(tasks)
    finite = bool(gram.isfinite().all())
    if not finite:
        _require_consent(recipe, found, tasks)
    if not finite or not decomposes:
        return Made(_total(recipe, found), None, tasks, gram)
    decomposition = _decomposed(recipe, place, tasks, stack)
    part = Part(
        decomposition=decomposition,
        shape=_shape(found),
        noise=noise_of(_total(recipe, found)[0], decomposition) if recipe.noise else 0.0,
        embedding=all(isinstance(c, EmbeddingLowRank) for one in found for c in one.changes),
        dtype=recipe.dtype or _stored(found),
    )
    stack.release()
    return Made((), part, tasks, gram)


def wanted_at(recipe: Recipe, place: Place) -> tuple[Change, ...]:
    """What the method asks for at a place, in float32, before ranks are cut and factors rounded."""
    wide = replace(
        recipe, dtype=torch.float32, truncates=False, most=None, largest=False, settled=False, noise=False
    )
    if recipe.method.way == "sum" and recipe.method.name != "iso-c":
        found = [_prepared(wide, place, one) for one in contributions(wide.inputs, place)]
        return _total(wide, found)
    made = made_at(wide, place)
    if made.part is None:
        return made.changes
    if wide.method.way == "numbers":
        return (Whole(_numbers(wide, place, made.tasks).reshape(made.part.shape)),)
    rank = made.part.decomposition.rank
    return (made.part.change(rank, torch.float32),) if rank else ()


def _work(recipe: Recipe, place: Place) -> int:
    return sum(math.prod(c.shape) for one in contributions(recipe.inputs, place) for c in one.changes)


def _prepared(recipe: Recipe, place: Place, one: Contribution) -> Contribution:
    """The contribution without magnitudes by consent, or as a plain delta where there is a base."""
    if "magnitude" in recipe.allow:
        bare = tuple(c.inner if isinstance(c, Magnitude) else c for c in one.changes)
        one = replace(one, changes=bare)
    if recipe.base is None or not one.needs_base:
        return one
    weight = recipe.base.tensor(place.component, place.span, place.param)
    if weight is None:
        return one
    with located(one.where):
        total = sum_of([change.dense(weight.float()) for change in one.changes])
    return replace(one, changes=(Whole(total),))


def _total(recipe: Recipe, found: Sequence[Contribution]) -> tuple[Change, ...]:
    """The plain sum, at the strength of the whole."""
    whole = recipe.settings.strength
    every = [one if whole == 1.0 else replace(one, strength=one.strength * whole) for one in found]
    return summed(every, recipe.dtype)


def _tasks(found: Sequence[Contribution]) -> Iterator[Task]:
    """One for each contribution; none at all where one is no plain delta of a matrix."""
    for one in found:
        for change in one.changes:
            flat = isinstance(change, Whole) and change.value.ndim < 2
            if change.needs_base or flat or isinstance(change, ExpertsLowRank):
                return
    for one in found:
        with located(one.where):
            yield task_of(one.name, one.changes, one.strength)


def _decomposes(recipe: Recipe, found: Sequence[Contribution], tasks: Sequence[Task]) -> bool:
    """Whether a rank is to be chosen: by rule or method, or because the sum has more than the weight."""
    if recipe.truncates or recipe.method.name != "linear":
        return True
    full = min(tasks[0].up.shape[0], tasks[0].down.shape[1])
    whole = any(isinstance(change, Whole) for one in found for change in one.changes)
    return len(tasks) > 1 and not whole and _total_rank(tasks) > full


def _total_rank(tasks: Sequence[Task]) -> int:
    return sum(task.rank for task in tasks)


def _decomposed(recipe: Recipe, place: Place, tasks: Sequence[Task], stack: Stack) -> Decomposition:
    method, settings, most = recipe.method, recipe.settings, recipe.most_of(tasks)
    if method.way == "numbers":
        return _dense(_numbers(recipe, place, tasks), most)
    if method.factored is not None:
        found = method.factored(tasks, settings, key_of(place), most)
    elif method.name == "iso-c":
        found = isotropic(_sum(recipe, tasks, stack, None))
    else:
        found = _sum(recipe, tasks, stack, most)
    return scaled(found, settings.strength)


def _sum(recipe: Recipe, tasks: Sequence[Task], stack: Stack, most: int | None) -> Decomposition:
    """Of the weighted sum, through the factors.

    Where they have many ranks for the matrix and few are wanted, looking for those in the matrix itself
    takes less time than the core of the factors.
    """
    short, rank = min(tasks[0].up.shape[0], tasks[0].down.shape[1]), _total_rank(tasks)
    if most is not None and rank > max(_MANY_RANKS * short, 2 * most):
        return _dense(sum_of([task.dense() * task.strength for task in tasks]), most)
    if not recipe.settled or most is None:
        return factored_svd(stack.factors, most, stack.grams)
    # All vectors will be wanted, so they are made while the factors are there.
    quick = truncated_svd(*stack.factors(), most, stack.grams)
    if quick is not None:
        return quick
    exact = Stack(tasks)
    found = factored_svd(exact.factors, most)
    u, vt = (part.float() for part in found.vectors(found.rank))
    exact.release()
    return replace(found, vectors=lambda rank: (u[:, :rank], vt[:rank]))


def _dense(matrix: Tensor, most: int | None) -> Decomposition:
    full = min(matrix.shape)
    return dense_svd(matrix, full if most is None else min(most, full), exact=most is None)


def _numbers(recipe: Recipe, place: Place, tasks: Sequence[Task]) -> Tensor:
    """The merged delta (o, n) of a method that looks at single numbers."""
    made = combined(
        [task.dense() for task in tasks],
        [task.strength for task in tasks],
        [task.name for task in tasks],
        key_of(place),
        recipe.method.name,
        recipe.settings,
    )
    return made.mul_(recipe.settings.strength)


def _other(recipe: Recipe, place: Place, found: Sequence[Contribution]) -> tuple[Change, ...]:
    """What is no plain delta of a matrix: vectors take part in methods on numbers, and sums in others.

    Raises Unrepresentable where several of another kind meet in a method that is no sum.
    """
    method = recipe.method
    changes = [change for one in found for change in one.changes]
    elementwise = method.name if method.way == "numbers" else recipe.settings.inner
    if all(isinstance(change, Whole) and not change.replaces for change in changes):
        if method.way == "numbers" or "inner" in method.uses:
            return (_vector(recipe, place, found, elementwise),)
    elif method.way != "sum" and len(found) > 1 and not replacements(found):
        raise Unrepresentable(
            f"{found[0].where}: {method.title} is for plain deltas of matrices, and this is none",
            code="merge-kind",
            hint="--method linear adds up what has a sum",
            details={"module": found[0].native, "input": found[0].name, "kind": changes[0].kind},
        )
    return _total(recipe, found)


def _vector(recipe: Recipe, place: Place, found: Sequence[Contribution], method: str) -> Whole:
    values = [sum_of([change.dense() for change in one.changes]) for one in found]
    strengths, names = [one.strength for one in found], [one.name for one in found]
    made = combined(values, strengths, names, key_of(place), method, recipe.settings)
    return Whole(made * recipe.settings.strength)


def _shape(found: Sequence[Contribution]) -> tuple[int, ...]:
    """The weight's, with as many axes as any of them tells."""
    return max((change.shape for one in found for change in one.changes), key=len)


def _stored(found: Collection[Contribution]) -> torch.dtype:
    """The narrowest dtype that holds the factors of all."""
    dtype = common_dtype(t for one in found for c in one.changes for t in c.tensors().values() if t.ndim > 1)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32


def _require_one_shape(found: Sequence[Contribution], tasks: Sequence[Task]) -> None:
    shapes = {(task.up.shape[0], task.down.shape[1]) for task in tasks}
    if len(shapes) > 1:
        sizes = ", ".join(f"{one.where} {written(_shape([one]))}" for one in found)
        raise Mismatch(
            f"the adapters do not change one weight: {sizes}",
            code="merge-shapes",
            hint="they are for base models of different sizes, and no merge of theirs fits either",
            details={"modules": [one.native for one in found], "shapes": [list(_shape([o])) for o in found]},
        )


def _require_consent(recipe: Recipe, found: Sequence[Contribution], tasks: Sequence[Task]) -> None:
    if "nonfinite" in recipe.allow:
        return
    bad = [
        one
        for one, task in zip(found, tasks, strict=True)
        if not bool(task.up.isfinite().all() and task.down.isfinite().all())
    ]
    named = bad or list(found)
    raise Refused(
        f"{' and '.join(one.where for one in named)}: numbers that are not finite",
        code="nonfinite",
        hint="the adapter is damaged; --allow nonfinite adds such modules up as they are",
        details={"modules": [one.native for one in named], "inputs": [one.name for one in named]},
    )


def key_of(place: Place) -> str:
    """A name of the place that does not depend on any file."""
    pieces = "+".join(f"{piece.module}[{piece.start}:{piece.stop}]" for piece in place.span)
    return f"{place.component}:{pieces}:{place.param}"
