"""What the changes of adapters do to a base model: to which of its weights, and to which rows of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from adapterkit import deltas
from adapterkit.adapter import Adapter
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Change, ExpertsLowRank, LowRank, Magnitude
from adapterkit.errors import Mismatch, Refused, located
from adapterkit.selection import Module
from adapterkit.specs.experts import expert_modules, tuned_parameters
from adapterkit.specs.families import Place
from adapterkit.specs.names import Piece
from adapterkit.specs.weights import weight_names
from adapterkit.strengths import Strengths


@dataclass(frozen=True, eq=False)
class Ingredient:
    """One adapter that is baked in. strength: of all of it; strengths: of its parts, each times that."""

    name: str
    adapter: Adapter
    strength: float = 1.0
    strengths: tuple[Strengths, ...] = ()

    def at(self, place: Place, piece: Piece, native: str) -> float:
        """The strength of one piece of a place."""
        module = Module(place.component, piece.module, place.param, native)
        return math.prod((each.of(module) for each in self.strengths), start=self.strength)


@dataclass(frozen=True, eq=False)
class Effect:
    """A change of one weight of the base.

    place: of the weight.  before, shape: of the weight, as it is and as it will be.  number: of the
    adapter's change that it is, or is a part of.
    """

    ingredient: Ingredient
    native: str
    place: Place
    change: Change
    before: tuple[int, ...]
    shape: tuple[int, ...]
    number: int

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.ingredient.name}: `{self.native}`"


@dataclass(frozen=True, slots=True)
class Share:
    """Rows [start, stop) of a tensor of the base are the rows from `first` of an effect's weight.

    transposed: the tensor is kept transposed, and they are its columns.
    """

    effect: Effect
    strength: float
    first: int
    start: int
    stop: int
    transposed: bool


def places_of(
    base: Checkpoint, ingredient: Ingredient, place: Place, change: Change
) -> list[tuple[Place, Change]]:
    """The weights of the base that a change acts on, each with its part of it; [] if the base has them not.

    One, but for the experts of a mixture, which files keep apart, and for PEFT's IA³, which multiplies
    the output of a layer and so its bias (peft v0.21.2 tuners/ia3/layer.py: Linear.merge).
    """
    if isinstance(change, ExpertsLowRank):
        return _experts(base, ingredient.adapter, place, change)
    stretches = base.stretches(place.component, place.span, place.param)
    if not stretches:
        return []
    if base.family.open and isinstance(change, deltas.Whole) and stretches[0].transposed:
        # Where no table says how a module lies, its own numbers lie as in the base.
        place = replace(place, span=tuple(replace(piece, transposed=True) for piece in place.span))
    found = [(place, change)]
    scales_output = isinstance(change, deltas.Scaling) and not change.additive and not change.on_input
    if scales_output and place.param == "weight":
        bias = Place(place.component, place.span, "bias")
        if base.keys(bias.component, bias.span, bias.param):
            found.append((bias, change._with({"weight_shape": None})))
    return found


def fitted(change: Change, shape: tuple[int, ...]) -> Change:
    """The change, knowing the shape of its weight. Mismatch if that is not its own."""
    if isinstance(change, Magnitude):
        return replace(change, inner=fitted(change.inner, shape))
    if not hasattr(change, "weight_shape"):
        change.require_fit(shape)
        return change
    # The shape that it was read with may be that of the model in another width.
    unshaped = change._with({"weight_shape": None})
    if not isinstance(change, deltas.Vera) or change.rows != shape[0]:
        unshaped.require_fit(shape)
    return unshaped._with({"weight_shape": shape})


def require_computable(effect: Effect) -> None:
    """Unrepresentable or Refused for changes whose delta cannot be told from what the file holds."""
    change = effect.change.inner if isinstance(effect.change, Magnitude) else effect.change
    with located(effect.where):
        match change:
            case deltas.Vera():
                change.low_rank()
            case deltas.TLora():
                change.dense()
            case deltas.Tokens(indices=None):
                raise Refused(
                    "which tokens its rows replace is not known",
                    code="tokens-unknown",
                    hint="give the folder with the adapter_config.json that was saved beside it",
                )
            case deltas.Tokens(indices=indices) if indices and not _has_rows(change, effect.shape):
                raise Mismatch(
                    f"it replaces rows up to {max(indices)} of {list(effect.shape)}, "
                    f"{change.rows_.shape[1]} wide",
                    code="weight-shape",
                    hint="the adapter was made for a model with more tokens",
                )


def _has_rows(change: deltas.Tokens, shape: tuple[int, ...]) -> bool:
    return max(change.indices or ()) < shape[0] and shape[1:] == change.rows_.shape[1:]


def shares_of(base: Checkpoint, effect: Effect) -> Iterator[tuple[str, Share]]:
    """Where the effect's rows lie in the base's tensors, by their keys; rows at strength 0 are left out."""
    place = effect.place
    strengths = [effect.ingredient.at(place, piece, effect.native) for piece in place.span]
    parts: list[tuple[tuple[Piece, ...], float]] = [(place.span, strengths[0])]
    if len(set(strengths)) > 1:
        parts = [((piece,), strength) for piece, strength in zip(place.span, strengths, strict=True)]
    first = 0
    for span, strength in parts:
        stretches = base.stretches(place.component, span, place.param)
        assert stretches is not None
        for stretch in stretches:
            height = stretch.stop - stretch.start
            if strength:
                yield (
                    stretch.key,
                    Share(effect, strength, first, stretch.start, stretch.stop, stretch.transposed),
                )
            first += height


def with_fitting_names(base: Checkpoint, ingredients: Sequence[Ingredient]) -> Checkpoint:
    """The base by the names that the adapters use.

    transformers saves a model without its head under shorter names than the model that was tuned has.
    """
    if not base.family.open:
        return base
    places = [place for one in ingredients for place in one.adapter.changes]
    candidates = [base, *(base.with_front(f"{front}.") for front in weight_names().fronts)]
    return max(candidates, key=lambda candidate: _known(candidate, places))


def _known(base: Checkpoint, places: Sequence[Place]) -> int:
    return sum(bool(base.keys(place.component, place.span, place.param)) for place in places)


def _experts(
    base: Checkpoint, adapter: Adapter, place: Place, change: ExpertsLowRank
) -> list[tuple[Place, Change]]:
    """The experts' changes where the base has them: one stacked tensor, or one or two for each."""
    config = adapter.tuners.get(place.component) or adapter.tuners.get("")
    for stacked in tuned_parameters(config, place.span[0].module) if config is not None else ():
        whole = Place(place.component, (Piece(stacked),), "")
        shape = base.shape(whole.component, whole.span, whole.param)
        if shape is not None:
            if _fits(change, shape):
                return [(whole, change)]
            continue
        for modules in expert_modules(stacked, 0):
            shape = base.shape(place.component, tuple(map(Piece, modules)), "weight")
            if shape is not None and sorted(shape) == sorted(change.shape[1:]):
                row = list(expert_modules(stacked, 0)).index(modules)
                return list(_one_by_one(place.component, change, stacked, row, shape))
    return []


def _fits(change: Change, shape: tuple[int, ...]) -> bool:
    try:
        change.require_fit(shape)
    except Mismatch:
        return False
    return True


def _one_by_one(
    component: str, change: ExpertsLowRank, stacked: str, row: int, shape: tuple[int, ...]
) -> Iterator[tuple[Place, Change]]:
    o, i = change.shape[1:]
    up = change.up.reshape(o, change.rank, change.count)
    down = change.down.reshape(change.count, change.rank, i)
    for expert in range(change.count):
        modules = list(expert_modules(stacked, expert))[row]
        one = LowRank(up[:, :, expert], down[expert], change.scale)
        # Some models keep an expert's weight as (in, out) in memory; files have (out, in).
        turned = one if shape == (o, i) else deltas.transpose(one)
        yield Place(component, tuple(map(Piece, modules)), "weight"), turned
