"""The one way from a file's tensors, by role, to a change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from adapterkit.deltas.change import Change
from adapterkit.deltas.experts import ExpertsLowRank
from adapterkit.deltas.factored import AdaLora, TLora, Vera
from adapterkit.deltas.glora import Glora
from adapterkit.deltas.hadamard import Hadamard
from adapterkit.deltas.kronecker import Kronecker
from adapterkit.deltas.low_rank import EmbeddingLowRank, LowRank
from adapterkit.deltas.magnitude import Axis, Magnitude
from adapterkit.deltas.rotation import EmbeddingRotation, InputButterfly, InputRotation, Rotation
from adapterkit.deltas.scaling import Scaling
from adapterkit.deltas.whole import Reshape, Tokens, Whole
from adapterkit.errors import UsageError
from adapterkit.specs.kinds import KINDS

CLASSES: dict[str, type[Change]] = {
    "lora": LowRank,
    "embedding": EmbeddingLowRank,
    "experts": ExpertsLowRank,
    "loha": Hadamard,
    "lokr": Kronecker,
    "glora": Glora,
    "oft": Rotation,
    "boft": Rotation,
    "oft_input": InputRotation,
    "oft_embedding": EmbeddingRotation,
    "boft_input": InputButterfly,
    "ia3": Scaling,
    "diff": Whole,
    "set": Whole,
    "reshape": Reshape,
    "adalora": AdaLora,
    "tlora": TLora,
    "vera": Vera,
    "tokens": Tokens,
}


def build(
    kind: str,
    roles: Mapping[str, Tensor],
    *,
    scale: float = 1.0,
    weight_shape: tuple[int, ...] | None = None,
    **facts: object,
) -> Change:
    """The change that these tensors make, checked against each other and against the weight's shape.

    kind: a key of `KINDS`; roles: its tensors, and the modifiers `magnitude` and `scalar` if there are.
    scale: what multiplies the change (alpha / rank and the like).
    weight_shape: of the changed weight, where it is known; it tells the sides of flattened kernels.
    facts: other fields of the kind's class, from a configuration: `count`, `constraint`, `block_share`,
    `cayley_neumann`, `terms`, `inverse`, `additive`, `on_input`, `initial_rank`, `shared_a`, `shared_b`,
    `indices`; and `axis` ("out" or "in") of a magnitude.

    Raises Mismatch with both shapes where two tensors, or they and the weight, do not fit; UsageError
    for a role or fact that the kind does not have, or a scale where none is used.
    """
    if kind not in KINDS:
        raise UsageError(f"no kind of change is called `{kind}`", code="kind")
    tensors = dict(roles)
    magnitude, scalar = tensors.pop("magnitude", None), tensors.pop("scalar", None)
    if scalar is not None:
        scale *= float(scalar)
    axis = facts.pop("axis", None)
    change = _plain(kind, tensors, scale, weight_shape, facts)
    if weight_shape is not None:
        change._check_weight(tuple(weight_shape))
    if magnitude is None:
        return change
    if axis not in ("out", "in", None):
        raise UsageError(f"a magnitude is along `out` or `in`, not `{axis}`", code="axis")
    return Magnitude(change, magnitude.reshape(-1), axis or magnitude_axis(magnitude))


def magnitude_axis(magnitude: Tensor) -> Axis:
    """Which lengths a stored magnitude holds, where its name does not tell.

    LyCORIS writes (o, 1, …) for rows and (1, i, …) for columns; one axis is rows wherever seen.
    """
    return "in" if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.numel() > 1 else "out"


def _plain(
    kind: str,
    tensors: Mapping[str, Tensor],
    scale: float,
    weight_shape: tuple[int, ...] | None,
    facts: Mapping[str, object],
) -> Change:
    title, constructor = KINDS[kind].title, CLASSES[kind]
    _check_roles(kind, tensors)
    fields = {field.name: field for field in dataclasses.fields(constructor)}
    names = {field.metadata.get("role", name): name for name, field in fields.items()}
    values: dict[str, object] = {names[role]: tensor for role, tensor in _ordered(kind, tensors).items()}
    unknown = sorted(set(facts) - set(fields))
    if unknown:
        raise UsageError(f"{title} has no `{unknown[0]}`", code="fact", details={"facts": list(unknown)})
    values.update(facts)
    if "scale" in fields:
        values["scale"] = scale
    elif scale != 1.0:
        raise UsageError(f"{title} has no scale, and {scale} was given", code="scale")
    if "weight_shape" in fields and weight_shape is not None:
        values["weight_shape"] = tuple(weight_shape)
    if kind == "set":
        values["replaces"] = True
    if kind == "ia3":
        values.setdefault("additive", "on_input" in tensors)
        values.setdefault("on_input", _is_on_input(tensors, weight_shape, facts))
    return constructor(**values)


def _check_roles(kind: str, tensors: Mapping[str, Tensor]) -> None:
    known = KINDS[kind]
    given = set(tensors)
    if given <= known.roles and any(required <= given for required in known.required):
        return
    required = " or ".join(", ".join(sorted(roles)) for roles in known.required)
    raise UsageError(
        f"{known.title} is made of {required}, not of {', '.join(sorted(given)) or 'nothing'}",
        code="roles",
        details={"kind": kind, "roles": [*sorted(given)]},
    )


def _ordered(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GLoRA's first files called the up factors down: there a1 is (r, i) and b1 (r, i).

    ComfyUI tells them apart by the same shapes (`comfy/weight_adapter/glora.py`).
    """
    ordered = dict(tensors)
    if kind != "glora" or "bm" in ordered or any(tensor.ndim < 2 for tensor in ordered.values()):
        return ordered
    a1, a2, b1, b2 = (ordered[role].shape for role in ("a1", "a2", "b1", "b2"))
    is_new = a1[1] == a2[0] == b1[1] == b2[0]
    is_old = a1[0] == a2[1] == b1[0] == b2[1]
    if is_old and not is_new:
        ordered.update(a1=tensors["a2"], a2=tensors["a1"], b1=tensors["b2"], b2=tensors["b1"])
    return ordered


def _is_on_input(
    tensors: Mapping[str, Tensor], weight_shape: tuple[int, ...] | None, facts: Mapping[str, object]
) -> bool:
    """Whether a vector scales the input: LyCORIS stores that, PEFT's (1, i) and (o, 1) tell it."""
    vector, flag = tensors["vector"], tensors.get("on_input")
    if "on_input" in facts:
        return bool(facts["on_input"])
    if flag is not None:
        return bool(flag)
    if vector.ndim == 2 and vector.numel() > 1:
        return vector.shape[0] == 1
    fitting = [axis for axis, size in enumerate((weight_shape or ())[:2]) if size == vector.numel()]
    if len(fitting) != 1:
        raise UsageError(
            f"whether an IA³ vector of {vector.numel()} scales rows or columns is not said", code="fact"
        )
    return fitting == [1]
