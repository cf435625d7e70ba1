"""Baking and conversion commute, for every kind of change and every layout of a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import pytest
import torch
from adapters import FORMS, Module, build, can, converted, patterns, small_models, weight_of
from checkpoints import tensors_of
from torch import Tensor

from adapterkit.adapter import Adapter
from adapterkit.checkpoint import Checkpoint, open_checkpoint
from adapterkit.deltas import Magnitude, Scaling
from adapterkit.errors import Unrepresentable
from adapterkit.operations.bake import BakeOptions, bake
from adapterkit.plan import Options
from adapterkit.specs.families import family
from adapterkit.specs.names import Row


class Base(NamedTuple):
    """A family's large component: its canonical naming, and the one of original files."""

    family: str
    component: str
    network: str
    canonical: str
    text: str
    native: str


BASES = [
    Base("sd1", "unet", "unet_sd15", "diffusers", "model.diffusion_model.", "ldm"),
    Base("sdxl", "unet", "unet_sdxl", "diffusers", "model.diffusion_model.", "ldm"),
    Base("flux1", "transformer", "flux1", "diffusers", "model.diffusion_model.", "bfl"),
]

# q, k and v stacked, and a projection that is kept transposed.
OPENCLIP = Base("sdxl", "text_encoder_2", "clip", "hf", "conditioner.embedders.1.model.", "openclip")


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with small_models():
        yield


@cache
def everything(base: Base) -> dict[str, Tensor]:
    """Every tensor of the component, in its canonical naming, seeded."""
    network = family(base.family)[0].network(base.component)
    assert network is not None
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, row, param in tensors_of(network, base.canonical):
        shape = network.stacked_shape(row.span)
        assert shape is not None
        size = shape[:1] if param == "bias" else shape
        found[name] = torch.randn(size, generator=generator) * 0.1 + (0.5 if len(size) == 1 else 0.0)
    return found


def part(base: Base, chosen: Sequence[Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that some modules are of, and one more, in both namings."""
    network = family(base.family)[0].network(base.component)
    assert network is not None
    naming = network.namings[base.native]
    names = {piece.module for module in chosen for piece in module.row.span}
    native = [row for name in names for row in naming.covering(name)]
    native += naming.rows[-1:]
    wanted = {piece.module for row in native for piece in row.span}
    here = {name: t for name, t in everything(base).items() if {name, name.rpartition(".")[0]} & wanted}
    return here, in_native(base, here)


def in_native(base: Base, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    network = family(base.family)[0].network(base.component)
    assert network is not None
    found = {}
    with open_checkpoint(dict(tensors), base.family) as source:
        for name, row, param in tensors_of(network, base.native):
            tensor = source.tensor(base.component, row.span, param)
            if tensor is not None:
                found[base.text + name] = tensor.clone()
    return found


@cache
def rows(base: Base, to: str) -> tuple[Row, ...]:
    target = family(base.family)[0].target(to)
    found = patterns(family(base.family)[0], target).items()
    return tuple(row for (component, _), several in found if component == base.component for row in several)


def modules(base: Base, to: str, form: str) -> list[Module]:
    """Up to four modules, each of another kind of layer, that can have the form."""
    owner = family(base.family)[0]
    network = owner.network(base.component)
    assert network is not None
    found: dict[tuple[int, int], Module] = {}
    for row in rows(base, to):
        weight = weight_of(network, row)
        assert weight is not None
        layout = owner.target(to).layout
        if FORMS[form].fits(weight) and can(layout, form, base.component, weight):
            found.setdefault((len(weight.shape), len(row.span)), Module(base.component, row, form))
    return list(found.values())[:4]


def expected(
    base: Base, tensors: Mapping[str, Tensor], adapter: Adapter, strength: float
) -> dict[str, Tensor]:
    """The definition in double: the base's rows and what a change makes of them."""
    ground = {name: tensor.double() for name, tensor in tensors.items()}
    result = {name: tensor.clone() for name, tensor in ground.items()}
    with open_checkpoint(ground, base.family) as before, open_checkpoint(result, base.family) as after:
        for place, changes in adapter.changes.items():
            at = (place.component, place.span, place.param)
            weight = before.tensor(*at)
            assert weight is not None
            for change in changes:
                delta = strength * change.dense(weight, torch.float64)
                _add(after, at, delta)
                if isinstance(change, Scaling) and not change.additive and not change.on_input:
                    bias = before.tensor(place.component, place.span, "bias")
                    if bias is not None:
                        factor = change.vector.double().flatten() - 1
                        _add(after, (*at[:2], "bias"), strength * bias * factor)
    return result


def _add(after: Checkpoint, at: tuple[str, tuple[object, ...], str], delta: Tensor) -> None:
    first = 0
    for stretch in after.stretches(*at) or ():  # type: ignore[arg-type]
        part = after.store.tensor(stretch.key)
        height = stretch.stop - stretch.start
        (part.T if stretch.transposed else part)[stretch.start : stretch.stop] += delta[
            first : first + height
        ]
        first += height


def worst(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((t.double() - two[name].double()).abs().max()) for name, t in one.items())


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.family)
@pytest.mark.parametrize("form", FORMS)
def test_a_bake_is_its_definition_in_every_layout_of_the_base(base: Base, form: str) -> None:
    chosen = modules(base, "kohya", form)
    if not chosen:
        pytest.skip("kohya files cannot say it of this model")
    file = build(base.family, "kohya", chosen, seed=5, scale=0.5)
    adapter = file.read(base.family)
    options = BakeOptions(family=base.family)
    tensors, native = part(base, chosen)
    here = bake(tensors, [(adapter, 0.6)], options=options)
    assert worst(here.tensors, expected(base, tensors, adapter, 0.6)) < 2e-6
    there = bake(native, [(adapter, 0.6)], options=options)
    assert worst(there.tensors, in_native(base, here.tensors)) < 2e-6
    assert here.plan.outcomes["applied"] == here.plan.outcomes.total()
    untouched = [name for name in tensors if name not in here.plan.tensors]
    assert untouched
    assert all(here.tensors[name] is tensors[name] for name in untouched)


@pytest.mark.parametrize("form", FORMS)
def test_a_bake_into_openclip_is_one_into_clip(form: str) -> None:
    owner = family(OPENCLIP.family)[0]
    network = owner.network(OPENCLIP.component)
    assert network is not None
    ends = (
        "layers.16.self_attn.q_proj",
        "layers.16.self_attn.v_proj",
        "layers.16.mlp.fc1",
        "text_projection",
    )
    found = {row: weight_of(network, row) for row in rows(OPENCLIP, "kohya") if row.native.endswith(ends)}
    chosen = [
        Module(OPENCLIP.component, row, form)
        for row, weight in found.items()
        if weight is not None
        and FORMS[form].fits(weight)
        and can(owner.target("kohya").layout, form, OPENCLIP.component, weight)
    ]
    if "bias" in form:
        chosen = [module for module in chosen if "projection" not in module.row.native]
    if not chosen:
        pytest.skip("kohya files cannot say it of this model")
    adapter = build(OPENCLIP.family, "kohya", chosen, seed=8, scale=0.5).read(OPENCLIP.family)
    options = BakeOptions(family=OPENCLIP.family)
    tensors, native = part(OPENCLIP, chosen)
    here = bake(tensors, [(adapter, 0.6)], options=options)
    assert worst(here.tensors, expected(OPENCLIP, tensors, adapter, 0.6)) < 2e-6
    there = bake(native, [(adapter, 0.6)], options=options)
    assert worst(there.tensors, in_native(OPENCLIP, here.tensors)) < 2e-6
    assert any("in_proj" in key for key in there.plan.tensors)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.family)
@pytest.mark.parametrize("form", FORMS)
def test_baking_commutes_with_conversion(base: Base, form: str) -> None:
    chosen = modules(base, "kohya", form)
    if not chosen:
        pytest.skip("kohya files cannot say it of this model")
    file = build(base.family, "kohya", chosen, seed=6, scale=0.5)
    try:
        other = converted(file, base.family, "comfyui", Options())
    except Unrepresentable:
        pytest.skip("ComfyUI files cannot say it")
    options = BakeOptions(family=base.family)
    tensors, _ = part(base, chosen)
    one = bake(tensors, [file.store()], options=options)
    two = bake(tensors, [other.store()], options=options)
    assert worst(one.tensors, two.tensors) < 2e-6


def test_magnitudes_hold_against_the_base_that_nothing_was_added_to() -> None:
    base = BASES[0]
    chosen = modules(base, "kohya", "dora of rows")
    dora = build("sd1", "kohya", chosen, seed=1).read("sd1")
    lora = build("sd1", "kohya", [Module(m.component, m.row, "lora") for m in chosen], seed=2).read("sd1")
    assert all(isinstance(change, Magnitude) for several in dora.changes.values() for change in several)
    tensors, _ = part(base, chosen)
    both = bake(tensors, [dora, (lora, 0.5)], options=BakeOptions(family="sd1"))
    alone = bake(tensors, [dora], options=BakeOptions(family="sd1"))
    added = bake(dict(alone.tensors), [(lora, 0.5)], options=BakeOptions(family="sd1"))
    assert worst(both.tensors, added.tensors) < 2e-6


def test_rows_that_nothing_changes_get_the_dtype_of_the_others_of_their_tensor() -> None:
    base = BASES[2]
    chosen = [
        Module(base.component, row, "lora")
        for row in rows(base, "diffusers")
        if row.native.endswith("attn.to_q")
    ][:2]
    adapter = build(base.family, "diffusers", chosen, seed=4).read(base.family)
    _, native = part(base, chosen)
    halves = {name: tensor.half() for name, tensor in native.items()}
    wide = {name: tensor.float() for name, tensor in halves.items()}
    one = bake(halves, [adapter], options=BakeOptions(family=base.family, dtype="fp32"))
    two = bake(wide, [adapter], options=BakeOptions(family=base.family))
    changed = [*one.plan.tensors]
    heights = [(each.after.shape[0], share) for each in one.plan.tensors.values() for share in each.shares]
    assert any(share.stop - share.start < height for height, share in heights)
    assert all(one.tensors[name].dtype == torch.float32 for name in changed)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in changed)


def test_parts_of_one_change_have_strengths_of_their_own() -> None:
    """A LoRA over q, k and v as one, of which k is left out and v halved."""
    base = BASES[2]
    fused = [row for row in rows(base, "kohya") if row.native.endswith("double_blocks.0.img_attn.qkv")]
    assert [len(row.span) for row in fused] == [3]
    file = build(base.family, "kohya", [Module(base.component, fused[0], "lora")], seed=4)
    adapter = file.read(base.family)
    tensors, native = part(base, [Module(base.component, fused[0], "lora")])
    q, k, v = (piece.module for piece in fused[0].span)
    blocks = [f"{k}=0,{v}=0.5"]
    wanted = expected(base, tensors, adapter, 1.0)
    for name, share in ((k, 0.0), (v, 0.5)):
        before = tensors[f"{name}.weight"].double()
        wanted[f"{name}.weight"] = before.lerp(wanted[f"{name}.weight"], share)
    options = BakeOptions(family=base.family, blocks=blocks)
    here = bake(tensors, [adapter], options=options)
    assert worst(here.tensors, wanted) < 2e-6
    there = bake(native, [adapter], options=options)
    assert worst(there.tensors, in_native(base, here.tensors)) < 2e-6
    assert f"{q}.weight" in here.plan.tensors
    assert f"{k}.weight" not in here.plan.tensors
