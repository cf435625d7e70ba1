"""What a bake is asked for, opened and matched: the base, its files, and adapters that are for it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterkit.baking.files import TOKENS, BaseLayout, OutFile, layout_of, tokenizer_files
from adapterkit.checkpoint import Checkpoint, Model, model_store, open_checkpoint
from adapterkit.detect import explain
from adapterkit.errors import Json, Mismatch, Refused, Unrecognized, UsageError
from adapterkit.operations.sources import Opened, Source
from adapterkit.operations.sources import open as open_source
from adapterkit.quantized import dequantized, quantization
from adapterkit.scale import ScaleFrom
from adapterkit.specs.layouts import layouts
from adapterkit.stores import Store
from adapterkit.stores.guards import is_folder, shown

if TYPE_CHECKING:
    from adapterkit.adapter import Adapter
    from adapterkit.baking.effects import Ingredient
    from adapterkit.baking.plan import BakePlan
    from adapterkit.linalg.rounding import Rounding

Given = Union[Source, "Adapter"]
Progress = Callable[[str, int, int], None]

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3"}


@dataclass(frozen=True)
class BakeOptions:
    """How to bake; every field has a command-line option of its name.

    blocks: strengths by component, block or module ("OUTD", "IN*=0.5"), for all adapters or, with "2:"
    before it, for the second.
    dtype: "fp32", "fp16", "bf16" or "fp8", of the tensors that change; None: each keeps its own.
    rounding: "nearest", or "stochastic" with a seed.
    dequantize: read a quantised base as bf16.
    device: where to compute, such as "cuda"; None: the processor, which also stands in for a device that
    is not there.
    family: the base model, where its names do not tell.  scale_from: see `load`.
    allow: "absent", "precision", "nonfinite", "passengers", "unclaimed", "incomplete".
    hashes: tell the SHA-256 of what is written and of the adapters; without them it is quicker.
    keep_undo: write what changed beside the output, so that the base can be had back byte for byte.
    resume: go on with what an earlier run finished.
    in_place: let the output take the place of the base.  force: replace files that exist.
    """

    blocks: Sequence[str] = ()
    dtype: str | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    dequantize: bool = False
    device: str | None = None
    family: str | None = None
    scale_from: ScaleFrom | None = None
    allow: Collection[str] = field(default_factory=frozenset)
    hashes: bool = True
    keep_undo: bool = False
    resume: bool = False
    in_place: bool = False
    force: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """A bake that is settled.

    facts: what stands in the metadata of its files.  notes: what is odd about the base.
    """

    plan: BakePlan
    layout: BaseLayout
    options: BakeOptions
    facts: Mapping[str, Json]
    notes: tuple[str, ...]
    progress: Progress | None = None

    @property
    def files(self) -> tuple[OutFile, ...]:
        """The files of the output, with the tensors that they will have."""
        found: dict[str, list[str]] = {file.name: [] for file in self.layout.files}
        for key in self.plan.header:
            source = self.plan.tensors[key].source if key in self.plan.tensors else key
            found[self.layout.file_of(source).name].append(key)
        return tuple(replace(file, keys=tuple(found[file.name])) for file in self.layout.files)


def settled(base: Model, adapters: Sequence[Given | tuple[Given, float]], options: BakeOptions) -> Job:
    if options.dtype is not None and options.dtype not in _DTYPES:
        raise UsageError(f"there is no dtype `{options.dtype}`", hint=f"dtypes: {', '.join(_DTYPES)}")
    if not adapters:
        raise UsageError("nothing to bake", hint="name an adapter at least")
    given = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    with ExitStack() as stack:
        checkpoint, layout, notes = _open_base(base, options)
        if checkpoint is not base:
            stack.callback(checkpoint.close)
        found = [_matching(source, checkpoint, options, stack) for source, _ in given]
        # From here on torch is needed, which takes a while to load.
        ingredients = _ingredients(found, [strength for _, strength in given], checkpoint, options)
        from adapterkit.baking.planning import plan_bake

        dtype = _DTYPES[options.dtype] if options.dtype else None
        plan = plan_bake(checkpoint, ingredients, dtype=dtype, allow=options.allow)
        stack.pop_all()
    layout, taken = _with_tokenizers(layout, plan)
    left = [f"`{shown(name)}` is left behind: it would hold the base's weights" for name in layout.left]
    return Job(plan, layout, options, _facts(plan, options), (*notes, *left, *taken))


def _with_tokenizers(layout: BaseLayout, plan: BakePlan) -> tuple[BaseLayout, list[str]]:
    """The tokenizer of an adapter that brings more tokens, in the place of the base's."""
    added: dict[str, Path] = {}
    notes: list[str] = []
    if layout.root is None or TOKENS not in plan.edits.get("", {}):
        return layout, notes
    for one in plan.ingredients:
        path = one.adapter.store.path if one.adapter.store is not None else None
        if path is None or one not in plan.resizing:
            continue
        found = tokenizer_files(path if is_folder(path) else path.parent)
        added |= found
        notes.append(
            f"its tokens are those of `{shown(one.name)}`: {', '.join(found)}"
            if found
            else f"`{shown(one.name)}` brings tokens and no tokenizer: that of the base does not know them"
        )
    return replace(layout, added=added), notes


def _open_base(base: Model, options: BakeOptions) -> tuple[Checkpoint, BaseLayout, tuple[str, ...]]:
    if isinstance(base, Checkpoint):
        return base, layout_of(base.store), ()
    store = model_store(base)
    try:
        layout, how = layout_of(store), quantization(store)
        if how is None:
            return open_checkpoint(store, options.family), layout, store.warnings
        if not options.dequantize:
            raise Refused(
                f"{store.label}: its weights are quantised ({how}), and nothing can be added to codes",
                code="quantized",
                hint="give the model before it was quantised; --dequantize bakes into what its codes mean, "
                "in bf16",
                details={"quantization": how},
            )
        plain = dequantized(store)
        return open_checkpoint(plain, options.family), layout, (*store.warnings, f"dequantised from {how}")
    except BaseException:
        if store is not base:
            store.close()
        raise


def _matching(
    source: Given, base: Checkpoint, options: BakeOptions, stack: ExitStack
) -> Union[Opened, Adapter]:
    """An adapter, explained as one for the base. Mismatch if it is for another model.

    An adapter of some parts only may be for several models: the base's if it knows as much of it as any.
    """
    if not isinstance(source, Opened | Store | str | Path | Mapping):
        if source.family is not base.family:
            raise _other_model("the adapter", source.family.label, base)
        return source
    opened = open_source(source)
    if opened is not source and opened.store is not source:
        stack.callback(opened.close)
    own = opened.explanation
    if own.family is base.family:
        return opened
    try:
        other = explain(opened.store, family_name=base.family.key)
    except Unrecognized:
        raise _other_model(opened.store.label, own.family.label, base) from None
    if len(other.unclaimed) > len(own.unclaimed) or len(other.misfits) > len(own.misfits):
        raise _other_model(opened.store.label, own.family.label, base)
    return Opened(opened.store, other)


def _other_model(label: str, model: str, base: Checkpoint) -> Mismatch:
    return Mismatch(
        f"{label} is for {model}, and {base.store.label} is {base.family.label}",
        code="base-family",
        hint="give the base that the adapter was trained on; --family says which it is, if it was taken "
        "for another",
        details={"adapter": model, "base": base.family.key},
    )


def _ingredients(
    found: Sequence[Union[Opened, Adapter]],
    strengths: Sequence[float],
    base: Checkpoint,
    options: BakeOptions,
) -> list[Ingredient]:
    from adapterkit.baking.effects import Ingredient
    from adapterkit.selection import modules_of
    from adapterkit.strengths import parse_strengths, specs_of

    specs = specs_of(options.blocks, len(found))
    ingredients: list[Ingredient] = []
    for position, (one, strength) in enumerate(zip(found, strengths, strict=True)):
        if not math.isfinite(strength):
            raise UsageError(
                f"a strength of {strength} is no number", code="strength-value", hint="write a finite number"
            )
        adapter = _loaded(one, options)
        modules = [
            module
            for place in adapter.changes
            for module in modules_of(place, adapter.natives.get(place, ""))
        ]
        parsed = tuple(parse_strengths(spec, base.family, modules) for spec in specs[position])
        ingredients.append(Ingredient(_name(adapter, position, found), adapter, strength, parsed))
    return ingredients


def _loaded(one: Union[Opened, Adapter], options: BakeOptions) -> Adapter:
    if not isinstance(one, Opened):
        return one
    adapter = one.load(allow=options.allow, scale_from=options.scale_from)
    label = one.store.label
    for tuner in adapter.tuners.values():
        if tuner.needs_itself is not None:
            raise Refused(
                f"{label}: `{tuner.needs_itself}` of its configuration says that its tensors alone are "
                "another change",
                code="config-needed",
                hint="let PEFT convert it to a plain LoRA first",
                details={"field": tuner.needs_itself},
            )
    shared = {
        key for name in adapter.layouts for keys in layouts()[name].shared.values() for key in keys.values()
    }
    strangers = [key for key in adapter.passengers if key not in shared]
    if strangers and "passengers" not in options.allow:
        names = ", ".join(f"`{name}`" for name in strangers[:3])
        raise Refused(
            f"{label}: {len(strangers)} tensors are no part of the adapter: {names}",
            code="passengers",
            hint="a base model has no place for them; --allow passengers leaves them out",
            details={"keys": list[Json](strangers)},
        )
    return adapter


def _name(adapter: Adapter, position: int, found: Sequence[object]) -> str:
    path = adapter.store.path if adapter.store is not None else None
    if path is not None:
        return shown(path.name)
    return "the adapter" if len(found) == 1 else f"adapter {position + 1}"


def _facts(plan: BakePlan, options: BakeOptions) -> dict[str, Json]:
    """What stands in the metadata: names without folders, and no dates."""
    path = plan.base.store.path
    facts: dict[str, Json] = {
        "base": shown(path.name) if path is not None else None,
        "adapters": [
            {
                "name": one.name,
                "strength": one.strength,
                "sha256": list[Json](_hashes(one.adapter.store, options)),
            }
            for one in plan.ingredients
        ],
        "blocks": list[Json](options.blocks),
    }
    if options.rounding != "nearest":
        facts |= {"rounding": options.rounding, "seed": options.seed}
    return facts


def _hashes(store: Store | None, options: BakeOptions) -> Iterator[str]:
    for _, file in store.files() if store is not None and options.hashes else ():
        if file.path is not None:
            with file.path.open("rb") as stream:
                yield hashlib.file_digest(stream, "sha256").hexdigest()
