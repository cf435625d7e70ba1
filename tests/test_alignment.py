"""Every change on the rows of a target's tensors, and which target a file itself is."""

from __future__ import annotations

import pytest
import torch
from manifests import manifests, materialise, read_manifest

from adapterkit import load
from adapterkit.alignment import aligned, own_target
from adapterkit.compare import differences
from adapterkit.plan import make_plan
from adapterkit.specs.layouts import layouts
from adapterkit.stores import memory_store

FILES = [path.stem for path in manifests() if not path.stem.endswith("_full")]


def _adapter(name: str):
    manifest = read_manifest(name)
    return load(memory_store(materialise(manifest), manifest.metadata, manifest.sidecars))


@pytest.mark.parametrize("name", FILES)
def test_an_adapter_lies_on_the_lines_of_its_own_target(name):
    adapter = _adapter(name)
    moved = aligned(adapter, own_target(adapter))
    assert moved.changes.keys() == adapter.changes.keys()
    for place, changes in adapter.changes.items():
        assert all(ours is theirs for ours, theirs in zip(moved.changes[place], changes, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_the_own_target_names_the_modules_of_the_main_network_as_the_file_does(name):
    """Text encoders have two spellings in one layout, of which one is written."""
    adapter = _adapter(name)
    target = own_target(adapter)
    main = adapter.components[0]
    prefix, dot = target.prefixes[main], layouts()[target.layout].dot
    names = adapter.family.names(main, prefix.naming)
    for place, native in adapter.natives.items():
        if place.component == main:
            row = names.at(place.span, place.param)
            assert row is not None and native.endswith(row.native.replace(".", dot))


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("diffusers_flux_meta", "kohya"),
        ("diffusers_flux_dora", "comfyui"),
        ("diffusers_sd3_meta", "kohya"),
        ("diffusers_sdxl_meta", "kohya"),
    ],
)
def test_aligning_to_other_lines_keeps_the_change(name, to):
    adapter = _adapter(name)
    target = adapter.family.target(to)
    moved = aligned(adapter, target)
    assert max(d.error for d in differences(adapter, moved, sample=24)) < 1e-6
    plan = make_plan(moved, target)
    assert all(module.cut.renames for module in plan.modules)


@pytest.mark.parametrize(
    ("native", "target"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "kohya"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "kohya-diffusers"),
        ("lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lycoris"),
    ],
)
def test_a_variation_of_a_layout_is_its_own_target_where_the_names_are_its_names(native, target):
    up, down = torch.ones(640, 4), torch.ones(4, 640)
    adapter = load({f"{native}.lora_up.weight": up, f"{native}.lora_down.weight": down}, family="sdxl")
    assert own_target(adapter).name == target
