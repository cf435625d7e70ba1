"""Settling what a bake does: the changes of adapters matched with the tensors of a base, from headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from adapterkit import deltas
from adapterkit.baking.effects import (
    Effect,
    Ingredient,
    Share,
    fitted,
    places_of,
    require_computable,
    shares_of,
    with_fitting_names,
)
from adapterkit.baking.files import TOKENS
from adapterkit.baking.plan import ABSENT, APPLIED, AT_ZERO, OVERRULED, Baked, BakePlan, Fate
from adapterkit.baking.tying import TIED, Tie, stay_together, tie_of
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Change, LowRank, Reshape, Tokens, Whole
from adapterkit.deltas.tensors import same
from adapterkit.errors import Conflict, Json, Mismatch, Refused
from adapterkit.specs.families import Place
from adapterkit.specs.weights import weight_names
from adapterkit.stores import TensorInfo

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


def plan_bake(
    base: Checkpoint,
    ingredients: Sequence[Ingredient],
    *,
    dtype: str | None = None,
    allow: Collection[str] = (),
) -> BakePlan:
    """Settle what becomes of every tensor.

    dtype: safetensors' name of the dtype of all changed tensors; None: each keeps its own.
    allow: "absent" leaves out changes of weights that the base does not have.
    Raises Refused for such changes without consent, Mismatch where shapes differ, Conflict where two
    changes put different numbers in one place, and Unrepresentable for changes that cannot be told.
    """
    building = _Building(with_fitting_names(base, ingredients), dtype)
    for ingredient in ingredients:
        building.add(ingredient)
    if building.absent and "absent" not in allow:
        raise _absent(building)
    return building.plan(tuple(ingredients))


@dataclass
class _Building:
    """The plan while it grows. shapes: of tensors that get another one, by key."""

    base: Checkpoint
    dtype: str | None
    effects: list[Effect] = field(default_factory=list)
    heads: dict[Tie, list[Effect]] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    absent: list[Fate] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    edits: dict[str, dict[str, Json]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, ingredient: Ingredient) -> None:
        """The effects of one adapter. Mismatch if it is for a model of another size."""
        misfits: list[tuple[Place, Change, int, Mismatch]] = []
        for place, changes in ingredient.adapter.changes.items():
            # A weight is widened before anything is added to it.
            for change in sorted(changes, key=lambda change: not isinstance(change, Reshape)):
                number = self._fate(ingredient, place, change)
                try:
                    self._add(ingredient, place, change, number)
                except Mismatch as error:
                    misfits.append((place, change, number, error))
        if len(misfits) == 1 and len(ingredient.adapter.changes) > 1:
            place, change, number, _ = misfits[0]
            if self._widened_by(place, change):
                self._add(ingredient, place, change, number)
                return
        if misfits:
            raise self._other_size(ingredient, misfits[0][2], misfits[0][3], len(misfits))

    def _fate(self, ingredient: Ingredient, place: Place, change: Change) -> int:
        native = ingredient.adapter.natives.get(place, place.span[0].module)
        kind = f"dora {change.inner.kind}" if isinstance(change, deltas.Magnitude) else change.kind
        self.fates.append(Fate(ingredient.name, native, place.component, kind, APPLIED))
        return len(self.fates) - 1

    def _add(self, ingredient: Ingredient, place: Place, change: Change, number: int) -> None:
        native = self.fates[number].native
        found = places_of(self.base, ingredient, place, change)
        tie = self._tie(place, change) if not found else None
        if (found or tie) and not any(ingredient.at(place, piece, native) for piece in place.span):
            # Not even a shape is changed then, nor a head parted from its embedding.
            self.fates[number] = replace(self.fates[number], what=AT_ZERO)
            return
        if tie is not None:
            before = self.base.store.tensors[tie.embedding].shape
            shape = change.shape if _grows(place, change, before) else before
            effect = Effect(ingredient, native, place, fitted(change, shape), before, shape, number)
            self.heads.setdefault(tie, []).append(effect)
        elif not found:
            self.fates[number] = replace(self.fates[number], what=ABSENT)
            self.absent.append(self.fates[number])
        for where, what in found:
            before, shape = self._shapes(where, what)
            if not isinstance(what, Reshape):
                effect = Effect(ingredient, native, where, fitted(what, shape), before, shape, number)
                require_computable(effect)
                self.effects.append(effect)

    def _tie(self, place: Place, change: Change) -> Tie | None:
        module = place.span[0].module
        if place.param != "weight" or not weight_names().is_head(module) or len(change.shape) != 2:
            return None
        return tie_of(self.base, place.component, change.shape[1], module)

    def _shapes(self, place: Place, change: Change) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape that a weight has, and the one it will have."""
        at = (place.component, place.span, place.param)
        before, keys = self.base.shape(*at), self.base.keys(*at)
        assert before is not None
        if (len(keys) == 1 and isinstance(change, Reshape)) or (
            len(keys) == 1 and self.base.family.open and _grows(place, change, before)
        ):
            self._reshape(keys[0], change.shape)
        after = self.shapes.get(keys[0], before) if len(keys) == 1 else before
        if after != before:
            self._require_plain(place, keys[0])
        return before, after

    def _widened_by(self, place: Place, change: Change) -> bool:
        """Whether the one module that does not fit is an input layer that gets more channels.

        Control and inpainting adapters widen it without saying so (diffusers v0.42.1
        loaders/lora_pipeline.py: _maybe_expand_transformer_param_shape_or_error_).
        """
        at = (place.component, place.span, place.param)
        keys, shape = self.base.keys(*at), self.base.shape(*at)
        if not isinstance(change, LowRank) or shape is None or len(keys) != 1 or len(shape) < 2:
            return False
        o, i, *kernel = change.shape
        target = (o, i, *(kernel or [1] * (len(shape) - 2)))
        if (o, target[2:]) != (shape[0], shape[2:]) or i <= shape[1]:
            return False
        self._reshape(keys[0], target)
        return True

    def _reshape(self, key: str, shape: tuple[int, ...]) -> None:
        """Give a tensor another shape, and note what its configuration has to say then."""
        before = self.base.store.tensors[key].shape
        if self.shapes.get(key, before) == shape:
            return
        tokens = before[1:] == shape[1:]
        fits = len(before) == len(shape) and all(a <= b for a, b in zip(before, shape, strict=True))
        if key in self.shapes or not (tokens or fits):
            raise Mismatch(
                f"`{key}` is {list(self.shapes.get(key, before))}, which does not become {list(shape)}",
                code="weight-shape",
                hint="the adapter was made for another model",
            )
        self.shapes[key] = shape
        component = self.base.held[key].component
        front = f"{component}/" if key.startswith(f"{component}/") else ""
        name, axis = (TOKENS, 0) if tokens else ("in_channels", 1)
        self.edits.setdefault(front, {})[name] = shape[axis]
        how = "replaced with" if tokens else "padded with zeros to"
        self.notes.append(f"`{key}`, {list(before)}, is {how} {list(shape)}: `{name}` {shape[axis]}")

    def _require_plain(self, place: Place, key: str) -> None:
        stretches = self.base.stretches(place.component, place.span, place.param) or ()
        if len(stretches) != 1 or stretches[0].transposed:
            raise Mismatch(
                f"`{key}` is kept in a form that cannot get another shape",
                code="weight-shape",
                hint="convert the base to the layout of diffusers first",
            )

    def _other_size(self, ingredient: Ingredient, number: int, error: Mismatch, count: int) -> Mismatch:
        fate = self.fates[number]
        total = sum(one.adapter == ingredient.name for one in self.fates)
        return Mismatch(
            f"{ingredient.name}: {count} of {total} changes do not fit {self.base.store.label}; "
            f"`{fate.native}`: {error.message}",
            code="weight-shape",
            hint="the adapter was made for another model, or for another size of it",
            details={**error.details, "module": fate.native, "misfits": count},
        )

    def plan(self, ingredients: tuple[Ingredient, ...]) -> BakePlan:
        shares: dict[str, list[Share]] = {}
        for effect in self.effects:
            for key, share in shares_of(self.base, effect):
                shares.setdefault(key, []).append(share)
        heads = self._heads()
        for key, (_, found) in heads.items():
            shares[key] = found
        settled = {key: self._settled(key, found) for key, found in shares.items()}
        self._note_idle(settled.values())
        tensors: dict[str, Baked] = {}
        for key in self.base.store.tensors:
            if key in settled or key in self.shapes:
                tensors[key] = self._baked(key, key, settled.get(key, ()))
            for head, (source, _) in heads.items():
                if source == key:
                    tensors[head] = self._baked(head, source, settled.get(head, ()))
        return BakePlan(self.base, ingredients, tensors, tuple(self.fates), self.edits, tuple(self.notes))

    def _heads(self) -> dict[str, tuple[str, list[Share]]]:
        """Heads that get numbers of their own: from which embedding, and what changes them."""
        ties = dict(self.heads)
        for effect in self.effects:
            if weight_names().is_embedding(effect.place.span[0].module) and len(effect.shape) == 2:
                tie = tie_of(self.base, effect.place.component, effect.shape[1])
                if tie is not None and all(tie.embedding != other.embedding for other in ties):
                    ties[tie] = []
        apart: dict[str, tuple[str, list[Share]]] = {}
        for tie, heads in ties.items():
            mine = [effect for effect in self.effects if self._keys(effect) == (tie.embedding,)]
            if (not mine and not heads) or stay_together(mine, heads):
                continue
            found = [
                Share(effect, strength, 0, 0, effect.shape[0], False)
                for effect in heads
                if (strength := effect.ingredient.at(effect.place, effect.place.span[0], effect.native))
            ]
            apart[tie.head] = (tie.embedding, found)
            self.edits.setdefault(tie.head[: tie.head.rfind("/") + 1], {})[TIED] = False
            self.notes.append(f"`{tie.head}` gets numbers of its own: it was tied to `{tie.embedding}`")
        return apart

    def _keys(self, effect: Effect) -> tuple[str, ...]:
        return self.base.keys(effect.place.component, effect.place.span, effect.place.param)

    def _baked(self, key: str, source: str, shares: tuple[Share, ...]) -> Baked:
        before = self.base.store.tensors[source]
        if before.dtype not in _FLOATS:
            raise Refused(
                f"{self.base.store.label}: `{source}` is {before.dtype}, which nothing can be added to",
                code="integer-base",
                hint="bake into the model before it was quantised",
                details={"tensor": source, "dtype": before.dtype},
            )
        own = next((share.effect.shape for share in shares if key != source), self.shapes.get(source))
        return Baked(
            key, source, before, TensorInfo(key, self.dtype or before.dtype, own or before.shape), shares
        )

    def _settled(self, key: str, shares: Sequence[Share]) -> tuple[Share, ...]:
        """The shares that hold.

        What says again what another says is left out, and so is what a replacement of another adapter
        covers. Conflict if two put different numbers in one place.
        """
        held: list[Share] = []
        for share in shares:
            if replaces(share) and len(shares) > 1 and self._is_the_base(key, share):
                # PEFT saves embeddings beside a LoRA of them, changed or not.
                continue
            rivals = [other for other in held if _collide(share, other)]
            if not all(_agree(share, other) for other in rivals):
                raise _conflict(key, share, rivals[0])
            held += [] if rivals else [share]
        winners = [share for share in held if replaces(share)]
        beaten = {share for share in held for winner in winners if _is_beaten(key, share, winner)}
        for share in beaten:
            number = share.effect.number
            self.fates[number] = replace(self.fates[number], what=OVERRULED)
        return tuple(share for share in held if share not in beaten)

    def _is_the_base(self, key: str, share: Share) -> bool:
        info = self.base.store.tensors.get(key)
        if info is None or share.effect.shape != info.shape:
            return False
        return same(share.effect.change.tensors()["value"], self.base.store.tensor(key))

    def _note_idle(self, settled: Iterable[tuple[Share, ...]]) -> None:
        """Note the changes whose every row is at strength 0."""
        working = {share.effect.number for shares in settled for share in shares}
        for effect in (*self.effects, *(effect for found in self.heads.values() for effect in found)):
            if effect.number not in working and not _is_active(effect):
                self.fates[effect.number] = replace(self.fates[effect.number], what=AT_ZERO)


def replaces(share: Share) -> bool:
    """Whether a share puts numbers in the place of all of its rows, whatever else is added there."""
    change = share.effect.change
    return isinstance(change, Whole) and change.replaces


def _is_active(effect: Effect) -> bool:
    """Whether any of its rows has a strength."""
    return any(effect.ingredient.at(effect.place, piece, effect.native) for piece in effect.place.span)


def _grows(place: Place, change: Change, before: tuple[int, ...]) -> bool:
    """Whether a replacement has another number of tokens than the base."""
    names, module = weight_names(), place.span[0].module
    of_tokens = names.is_embedding(module) or names.is_head(module)
    replaced = isinstance(change, Whole) and change.replaces and of_tokens
    return replaced and change.shape[1:] == before[1:] and change.shape[0] != before[0]


def _overlap(one: Share, two: Share) -> bool:
    return one.start < two.stop and two.start < one.stop


def _collide(one: Share, two: Share) -> bool:
    """Whether both put numbers in the place of the same rows."""
    if replaces(one) and replaces(two):
        return _overlap(one, two)
    first, second = one.effect.change, two.effect.change
    if isinstance(first, Tokens) and isinstance(second, Tokens):
        return not set(first.indices or ()).isdisjoint(second.indices or ())
    return False


def _is_beaten(key: str, share: Share, winner: Share) -> bool:
    """Whether another adapter puts numbers in the place of what a share changes; Conflict if of a part."""
    if share.effect.ingredient is winner.effect.ingredient or not _overlap(share, winner):
        return False
    if winner.start <= share.start and share.stop <= winner.stop:
        return True
    raise _conflict(key, share, winner)


def _conflict(key: str, one: Share, two: Share) -> Conflict:
    return Conflict(
        f"`{key}`: {one.effect.where} and {two.effect.where} put different numbers there",
        code="two-replacements",
        hint="bake them one after the other: the last one holds",
        details={"tensor": key, "modules": [one.effect.native, two.effect.native]},
    )


def _agree(one: Share, two: Share) -> bool:
    if (one.first, one.start, one.stop, one.strength) != (two.first, two.start, two.stop, two.strength):
        return False
    first, second = one.effect.change, two.effect.change
    if isinstance(first, Tokens) and isinstance(second, Tokens) and first.indices != second.indices:
        return False
    return all(
        same(tensor, other)
        for tensor, other in zip(first.tensors().values(), second.tensors().values(), strict=True)
    )


def _absent(building: _Building) -> Refused:
    absent = building.absent
    names = ", ".join(f"`{fate.native}`" for fate in absent[:3]) + (", …" if len(absent) > 3 else "")
    return Refused(
        f"{absent[0].adapter}: {len(absent)} of {len(building.fates)} changes are of weights that "
        f"{building.base.store.label} does not have: {names}",
        code="absent",
        hint="give the whole model, or --allow absent leaves them out",
        details={"modules": [fate.native for fate in absent]},
    )
