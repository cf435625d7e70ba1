"""Spelling: the tensors and keys that a change has in a layout.

The counterpart of reading in `adapterkit.adapter`, from the same tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.deltas import Change, LowRank, Magnitude, Scaling, Whole
from adapterkit.errors import Unrepresentable
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import Layout, ScaleHome, Spelling


@dataclass(frozen=True, slots=True)
class Site:
    """Where a change is to be written.

    native: the module's full name in the target, prefix included.
    of_norm: its weight is a vector.  wrapped: another kind of change wraps it.
    beside: the scale of the module's own LoRA, which applies to a bias inside the same layer; None
    if it has none.  biased: the model's module has a bias.  unused_alpha: what stands beside factors
    without a rank, where readers want an alpha and do not use it (LyCORIS fails without, v4.1.3
    lycoris/modules/lokr.py make_module_from_state_dict).  dtype: of the written factors; None: as stored.
    named: `native` is a tensor's own full name, not a module's.  kernel: of the model's layer, () if
    it is linear, None if it is not known.
    """

    layout: Layout
    component: str
    native: str
    param: str
    scale_home: ScaleHome
    of_norm: bool = False
    wrapped: bool = False
    beside: float | None = None
    biased: bool = False
    unused_alpha: float = 1.0
    dtype: torch.dtype | None = None
    named: bool = False
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Spelled:
    """tensors: by key.  scale: what a config must say of the module, if it is the scale's home.

    exact: nothing was rounded.  note: why, if something was.
    """

    tensors: dict[str, Tensor]
    kind: str
    rank: int | None = None
    scale: float | None = None
    exact: bool = True


def spell(change: Change, site: Site) -> Spelled:
    """The tensors of one change, by their keys in the site's layout.

    Raises Unrepresentable, naming the option that would help, if the layout has no words for it.
    """
    inner, magnitude = (change.inner, change) if isinstance(change, Magnitude) else (change, None)
    kind = _kind(inner, site)
    inner, scale, exact = _home_for_scale(inner, kind, site)
    roles, kept = _role_tensors(inner, site)
    tensors = {}
    for role, tensor in roles.items():
        spelling = _spelling(kind, role, site)
        stored = tensor.T if spelling.axes in {"r o", "i r"} else tensor
        tensors[site.native + spelling.suffix] = _cast(stored, kind, site.dtype)
    if scale is not None and site.scale_home == "alpha":
        alpha = site.unused_alpha if inner.rank is None else scale * inner.rank
        tensors[site.native + _modifier("alpha", site).suffix] = _scalar(alpha)
    if (limit := getattr(inner, "constraint", None)) is not None:
        tensors[site.native + _modifier("alpha", site).suffix] = _scalar(limit)
    if magnitude is not None:
        spelling = _modifier("magnitude", site)
        tensors[site.native + spelling.suffix] = _shaped(magnitude, spelling, site.kernel)
    return Spelled(tensors, kind, inner.rank, scale, exact and kept)


def _kind(inner: Change, site: Site) -> str:
    """The kind under which the layout writes this change."""
    written = site.layout.kinds()
    if _can(inner.kind, site):
        return inner.kind
    # Where no embeddings are set apart, their LoRA is one like any other.
    if inner.kind == "embedding" and "lora" in written:
        return "lora"
    expands = type(inner).low_rank is not Change.low_rank and inner.kind != "lora" and "lora" in written
    raise Unrepresentable(
        f"{site.layout.title} has no form for {KINDS[inner.kind].title} (`{site.native}`, {site.param})",
        code="no-such-kind",
        hint="--as lora expands it exactly to low rank"
        if expands
        else "--allow untranslatable leaves it out; another format keeps it",
        details={"module": site.native, "kind": inner.kind, "layout": site.layout.name},
    )


def _can(kind: str, site: Site) -> bool:
    return any(
        all(_find(kind, role, site) is not None for role in required) for required in KINDS[kind].required
    )


def _find(kind: str, role: str, site: Site) -> Spelling | None:
    if site.layout.bare and site.named and kind == "set":
        return Spelling(kind, role, suffix="")
    # A tensor with a name of its own takes the suffixes of weights, whatever it is in its module.
    param = "bias" if site.param == "bias" else "weight"
    return site.layout.spelling(kind, role, param, site.component, of_norm=site.of_norm, wrapped=site.wrapped)


def _spelling(kind: str, role: str, site: Site) -> Spelling:
    found = _find(kind, role, site)
    if found is None:
        raise Unrepresentable(
            f"{site.layout.title} has no name for `{role}` of {KINDS[kind].title} (`{site.native}`)",
            code="no-such-role",
            hint="--as lora expands it exactly to low rank",
            details={"module": site.native, "kind": kind, "role": role},
        )
    return found


def _modifier(name: str, site: Site) -> Spelling:
    found = site.layout.spelling("", name, "weight", site.component)
    if found is None:
        raise Unrepresentable(
            f"{site.layout.title} has no name for the {name} of `{site.native}`",
            code=f"no-{name}",
            hint="--allow magnitude writes it as plain LoRA, which is another change"
            if name == "magnitude"
            else "",
            details={"module": site.native},
        )
    return found


def _home_for_scale(inner: Change, kind: str, site: Site) -> tuple[Change, float | None, bool]:
    """The change as it is written, the scale that goes elsewhere, and whether nothing is rounded."""
    if isinstance(inner, Whole):
        spelling = _spelling(kind, "value", site)
        if not spelling.scaled:
            folded, exact = deltas.fold_closely(inner)
            return folded, None, exact
        if not site.beside:
            raise Unrepresentable(
                f"{site.layout.title} has a bias only beside a LoRA, and `{site.native}` has none",
                code="bias-alone",
                hint="kohya and ComfyUI files can say it; --allow untranslatable leaves it out",
                details={"module": site.native},
            )
        folded, exact = deltas.fold_closely(replace(inner, scale=inner.scale / site.beside))
        return folded, None, exact
    scale = getattr(inner, "scale", None)
    if scale is None or not KINDS[kind].scales:
        return inner, None, True
    # Readers ignore the alpha of factors without a rank (an undecomposed LoKr); PEFT does not.
    if site.scale_home == "none" or (site.scale_home == "alpha" and inner.rank is None):
        folded, exact = deltas.fold_closely(inner)
        return folded, 1.0, exact
    return inner, float(scale), True


def _role_tensors(inner: Change, site: Site) -> tuple[dict[str, Tensor], bool]:
    """The tensors by role, and whether nothing was rounded."""
    if isinstance(inner, Scaling):
        return _scaling(inner, site)
    if isinstance(inner, LowRank) and site.kernel is not None:
        return _as_the_layer(inner, site.kernel), True
    return inner.tensors(), True


def _as_the_layer(inner: LowRank, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """The factors with the axes of the model's layer, for loaders that build their layers first.

    Files have 1×1 convolutions as matrices, linear layers as 1×1 convolutions, and flattened kernels.
    """
    tensors, size = inner.tensors(), math.prod(kernel)
    fits = math.prod(inner.kernel) in (1, size) and inner.down[0].numel() % size == 0
    if inner.mid is not None or not fits:
        return tensors
    up = inner.up.reshape(*inner.up.shape[:2], *[1] * len(kernel))
    return {**tensors, "up": up, "down": inner.down.reshape(inner.rank, -1, *kernel)}


def _scaling(inner: Scaling, site: Site) -> tuple[dict[str, Tensor], bool]:
    """IA³ as the layout has it: LyCORIS adds W · w and keeps a flag, PEFT multiplies by l = 1 + w."""
    keeps_flag = _find("ia3", "on_input", site) is not None
    if inner.additive is keeps_flag:
        return inner.tensors(), True
    if site.biased and not inner.on_input:
        raise Unrepresentable(
            f"PEFT's IA³ scales the bias of `{site.native}` as well, LyCORIS's does not",
            code="ia3-bias",
            hint="keep the format it has, or bake it into the base",
            details={"module": site.native},
        )
    shift = -1.0 if keeps_flag else 1.0
    # In float32 whatever it was: beside 1, half precision has no room for a small w.
    vector = (inner.vector.to(torch.float32) + shift).reshape(-1)
    if keeps_flag:
        return {"vector": vector, "on_input": torch.tensor(float(inner.on_input))}, False
    return {"vector": vector.reshape(1, -1) if inner.on_input else vector.reshape(-1, 1)}, False


def _shaped(magnitude: Magnitude, spelling: Spelling, kernel: tuple[int, ...] | None) -> Tensor:
    """The magnitude's vector with the axes of length 1 that the layout writes around it."""
    vector, dims = magnitude.vector, max(len(magnitude.shape), magnitude.axes, 2)
    if spelling.axis == "by shape":
        if magnitude.axis == "out":
            return vector.reshape(-1, *[1] * (dims - 1))
        return vector.reshape(1, -1, *[1] * (dims - 2))
    if magnitude.axis == "in" and magnitude.inner.kind != "embedding":
        raise Unrepresentable(
            "its DoRA magnitudes run along the input, which this format cannot say",
            code="magnitude-axis",
            hint="kohya and ComfyUI files can; or bake the adapter into its base",
        )
    if kernel is not None:
        dims = 2 + len(kernel)
    if spelling.conv and dims > 2:
        return vector.reshape(1, -1, *[1] * (dims - 2))
    return vector


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _cast(tensor: Tensor, kind: str, dtype: torch.dtype | None) -> Tensor:
    """A factor in `dtype`.

    Vectors stay as they are: they are small, and IA³'s numbers, like DoRA's magnitudes, act on the
    base's whole weight, so that rounding them would move it by more than the adapter does.
    """
    if dtype is None or not tensor.is_floating_point() or tensor.ndim < 2 or kind == "ia3":
        return tensor
    return tensor.to(dtype)
