"""Slices as the libraries themselves load and compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle_law import silence, weights

import adapterkit
from adapterkit import SliceOptions, plan_slice
from adapterkit.operations.sources import load

pytestmark = pytest.mark.oracle

CASES = (
    *("lora", "rslora", "patterns", "dora", "whole modules", "loha", "lokr", "lokr, both", "ia3"),
    *("oft", "oft, shared", "boft", "adalora", "vera", "transposed layers"),
)


SCALED = ("rslora", "patterns", "loha", "lokr", "ia3", "vera", "transposed layers")


def check_part(name: str, folder: Path, options: SliceOptions, inside: float, outside: float) -> None:
    """PEFT merges the first layer's changes and those of the others at these strengths."""
    oracle = pytest.importorskip("test_oracle_peft")
    case = oracle.CASES[name]
    wrapped = oracle.adapted(case)
    oracle.save(wrapped, folder / "whole")
    adapterkit.slice(folder / "whole", folder / "part", options)
    with silence():
        found = oracle.merged(oracle.applied(case, folder / "part"))
    before, after = weights(oracle.model(case.model)), oracle.merged(wrapped)
    changed = 0
    for key, weight in before.items():
        first = f".{first_layer(name)}." in key
        expected = weight + (inside if first else outside) * (after[key] - weight)
        size = float((after[key] - weight).norm()) or 1.0
        assert float((found[key] - expected).norm()) <= 2e-5 * size, key
        changed += first and not torch.equal(after[key], weight)
    assert changed


def first_layer(name: str) -> str:
    return "h.0" if name == "transposed layers" else "layers.0"


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_a_part_and_changes_that_part_only(name: str, tmp_path: Path) -> None:
    check_part(name, tmp_path, SliceOptions(keep=[first_layer(name)]), 1.0, 0.0)


@pytest.mark.parametrize("name", SCALED)
def test_peft_applies_the_strengths(name: str, tmp_path: Path) -> None:
    check_part(name, tmp_path, SliceOptions(scale=f"model=-0.5,{first_layer(name)}=0.3"), 0.3, -0.5)


@pytest.mark.parametrize("ranks", [4, 8])
def test_first_ranks_are_to_all_ranks_as_lycoris_trains_them(ranks: int, tmp_path: Path) -> None:
    """LyCORIS multiplies by alpha over the blocks in use; a file is read with alpha over its ranks."""
    dylora = pytest.importorskip("lycoris.modules.dylora")
    layer = torch.nn.Linear(16, 16, bias=False)
    module = dylora.DyLoraModule(
        "lora_unet_mid_block_attentions_0_proj_in", layer, lora_dim=12, alpha=3, block_size=4
    )
    with torch.no_grad():
        for up in module.up_list:
            up.normal_()
    tensors = {
        f"{module.lora_name}.{key}": value.detach().clone()
        for key, value in module.custom_state_dict().items()
    }
    options = SliceOptions(first_ranks=ranks, trained_by="lycoris", family="sd1")

    def theirs(used: int) -> torch.Tensor:
        # With `rank` LyCORIS uses the blocks below it and one more.
        delta, _ = module.get_diff_weight(rank=used - module.block_size)
        return delta.detach()

    (found,) = load(plan_slice(tensors, options).plan.state_dict(), family="sd1").changes.values()
    (whole,) = load(tensors, family="sd1").changes.values()
    ratio = float(whole[0].dense().norm() / theirs(12).norm())
    assert torch.allclose(found[0].dense().flatten(1), ratio * theirs(ranks), rtol=1e-5, atol=1e-6)
