"""The plan of a bake: what becomes of every tensor of the base, told before a byte is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from adapterkit.baking.effects import Ingredient, Share
from adapterkit.baking.survival import Kept
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import Whole
from adapterkit.errors import Json, Refused
from adapterkit.plan import is_finite
from adapterkit.stores import TensorInfo

# What became of a change.
APPLIED, ABSENT, AT_ZERO, OVERRULED = "applied", "absent", "at strength 0", "replaced"


@dataclass(frozen=True)
class Fate:
    """What became of one change of an adapter.

    what: "applied", "absent" (the base has no such weight; by consent), "at strength 0", or "replaced"
    (another change puts numbers in the place of those that it would change).
    """

    adapter: str
    native: str
    component: str
    kind: str
    what: str


@dataclass(frozen=True, eq=False)
class Baked:
    """A tensor of the output that is another than the base's.

    key: its name.  source: the base's tensor that it is made from: another one for a head that was tied.
    before, after: the two as headers describe them.
    """

    key: str
    source: str
    before: TensorInfo
    after: TensorInfo
    shares: tuple[Share, ...]


@dataclass(frozen=True, eq=False)
class BakePlan:
    """Everything that a bake will do.

    tensors: what changes, by key, in the base's order; all others stay as they are, byte for byte.
    fates: of every change of every adapter.  edits: fields of configurations that are no longer true, by
    what stands before their component's keys.
    """

    base: Checkpoint
    ingredients: tuple[Ingredient, ...]
    tensors: Mapping[str, Baked]
    fates: tuple[Fate, ...]
    edits: Mapping[str, Mapping[str, Json]]
    notes: tuple[str, ...]

    @property
    def new(self) -> dict[str, Baked]:
        """Tensors that the base does not have, by the one that each is made from."""
        return {each.source: each for key, each in self.tensors.items() if key not in self.base.store.tensors}

    @property
    def resizing(self) -> set[Ingredient]:
        """The adapters that bring another number of tokens than the base has."""
        effects = (share.effect for each in self.tensors.values() for share in each.shares)
        return {
            one.ingredient
            for one in effects
            if isinstance(one.change, Whole) and one.change.replaces and one.change.shape != one.before
        }

    @property
    def header(self) -> dict[str, TensorInfo]:
        """Every tensor of the output, new ones after those that they are made from."""
        found: dict[str, TensorInfo] = {}
        new = self.new
        for key, info in self.base.store.tensors.items():
            found[key] = self.tensors[key].after if key in self.tensors else info
            if key in new:
                found[new[key].key] = new[key].after
        return found

    @property
    def changed(self) -> int:
        """How many of the base's tensors change."""
        return sum(key in self.base.store.tensors for key in self.tensors)

    @property
    def untouched(self) -> int:
        """How many of the base's tensors stay as they are."""
        return len(self.base.store.tensors) - self.changed

    @property
    def outcomes(self) -> Counter[str]:
        """How many changes came to what; together they are all changes of all adapters."""
        return Counter(fate.what for fate in self.fates)

    @property
    def size(self) -> int:
        """Bytes of the output's tensors."""
        return sum(info.nbytes for info in self.header.values())

    @property
    def memory(self) -> int:
        """Bytes that will be held at once, about: the adapters, and a few of the largest tensors."""
        stores = (one.adapter.store for one in self.ingredients)
        held = sum(store.size for store in stores if store is not None)
        largest = max((each.after.elements for each in self.tensors.values()), default=0)
        return held + 12 * largest

    def require_finite(self) -> None:
        """Refused if a number of an adapter is none; reads what is to be baked."""
        effects = dict.fromkeys(share.effect for each in self.tensors.values() for share in each.shares)
        for effect in effects:
            for role, tensor in effect.change.tensors().items():
                if not is_finite(tensor):
                    raise Refused(
                        f"{effect.where}: numbers of `{role}` are not finite",
                        code="nonfinite",
                        hint="the adapter is damaged; --allow nonfinite bakes it all the same",
                        details={"module": effect.native, "adapter": effect.ingredient.name},
                    )


def together(parts: Collection[Kept]) -> Kept:
    """What is left of several changes, as of one."""
    wanted = math.fsum(part.norm**2 for part in parts)
    numbers, too_large = sum(part.numbers for part in parts), sum(part.beyond for part in parts)
    if not wanted > 0:
        return Kept(1.0, 1.0, 0.0, numbers, too_large)
    common = math.fsum(part.ratio * part.norm**2 for part in parts)
    given = math.fsum((part.ratio * part.norm / part.cosine) ** 2 for part in parts if part.cosine)
    cosine = common / math.sqrt(wanted * given) if given else 0.0
    return Kept(common / wanted, cosine, math.sqrt(wanted), numbers, too_large)
