"""bake: a base model with the changes of adapters in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint import Model
from adapterkit.errors import StoreError
from adapterkit.operations.bake_inputs import BakeOptions, Given, Job, Progress, settled
from adapterkit.stores.guards import shown

if TYPE_CHECKING:
    from adapterkit.baking.plan import BakePlan
    from adapterkit.operations.bake_files import Baking

__all__ = ["BakeOptions", "bake", "plan_baking"]


def plan_baking(
    base: Model, adapters: Sequence[Given | tuple[Given, float]], options: BakeOptions | None = None
) -> BakePlan:
    """What `bake` would do, with every error that it would raise before writing, from headers.

    Raises what `bake` raises, but for numbers that are not finite and what rounding loses.
    """
    return settled(base, adapters, options or BakeOptions()).plan


def bake(
    base: Model,
    adapters: Sequence[Given | tuple[Given, float]],
    output: str | Path | None = None,
    options: BakeOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Baking:
    """Write base + Σ strength · change in the base's own files, or compute it in memory.

    base: a file, a folder of diffusers or transformers, an index of shards, or a state dict.
    adapters: in any format, each alone or with its strength.
    output: a file for a file, a folder for a folder; None: `Baking.tensors` are the result.
    Everything is summed in float32 and rounded once. What depends on the weight (DoRA, OFT, IA³) is
    computed from the base's own; replacements hold against everything else. Nothing is written unless
    everything can be. Raises Mismatch if an adapter is for another model, Refused for what needs consent
    (see `BakeOptions.allow`), Conflict, and StoreError.
    """
    options = options or BakeOptions()
    job = replace(settled(base, adapters, options), progress=progress)
    if "nonfinite" not in options.allow:
        job.plan.require_finite()
    from adapterkit.operations.bake_files import in_memory, write_file, write_folder

    if output is None:
        return in_memory(job)
    path = Path(output)
    _require_another(job, path)
    return write_file(job, path) if job.layout.root is None else write_folder(job, path)


def _require_another(job: Job, output: Path) -> None:
    """StoreError if the output is the base or an adapter, by whatever name; the base may be asked for."""
    stores = [one.adapter.store for one in job.plan.ingredients]
    adapters = [store.path for store in stores if store is not None]
    base = [job.plan.base.store.path, job.layout.root]
    for path in (*base, *adapters):
        try:
            same = path is not None and output.samefile(path)
        except (OSError, ValueError):
            continue
        if same and not (path in base and job.options.in_place):
            raise StoreError(
                f"{shown(output)}: is the {'base' if path in base else 'adapter'} itself",
                code="exists",
                hint="choose another name; --in-place lets the result take the place of the base",
            )
