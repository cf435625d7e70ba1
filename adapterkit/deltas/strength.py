"""A change at another strength than the one it was trained at."""

from __future__ import annotations

import math
from dataclasses import replace

from adapterkit.deltas.change import Change
from adapterkit.deltas.factored import Vera
from adapterkit.deltas.scaling import Scaling
from adapterkit.deltas.tensors import computing_dtype, rescaled
from adapterkit.deltas.whole import Reshape, Whole
from adapterkit.errors import Unrepresentable, UsageError


def at_strength(change: Change, strength: float) -> Change | None:
    """The change whose delta is `strength` times this one's; None where nothing is left, at 0.

    The strength goes into the scale of the kinds that have one, so that no tensor is touched; IA³ and
    VeRA have none, and their vectors are rounded once.
    Raises Unrepresentable for kinds whose delta at another strength is none of their own (DoRA,
    rotations, replacements), UsageError for a strength that is no number.
    """
    if not math.isfinite(strength):
        raise UsageError(f"a strength of {strength} is no number", code="strength-value")
    if strength == 1.0:
        return change
    if strength == 0.0:
        return None
    match change:
        case Scaling():
            return _scaling(change, strength)
        case Vera():
            return replace(change, b=rescaled(change.b, strength))
        case Reshape():
            # Against the widened weight its delta is zero, at any strength.
            return change
        case Whole(replaces=True):
            raise _refusal(change, strength)
    scale: float | None = getattr(change, "scale", None)
    if scale is None:
        raise _refusal(change, strength)
    return change._with({"scale": scale * strength})


def _scaling(change: Scaling, strength: float) -> Scaling:
    """IA³ at a strength: what it adds is multiplied, whether it is stored as w or as 1 + w."""
    if change.additive:
        return replace(change, vector=rescaled(change.vector, strength))
    # In float32 at least: beside 1, half precision has no room for a small w.
    vector = change.vector.to(computing_dtype(change.vector))
    return replace(change, vector=1.0 + strength * (vector - 1.0))


def _refusal(change: Change, strength: float) -> Unrepresentable:
    return Unrepresentable(
        f"{change._title} cannot say itself at strength {strength:g}: it is not linear in its strength",
        code="strength",
        hint="strengths 0 and 1 are exact: give it one of these, or bake the adapter into its base",
        details={"kind": change.kind, "strength": strength},
    )
