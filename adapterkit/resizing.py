"""What of an adapter can have another rank, decomposed: the first half of `resize`.

Every delta that is a matrix, or a kernel, becomes a part whose rank can be chosen; what is no sum of
ranks stays as it is (vectors, replacements, rotations, scalings).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.adapter import Adapter
from adapterkit.checkpoint import Checkpoint
from adapterkit.decompose import decompose
from adapterkit.deltas import Change, LowRank, Magnitude, Vera, Whole
from adapterkit.errors import Json, Mismatch, Refused
from adapterkit.linalg.decomposition import Decomposition
from adapterkit.linalg.noise import noise_deviation, noise_edge, rounding_noise
from adapterkit.reduction import Part, stored_dtype
from adapterkit.specs.families import Place
from adapterkit.specs.kinds import KINDS

Progress = Callable[[str, int, int], None]

# Of a whole delta no more values are looked for than this, unless a rank is named: most of it is then
# known, or it is none that a LoRA would be much smaller than, and stays.
_MOST_OF_WHOLE = 256
# A tail is noise only if it is as flat as noise: its least value is this share of what noise has.
_FLAT = 0.8
# Too few values to tell a tail from a change that uses all of them.
_FEW = 16
# The largest value of noise that is seen goes a little beyond its expected edge.
_MARGIN = 1.05


@dataclass(frozen=True)
class Settings:
    """How to decompose.

    most: the highest rank that will be asked for; None if that is open.
    exact: singular values of whole deltas to rounding.  device: where to compute.
    noise: whether to look for what is noise, for rules of auto.
    allow: "nonfinite" leaves modules with such numbers as they are.
    """

    most: int | None = None
    exact: bool = False
    device: torch.device | None = None
    noise: bool = True
    allow: Collection[str] = frozenset()
    progress: Progress | None = None


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapter's changes, sorted.

    parts: those whose rank can be chosen.  stayed: how many others there are, by the title of their
    kind.  faulty: places left as they are because their numbers are not finite.
    """

    parts: Mapping[Place, Part]
    stayed: Mapping[str, int]
    faulty: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """The changes of one place that a rank can be chosen for, as one.

    delta: their sum, without magnitudes.  magnitude: the DoRA around it.  single: the change itself,
    if there is only one.  beside: other changes of the place.  weight: the base's, where it is needed.
    """

    delta: Change
    single: Change | None
    magnitude: Magnitude | None
    beside: tuple[Change, ...]


def decomposed(
    adapter: Adapter, base: Checkpoint | None = None, settings: Settings = Settings()
) -> Decomposed:
    """The parts of an adapter, each with its singular values.

    base: the model that it changes. A part's error then counts relative to its weight, and DoRA, whose
    change depends on it, can be decomposed.
    Raises Refused for DoRA without base (code "base-needed") and for numbers that are not finite, and
    Mismatch where the base lacks a weight or has another shape.
    """
    stayed: Counter[str] = Counter()
    found: dict[Place, _Candidate] = {}
    for place, changes in adapter.changes.items():
        candidate, others = _sorted(place, changes)
        stayed.update(KINDS[change.kind].title for change in others)
        if candidate is not None:
            found[place] = candidate
    if base is None:
        _require_no_magnitude(adapter, found)
    # The base is read once for each part, here, and once more where magnitudes are made.
    weights = {place: _Weight(base, place, c) for place, c in found.items()} if base is not None else {}
    for done, weight in enumerate(weights.values(), 1):
        weight.look()
        if settings.progress is not None:
            settings.progress("base", done, len(weights))
    measured = {place: weights[place].measured(c) if base else c.delta for place, c in found.items()}
    spectra = _spectra(adapter, measured, settings)
    parts = {}
    for place, decomposition in spectra.items():
        parts[place] = _part(found[place], decomposition, weights.get(place), settings.noise)
    return Decomposed(parts, dict(stayed), tuple(place for place in found if place not in parts))


def _sorted(place: Place, changes: tuple[Change, ...]) -> tuple[_Candidate | None, tuple[Change, ...]]:
    """What a rank can be chosen for, as one, and the changes that stay."""
    reducible = tuple(change for change in changes if _reducible(_inner(change)))
    others = tuple(change for change in changes if change not in reducible)
    if not reducible or place.param == "bias":
        return None, changes
    if any(isinstance(change, Magnitude) for change in reducible):
        # Around a sum of changes there is no one magnitude; such files are not made.
        if len(reducible) > 1:
            return None, changes
        magnitude = reducible[0]
        assert isinstance(magnitude, Magnitude)
        return _Candidate(magnitude.inner, magnitude, magnitude, others), others
    single = reducible[0] if len(reducible) == 1 else None
    return _Candidate(deltas.add(reducible), single, None, others), others


def _inner(change: Change) -> Change:
    return change.inner if isinstance(change, Magnitude) else change


def _reducible(change: Change) -> bool:
    """Whether a delta is a matrix or a kernel, and known without the base."""
    match change:
        case Whole():
            return not change.replaces and len(change.shape) >= 2
        case Vera():
            return change.shared_a is not None and change.shared_b is not None
    return change.expanded_rank is not None and len(change.shape) >= 2 and not change.needs_base


def _require_no_magnitude(adapter: Adapter, found: Mapping[Place, _Candidate]) -> None:
    places = [place for place, candidate in found.items() if candidate.magnitude is not None]
    if places:
        natives = [adapter.natives.get(place, place.span[0].module) for place in places]
        raise Refused(
            f"`{natives[0]}` and {len(natives) - 1} more are DoRA, whose change depends on the base model",
            code="base-needed",
            hint="--base MODEL names the model that it was trained on",
            details={"modules": list[Json](natives)},
        )


def _spectra(
    adapter: Adapter, found: Mapping[Place, Change], settings: Settings
) -> dict[Place, Decomposition]:
    """Whole deltas apart: finding all of their values would take long."""
    whole = {place: change for place, change in found.items() if isinstance(change, Whole)}
    factored = {place: change for place, change in found.items() if place not in whole}
    spectra: dict[Place, Decomposition] = {}
    for changes, most in ((factored, settings.most), (whole, settings.most or _MOST_OF_WHOLE)):
        if changes:
            spectra |= decompose(
                changes,
                most=most,
                exact=settings.exact,
                device=settings.device,
                allow=frozenset(settings.allow),
                progress=settings.progress,
                names=adapter.natives,
            )
    return {place: spectra[place] for place in found if place in spectra}


def _part(candidate: _Candidate, decomposition: Decomposition, weight: _Weight | None, noise: bool) -> Part:
    delta, magnitude = candidate.delta, candidate.magnitude
    changes = (delta,) if candidate.single is None else (candidate.single,)
    keepable = isinstance(_inner(candidate.single), LowRank | Whole) if candidate.single else False
    part = Part(
        decomposition=decomposition,
        shape=delta.shape,
        scale=_scale(delta),
        embedding=delta.kind == "embedding",
        noise=noise_of(delta, decomposition) if noise else 0.0,
        dtype=stored_dtype(changes),
        original=candidate.single if keepable else None,
        beside=candidate.beside,
    )
    if weight is None:
        return part
    part = replace(part, weight=1.0 / weight.square if weight.square else 1.0)
    if magnitude is None:
        return part
    return replace(
        part,
        decomposition=weight.unweighted(decomposition),
        finish=partial(_with_magnitude, magnitude, weight),
    )


def _scale(delta: Change) -> float:
    """What will multiply the new factors: what multiplied the old, so that alpha / rank is what it was."""
    scale: float = 1.0 if isinstance(delta, Whole) else getattr(delta, "scale", 1.0)
    return scale


def noise_of(delta: Change, decomposition: Decomposition) -> float:
    """Singular values up to this are noise: of rounding, or of a tail as flat as noise is.

    A LoRA's own noise fills its r ranks: that of a trained up is a matrix (o, r) seen through a down
    whose rows are about as long as each other, so that its values are those of noise of that shape.
    """
    rows, columns = decomposition.shape
    if isinstance(delta, Whole):
        sigma = rounding_noise(delta.value) * abs(delta.scale)
        return max(noise_edge(sigma, (rows, columns)), _tail(decomposition, (rows, columns)))
    rounding = _rounding_of_factors(delta) if isinstance(delta, LowRank) and delta.mid is None else 0.0
    rank = min(delta.expanded_rank or 1, rows, columns)
    return max(rounding, _tail(decomposition, (max(rows, columns), rank)))


def _rounding_of_factors(delta: LowRank) -> float:
    """The edge of what rounding the factors did: of each, seen through the other's mean row."""
    up, down = delta.matrices()
    edges = 0.0
    for rounded, other in ((up, down), (down, up)):
        long = max(rounded.shape)
        mean = float(torch.linalg.vector_norm(other, dtype=torch.float64)) / math.sqrt(delta.rank)
        edges += noise_edge(rounding_noise(rounded), (long, delta.rank)) * mean
    return abs(delta.scale) * edges


def _tail(decomposition: Decomposition, shape: tuple[int, int]) -> float:
    """The edge of noise of this shape, if the lower half of the values looks like it; else 0.

    A spectrum that is flat from end to end, or has few values, is rather a change that uses all of them.
    """
    short, long = sorted(shape)
    known = decomposition.rank >= short
    values = decomposition.values[:short] if known else decomposition.values
    if values.numel() < _FEW:
        return 0.0
    sigma = noise_deviation(replace(decomposition, values=values, shape=shape))
    edge = _MARGIN * noise_edge(sigma, shape)
    least = _FLAT * sigma * (math.sqrt(long) - math.sqrt(short)) if known else 0.0
    # Beyond the values that are known there must be noise alone.
    most = math.inf if known else edge
    return edge if values[0] > edge and least <= float(values[-1]) <= most else 0.0


@dataclass(eq=False)
class _Weight:
    """The base's weight at a place: read when it is needed, never kept.

    square: ‖W‖².  sides: for DoRA, what each row (or column) of the delta counts for in the new weight.
    """

    base: Checkpoint | None
    place: Place
    candidate: _Candidate
    square: float = 0.0
    sides: Tensor | None = field(default=None, repr=False)

    def tensor(self) -> Tensor:
        """In float32, of the shape it has in the base."""
        assert self.base is not None
        found = self.base.tensor(self.place.component, self.place.span, self.place.param)
        delta = self.candidate.delta
        name = self.place.span[0].module
        if found is None:
            raise Mismatch(
                f"the base has no weight for `{name}`",
                code="base-lacks",
                hint="give the model that the adapter was trained on, with all of its components",
                details={"module": name},
            )
        if found.shape[0] != delta.shape[0] or found.numel() != math.prod(delta.shape):
            raise Mismatch(
                f"`{name}` is {tuple(found.shape)} in the base and {delta.shape} in the adapter",
                code="weight-shape",
                hint="give the model that the adapter was trained on",
                details={"module": name},
            )
        return found.float()

    def look(self) -> None:
        weight = self.tensor()
        self.square = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
        magnitude = self.candidate.magnitude
        if magnitude is not None:
            lengths = _lengths(weight + _like(magnitude.inner, weight), magnitude)
            sides = magnitude.vector.double().abs() / lengths.clamp_min(torch.finfo(torch.float32).tiny)
            # A row that ends at nothing counts for next to nothing, and must be divided by.
            self.sides = sides.clamp_min(1e-6 * float(sides.max())) if float(sides.max()) else sides + 1.0

    def measured(self, candidate: _Candidate) -> Change:
        """The delta as it shows in the new weight, to first order: the direction it turns is left to
        the magnitudes, which are fitted anew."""
        if self.sides is None or candidate.magnitude is None:
            return candidate.delta
        delta = candidate.delta
        if isinstance(delta, Whole):
            factors = self._factors(candidate.magnitude, delta.value)
            return replace(delta, value=delta.value.double() * factors)
        plain = delta.low_rank()
        up, down = plain.matrices()
        if candidate.magnitude.axis == "out":
            return LowRank(up.double() * self.sides[:, None], down.double(), plain.scale)
        return LowRank(up.double(), down.double() * self._columns(down.shape[1]), plain.scale)

    def unweighted(self, decomposition: Decomposition) -> Decomposition:
        """The same singular values, with vectors that make the delta itself."""
        assert self.sides is not None and self.candidate.magnitude is not None
        sides, out = self.sides, self.candidate.magnitude.axis == "out"

        def vectors(rank: int) -> tuple[Tensor, Tensor]:
            u, vt = decomposition.vectors(rank)
            if out:
                return u / sides.to(u)[:, None], vt
            return u, vt / self._columns(vt.shape[1]).to(vt)

        return replace(decomposition, vectors=vectors)

    def _columns(self, count: int) -> Tensor:
        assert self.sides is not None
        return self.sides.repeat_interleave(count // self.sides.numel())

    def _factors(self, magnitude: Magnitude, value: Tensor) -> Tensor:
        assert self.sides is not None
        axis = 0 if magnitude.axis == "out" else 1
        return self.sides.reshape([-1 if at == axis else 1 for at in range(value.ndim)])


def _like(change: Change, weight: Tensor) -> Tensor:
    return change.dense(dtype=torch.float32).reshape(weight.shape)


def _others(weight: Tensor, magnitude: Magnitude) -> list[int]:
    axis = 0 if magnitude.axis == "out" else 1
    return [other for other in range(weight.ndim) if other != axis]


def _lengths(weight: Tensor, magnitude: Magnitude) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=_others(weight, magnitude), dtype=torch.float64)
    return lengths


def _with_magnitude(magnitude: Magnitude, weight: _Weight, made: LowRank) -> Change:
    """DoRA with new factors, its magnitudes the least squares fit to the weight that it made before."""
    tensor = weight.tensor()
    before = tensor + _like(magnitude.inner, tensor)
    after = tensor + _like(made, tensor)
    others = _others(tensor, magnitude)
    cosines = (before * after).sum(dim=others, dtype=torch.float64)
    cosines = cosines / (_lengths(before, magnitude) * _lengths(after, magnitude)).clamp_min(1e-300)
    vector = (magnitude.vector.double() * cosines).to(magnitude.vector.dtype)
    return replace(magnitude, inner=made, vector=vector)
