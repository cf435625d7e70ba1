"""The base back from what was baked: its very bits, where they were kept, or nearly, by subtracting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.baking.undo import apply_undo
from adapterkit.errors import AdapterkitError, Refused, StoreError
from adapterkit.operations.bake import BakeOptions, bake, plan_baking
from adapterkit.operations.bake_inputs import Given, Progress
from adapterkit.specs.kinds import KINDS
from adapterkit.stores import Written, open_store
from adapterkit.stores.guards import beside, is_file, shown

if TYPE_CHECKING:
    from adapterkit.baking.plan import BakePlan
    from adapterkit.operations.bake_files import Baking

UNDO_SUFFIX = ".undo"
# What adapterkit.baking.undo writes for the format of its files.
UNDO_FORMAT = "adapterkit-undo"


@dataclass(frozen=True)
class Restoring:
    """files: the base's files that came back byte for byte; whatever else there is was copied."""

    undo: Path
    files: Mapping[str, Written]


def undo_of(baked: str | Path) -> Path | None:
    """The undo file that baking left beside its output, if it is there."""
    found = beside(Path(baked), UNDO_SUFFIX)
    return found if is_file(found) else None


def is_undo_file(path: str | Path) -> bool:
    """Whether a file was written by `keep_undo`."""
    try:
        with open_store(path) as store:
            return store.metadata.get("format") == UNDO_FORMAT
    except AdapterkitError:
        return False


def restore(
    baked: str | Path, undo: str | Path | None, output: str | Path, *, force: bool = False
) -> Restoring:
    """Write the base that was baked into, byte for byte.

    undo: the file that `keep_undo` left; None: the one beside `baked`.
    Raises StoreError if there is none, if it belongs to something else, or is damaged.
    """
    found = Path(undo) if undo is not None else undo_of(baked)
    if found is None:
        raise StoreError(
            f"{shown(baked)}: there is no `{shown(beside(Path(baked), UNDO_SUFFIX).name)}` beside it",
            code="no-file",
            hint="name the undo file, or the adapters with their strengths, which are then subtracted",
        )
    return Restoring(found, apply_undo(Path(baked), found, Path(output), overwrite=force))


def subtract(
    baked: str | Path,
    adapters: Sequence[tuple[Given, float]],
    output: str | Path,
    options: BakeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Baking:
    """Take adapters away again that were baked in at these strengths, up to rounding.

    Raises Refused for changes that depend on the weight or replace it: what they were made from is gone.
    """
    taken = [(one, -strength) for one, strength in adapters]
    options = options or BakeOptions()
    require_additive(plan_baking(baked, taken, options))
    return bake(baked, taken, output, options, progress=progress)


def require_additive(plan: BakePlan) -> None:
    """Refused unless every change is the same whatever it is added to."""
    for fate in plan.fates:
        kind = fate.kind.removeprefix("dora ")
        if fate.kind != kind or KINDS[kind].needs_base:
            raise Refused(
                f"{fate.adapter}: `{fate.native}` depends on the weight that it changes, or replaces it",
                code="not-additive",
                hint="only an undo file gives the base back; --keep-undo writes one",
                details={"module": fate.native, "kind": fate.kind},
            )


def error_of(done: Baking) -> float:
    """How far the result can be from the base, relative to the changes: two roundings, of bake and this."""
    total = done.total
    if not total.cosine:
        return 1.0
    noise = (total.ratio / total.cosine) ** 2 - 2 * total.ratio + 1
    return math.sqrt(2 * max(0.0, noise))


__all__ = ["Restoring", "error_of", "is_undo_file", "require_additive", "restore", "subtract", "undo_of"]
