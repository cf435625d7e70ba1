"""Small adapters of every family, layout and kind, made from the tables: real names, seeded weights.

A network's proportions are width-free, so its inventory is taken a fraction of its size
(`small_models`); of its blocks the first, a middle and the last are kept. What stands here knows how a kind
is stored (from its definition) but nothing of how it is read, cut or written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from network_mutants import lowered
from torch import Tensor

from adapterkit.adapter import Adapter, read_adapter
from adapterkit.detect import explain
from adapterkit.errors import Json
from adapterkit.metadata import component_config, output_metadata
from adapterkit.plan import Options, Plan, make_plan
from adapterkit.specs import families as families_module
from adapterkit.specs.families import Family, Target, family
from adapterkit.specs.layouts import Layout, layouts
from adapterkit.specs.names import Network, Row, network
from adapterkit.specs.tuner_config import CONFIG_FILE, METADATA_KEY
from adapterkit.stores import Store, memory_store

FACTOR = 32
RANK = 4


@cache
def small_network(name: str) -> Network:
    return lowered(network(name), FACTOR)


@contextmanager
def small_models() -> Iterator[None]:
    """Families whose networks are FACTOR times narrower, so that shapes still tell them apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families_module, "network", small_network)
        yield


@dataclass(frozen=True)
class File:
    """What a file or folder holds: its tensors, its metadata, and the JSON files beside it."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    sidecars: dict[str, Json] = field(default_factory=dict)

    def store(self) -> Store:
        return memory_store(self.tensors, self.metadata, self.sidecars)

    def read(self, family_name: str | None = None) -> Adapter:
        store = self.store()
        return read_adapter(store, explain(store, family_name=family_name))


def converted(file: File, family_name: str | None, to: str, options: Options | None = None) -> File:
    """The file as `to` has it, in memory."""
    adapter = file.read(family_name)
    return written(make_plan(adapter, adapter.family.target(to), options))


def written(plan: Plan) -> File:
    """What a plan writes: a file, a folder with its configuration, or a folder for each component."""
    metadata = output_metadata(plan)
    if not plan.layout.folder:
        return File(dict(plan.tensors(plan.header())), metadata)
    tensors: dict[str, Tensor] = {}
    sidecars: dict[str, Json] = {}
    for component in plan.components:
        front = f"{component}/" if len(plan.components) > 1 else ""
        made = plan.tensors(plan.header(component), component)
        tensors |= {front + key: tensor for key, tensor in made}
        sidecars[front + CONFIG_FILE] = component_config(plan, component)
    return File(tensors, metadata, sidecars)


# --- the tensors of each kind ---------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """The changed weight. parts: the equal parts that its rows can be cut into."""

    shape: tuple[int, ...]
    parts: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def ones(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel)


@dataclass
class Numbers:
    """Seeded normal numbers in one dtype."""

    seed: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int, around: float = 0.0, deviation: float = 0.25) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * deviation + around
        return values.to(self.dtype)


Roles = dict[str, Tensor]
Make = Callable[[Numbers, Weight], Roles]


@dataclass(frozen=True)
class Form:
    """One way in which a kind of change is stored.

    roles: its tensors by role, of the weight; `magnitude` among them makes it a DoRA.
    of_bias: those of the module's bias, as changes of their own kind `diff`.
    takes: which weights it can change: "linear", "conv" (any kernel), "3x3", "vector".
    alpha: what stands beside it under that name: its "scale" (times the rank), a "limit" or nothing.
    """

    kind: str
    roles: Make | None
    takes: tuple[str, ...] = ("linear", "conv")
    of_bias: Make | None = None
    alpha: str = ""

    def fits(self, weight: Weight) -> bool:
        if len(weight.shape) == 1:
            return "vector" in self.takes
        if self.kind in ("oft", "boft") and weight.rows % 2:
            return False
        if not weight.kernel:
            return "linear" in self.takes
        return "conv" in self.takes or ("3x3" in self.takes and math.prod(weight.kernel) > 1)


def lora(n: Numbers, w: Weight) -> Roles:
    return {"up": n(w.rows, RANK, *w.ones), "down": n(RANK, w.columns, *w.kernel)}


def lora_mid(n: Numbers, w: Weight) -> Roles:
    mid = n(RANK, RANK, *w.kernel)
    return {"up": n(w.rows, RANK, *w.ones), "down": n(RANK, w.columns, *w.ones), "mid": mid}


def loha(n: Numbers, w: Weight) -> Roles:
    columns = math.prod(w.shape[1:])
    return {
        "w1_a": n(w.rows, RANK),
        "w1_b": n(RANK, columns),
        "w2_a": n(w.rows, RANK),
        "w2_b": n(RANK, columns),
    }


def loha_core(n: Numbers, w: Weight) -> Roles:
    halves = {
        f"w{k}_{side}": n(RANK, size) for k in (1, 2) for side, size in (("a", w.rows), ("b", w.columns))
    }
    return halves | {"t1": n(RANK, RANK, *w.kernel), "t2": n(RANK, RANK, *w.kernel)}


def lokr(n: Numbers, w: Weight, first: str = "whole", second: str = "whole") -> Roles:
    """w1 has a row for each part, or two where there is one, so that parts are made of whole blocks."""
    tall = w.parts if w.parts > 1 else _divisor(w.rows, 2)
    across = _divisor(w.columns, 2)
    rows, columns = w.rows // tall, w.columns // across
    factors = {"w1_a": n(tall, RANK), "w1_b": n(RANK, across)}
    roles = {"w1": n(tall, across)} if first == "whole" else factors
    if second == "whole":
        return roles | {"w2": n(rows, columns, *w.kernel)}
    if second == "core":
        return roles | {"w2_a": n(RANK, rows), "w2_b": n(RANK, columns), "t2": n(RANK, RANK, *w.kernel)}
    return roles | {"w2_a": n(rows, RANK), "w2_b": n(RANK, columns * math.prod(w.kernel))}


def lokr_square(n: Numbers, w: Weight) -> Roles:
    """As LyCORIS and PEFT divide a weight: as evenly as can be, the second factored where that is smaller."""
    tall, across = (max(d for d in range(1, math.isqrt(x) + 1) if x % d == 0) for x in (w.rows, w.columns))
    rows, columns = w.rows // tall, w.columns // across
    if max(rows, columns) <= 2 * RANK:
        return {"w1": n(tall, across), "w2": n(rows, columns, *w.kernel)}
    factors = {"w2_a": n(rows, RANK), "w2_b": n(RANK, columns * math.prod(w.kernel))}
    return {"w1": n(tall, across), **factors}


def glora(n: Numbers, w: Weight) -> Roles:
    return {
        "a1": n(w.columns, RANK, *w.ones),
        "a2": n(RANK, w.columns, *w.ones),
        "b1": n(w.rows, RANK, *w.ones),
        "b2": n(RANK, w.columns, *w.kernel),
    }


def oft(n: Numbers, w: Weight) -> Roles:
    size = _divisor(w.rows // w.parts, 4)
    return {"blocks": n(w.rows // size, size, size, deviation=0.1)}


def oft_rescaled(n: Numbers, w: Weight) -> Roles:
    return oft(n, w) | {"rescale": n(w.rows, 1, *w.ones, around=1.0, deviation=0.1)}


def boft(n: Numbers, w: Weight) -> Roles:
    size = 4 if w.rows % 8 == 0 else 2
    stages = 2 if w.rows % (2 * size) == 0 else 1
    return {"blocks": n(stages, w.rows // size, size, size, deviation=0.1)}


def oft_input(n: Numbers, w: Weight) -> Roles:
    return {"blocks": n(math.prod(w.shape[1:]) // 2, 1, deviation=0.1)}


def ia3(n: Numbers, w: Weight, on_input: bool = False) -> Roles:
    """As LyCORIS stores it: along axis 1 for convolutions, whichever side it scales."""
    size = w.columns if on_input else w.rows
    shape = (1, size, *w.ones) if w.kernel else (size,)
    return {"vector": n(*shape), "on_input": torch.tensor(float(on_input))}


def diff(n: Numbers, w: Weight) -> Roles:
    return {"value": n(*w.shape)}


def bias(n: Numbers, w: Weight) -> Roles:
    return {"value": n(w.rows)}


def dora(inner: Make, axis: str) -> Make:
    def make(n: Numbers, w: Weight) -> Roles:
        size = w.rows if axis == "out" else w.columns
        shape = (size, 1, *w.ones) if axis == "out" else (1, size, *w.ones)
        return inner(n, w) | {"magnitude": n(*shape, around=1.0, deviation=0.1)}

    return make


def _with(make: Callable[..., Roles], **options: object) -> Make:
    return lambda n, w: make(n, w, **options)


def _divisor(number: int, at_least: int) -> int:
    """The smallest divisor that is not below `at_least`."""
    return next(d for d in range(min(at_least, number), number + 1) if number % d == 0)


FORMS: dict[str, Form] = {
    "lora": Form("lora", lora, alpha="scale"),
    "lora with biases": Form("lora", lora, ("linear",), of_bias=bias, alpha="scale"),
    "lora, core": Form("lora", lora_mid, ("3x3",), alpha="scale"),
    "loha": Form("loha", loha, alpha="scale"),
    "loha, core": Form("loha", loha_core, ("3x3",), alpha="scale"),
    "lokr, second factored": Form("lokr", _with(lokr, second="factored"), alpha="scale"),
    "lokr, first factored": Form("lokr", _with(lokr, first="factored"), alpha="scale"),
    "lokr, both factored": Form("lokr", _with(lokr, first="factored", second="factored"), alpha="scale"),
    "lokr, core": Form("lokr", _with(lokr, second="core"), ("3x3",), alpha="scale"),
    "lokr": Form("lokr", lokr, alpha="scale"),
    "lokr, as even as can be": Form("lokr", lokr_square, alpha="scale"),
    "glora": Form("glora", glora, alpha="scale"),
    "oft": Form("oft", oft, alpha="limit"),
    "oft, rescaled": Form("oft", oft_rescaled, alpha="limit"),
    "boft": Form("boft", boft, alpha="limit"),
    "oft of columns": Form("oft_input", oft_input),
    "ia3 of rows": Form("ia3", ia3, ("linear", "conv")),
    "ia3 of columns": Form("ia3", _with(ia3, on_input=True), ("linear", "conv")),
    "diff": Form("diff", diff),
    "diff with biases": Form("diff", diff, ("linear", "conv", "vector"), of_bias=bias),
    "bias alone": Form("diff", None, ("linear", "conv", "vector"), of_bias=bias),
    "replacement": Form("set", diff),
    "dora of rows": Form("lora", dora(lora, "out"), alpha="scale"),
    "dora of columns": Form("lora", dora(lora, "in"), alpha="scale"),
    "dora of rows over loha": Form("loha", dora(loha, "out"), alpha="scale"),
    "dora of columns over lokr": Form("lokr", dora(_with(lokr, second="factored"), "in"), alpha="scale"),
}


# --- files ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A module of a file to be built: where, and which form its change has."""

    component: str
    row: Row
    form: str


def weight_of(network: Network, row: Row) -> Weight | None:
    """The weight that a row stands for; None where its parts have none (a bare parameter)."""
    shapes = [network.shapes.get(f"{piece.module}.weight") for piece in row.span]
    if row.param is not None or any(shape is None for shape in shapes):
        return None
    first = shapes[0] or ()
    rows = sum(int(shape[0] * (p.stop - p.start)) for p, shape in zip(row.span, shapes, strict=True) if shape)
    return Weight((rows, *first[1:]), sum(piece.weight for piece in row.span))


def has_bias(network: Network, row: Row) -> bool:
    return all(f"{piece.module}.bias" in network.shapes for piece in row.span)


def patterns(family: Family, target: Target) -> dict[tuple[str, str], tuple[Row, ...]]:
    """Per component and pattern of the target's names the first, a middle and the last row of a module."""
    found: dict[tuple[str, str], list[Row]] = {}
    for component, prefix in target.prefixes.items():
        known = family.network(component)
        for row in known.namings[prefix.naming].rows if known else ():
            if known and weight_of(known, row) is not None:
                found.setdefault((component, re.sub(r"\d+", "#", row.native)), []).append(row)
    return {key: (rows[0], rows[len(rows) // 2], rows[-1]) for key, rows in found.items()}


@cache
def can(layout_name: str, form_name: str, component: str, weight: Weight) -> bool:
    """Whether a layout has a name for every tensor of a form."""
    layout, form = layouts()[layout_name], FORMS[form_name]
    of_norm = len(weight.shape) == 1
    made = form.roles(Numbers(0), weight) if form.roles else {}
    for role in made:
        kind = "" if role == "magnitude" else form.kind
        spelling = layout.spelling(kind, role, "weight", component, of_norm=of_norm)
        if spelling is None and role != "on_input":
            return False
        if spelling and spelling.axis == "out" and made[role].shape[0] == 1:
            return False
    if form.of_bias is None:
        return True
    inside = layout.spelling("diff", "value", "bias", component, of_norm=of_norm)
    return inside is not None and not (inside.scaled and form.roles is None)


def build(
    family_name: str,
    to: str,
    modules: Sequence[Module],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> File:
    """A file of these modules in the target `to` of a family, with one scale (where a form has one)."""
    owner = family(family_name)[0]
    target = owner.target(to)
    layout, numbers = layouts()[target.layout], Numbers(seed, dtype)
    tensors: dict[str, Tensor] = {}
    scaled: dict[str, list[tuple[str, int]]] = {}
    front = _fronts(target, layout, [module.component for module in modules])
    for module in modules:
        network, form = owner.network(module.component), FORMS[module.form]
        assert network is not None
        weight = weight_of(network, module.row)
        assert weight is not None
        stem = front[module.component] + module.row.native.replace(".", layout.dot)
        tensors |= _spelled(stem, module, form, layout, numbers, weight)
        if form.alpha == "scale":
            scaled.setdefault(module.component, []).append((module.row.native, RANK))
        if form.alpha and target.scale == "alpha":
            alpha = layout.spelling("", "alpha", "weight", module.component)
            assert alpha is not None
            tensors[stem + alpha.suffix] = torch.tensor(scale * RANK if form.alpha == "scale" else 0.0)
    return File(tensors, *_configs(target, scaled, scale, front))


def _fronts(target: Target, layout: Layout, components: Sequence[str]) -> dict[str, str]:
    """What stands before a module's name, with the folder of its component where there are several."""
    several = layout.folder and len(set(components)) > 1
    return {c: (f"{c}/" if several else "") + target.prefixes[c].text for c in dict.fromkeys(components)}


def _spelled(
    stem: str, module: Module, form: Form, layout: Layout, numbers: Numbers, weight: Weight
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    of_norm = len(weight.shape) == 1
    made = form.roles(numbers, weight) if form.roles else {}
    for role, tensor in made.items():
        kind = "" if role == "magnitude" else form.kind
        spelling = layout.spelling(kind, role, "weight", module.component, of_norm=of_norm)
        if kind == "ia3" and layout.spelling("ia3", "on_input", "weight", "") is None:
            tensor = _as_peft_has_it(tensor, made)
            if role == "on_input":
                continue
        assert spelling is not None, (layout.name, form.kind, role)
        if role == "magnitude" and spelling.axis == "out":
            tensor = (
                tensor.reshape(1, -1, *weight.ones) if spelling.conv and weight.kernel else tensor.flatten()
            )
        tensors[stem + spelling.suffix] = tensor
    if form.of_bias is not None:
        spelling = layout.spelling("diff", "value", "bias", module.component, of_norm=of_norm)
        assert spelling is not None
        tensors[stem + spelling.suffix] = form.of_bias(numbers, weight)["value"]
    return tensors


def _as_peft_has_it(tensor: Tensor, roles: Mapping[str, Tensor]) -> Tensor:
    """PEFT multiplies where LyCORIS adds, and says by the shape what it scales."""
    vector = tensor.flatten() + 1.0
    return vector.reshape(1, -1) if bool(roles["on_input"]) else vector.reshape(-1, 1)


def _configs(
    target: Target, scaled: Mapping[str, Sequence[tuple[str, int]]], scale: float, front: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Json]]:
    """(metadata, sidecars) that say the scale, where that is their task."""
    configs = {
        component: {"peft_type": "LORA", "r": RANK, "lora_alpha": scale * RANK, "alpha": scale * RANK}
        for component in scaled
    }
    if target.scale == "lora_adapter_metadata":
        flat = {f"{component}.{key}": value for component, c in configs.items() for key, value in c.items()}
        return {"format": "pt", METADATA_KEY: json.dumps(flat)}, {}
    if target.scale == "adapter_config.json":
        folders = {c: text.partition("/")[0] + "/" if "/" in text else "" for c, text in front.items()}
        return {"format": "pt"}, {
            folders[component] + CONFIG_FILE: dict(c) for component, c in configs.items()
        }
    return {"format": "pt"}, {}


def scratch(tmp_path: Path, file: File, name: str = "adapter.safetensors") -> Path:
    """The file on disk."""
    from safetensors.torch import save_file

    path = tmp_path / name
    save_file(
        {key: tensor.contiguous() for key, tensor in file.tensors.items()}, path, metadata=file.metadata
    )
    return path
