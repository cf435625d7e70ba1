"""Merges beside PEFT's own, and what peft and diffusers make of ours."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from oracle_kohya import FILES, Trained, train
from oracle_law import randomise, relative
from safetensors.torch import save_file
from test_oracle_diffusers import NAMES, check_loads, pipeline
from torch import Tensor, nn

from adapterkit import ConvertOptions, MergeOptions, convert, merge
from adapterkit.ranks import RankRule

pytestmark = pytest.mark.oracle

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMED = ["first", "second"]
STRENGTHS = [0.7, 0.4]
Deltas = dict[str, Tensor]


@cache
def base() -> nn.Module:
    return models.llama()


def config(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings})


def two(folder: Path, *configs: Any) -> tuple[Any, list[Path]]:
    """A model with adapters called as in NAMED, and the folders they are saved in."""
    wrapped = peft.get_peft_model(copy.deepcopy(base()), configs[0], adapter_name=NAMED[0])
    names = NAMED[: len(configs)]
    for name, one in zip(names[1:], configs[1:], strict=True):
        wrapped.add_adapter(name, one)
    randomise(wrapped, seed=3, chosen=lambda name: "lora_" in name)
    wrapped.save_pretrained(str(folder))
    return wrapped, [folder / name for name in names]


def deltas(wrapped: Any, adapter: str) -> Deltas:
    """What PEFT adds to each weight."""
    return {
        name: module.get_delta_weight(adapter).detach().double()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.lora_A
    }


def weighted(wrapped: Any, strengths: Sequence[float]) -> Deltas:
    """The sum that was asked for, from first principles."""
    total: Deltas = {}
    for name, strength in zip(NAMED, strengths, strict=True):
        for module, delta in deltas(wrapped, name).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + strength * delta
    return total


def theirs(wrapped: Any, how: str, strengths: Sequence[float] = STRENGTHS, **settings: Any) -> Deltas:
    names = NAMED[: len(strengths)]
    wrapped.add_weighted_adapter(names, list(strengths), "merged", combination_type=how, **settings)
    return deltas(wrapped, "merged")


def ours(folders: Sequence[Path], output: Path, strengths: Sequence[float] = STRENGTHS, **settings) -> Deltas:
    """Merged by us, loaded by PEFT."""
    rule = settings.pop("rule", None)
    merge(folders, strengths, output, rule, MergeOptions(**settings))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base()), str(output))
    return deltas(loaded, "default")


def error(found: Deltas, wanted: Deltas) -> float:
    assert found.keys() == wanted.keys()
    return max(relative(found[name], wanted[name]) for name in wanted)


def test_linear_is_pefts_cat(tmp_path) -> None:
    wrapped, folders = two(tmp_path, config(), config(r=2, lora_alpha=3))
    wanted = weighted(wrapped, STRENGTHS)
    found = ours(folders, tmp_path / "out")
    assert error(found, wanted) < 1e-6 and error(theirs(wrapped, "cat"), wanted) < 1e-6


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_svd_is_pefts_svd(rank, tmp_path) -> None:
    wrapped, folders = two(tmp_path, config(), config())
    found = ours(folders, tmp_path / "out", method="svd", rule=RankRule(rank=rank))
    assert error(found, theirs(wrapped, "svd", svd_rank=rank)) < 1e-5


def test_ties_is_pefts_ties_svd_where_it_divides_by_the_count(tmp_path) -> None:
    """PEFT elects signs without strengths, so they are 1 here."""
    wrapped, folders = two(tmp_path, config(), config())
    settings = {"method": "ties", "divide": "count", "density": 0.4, "rule": RankRule(rank=16)}
    found = ours(folders, tmp_path / "out", [1.0, 1.0], **settings)
    wanted = theirs(wrapped, "ties_svd", [1.0, 1.0], density=0.4, svd_rank=16)
    assert error(found, wanted) < 1e-5


def test_magnitude_is_pefts_magnitude_prune_svd(tmp_path) -> None:
    wrapped, folders = two(tmp_path, config(), config())
    found = ours(folders, tmp_path / "out", method="magnitude", density=0.4, rule=RankRule(rank=16))
    wanted = theirs(wrapped, "magnitude_prune_svd", density=0.4, svd_rank=16)
    assert error(found, wanted) < 1e-5


def test_pefts_linear_adds_factors_and_so_makes_another_change(tmp_path) -> None:
    """(√w₁ B₁ + √w₂ B₂)(√w₁ A₁ + √w₂ A₂) has the terms B₁A₂ and B₂A₁, which nobody asked for."""
    wrapped, folders = two(tmp_path, config(), config())
    wanted = weighted(wrapped, STRENGTHS)
    assert error(theirs(wrapped, "linear"), wanted) > 0.5
    assert error(ours(folders, tmp_path / "out"), wanted) < 1e-6


def test_pefts_ties_on_factors_is_not_ties_of_the_deltas(tmp_path) -> None:
    wrapped, _ = two(tmp_path, config(), config())
    on_deltas = theirs(wrapped, "ties_svd", [1.0, 1.0], density=0.5, svd_rank=16)
    wrapped.delete_adapter("merged")
    assert error(theirs(wrapped, "ties", [1.0, 1.0], density=0.5), on_deltas) > 0.5


def test_rank_stabilised_scales_are_folded_and_not_applied_again(tmp_path) -> None:
    """PEFT's result inherits use_rslora with alpha = rank, and so is √rank times too strong."""
    stabilised = config(use_rslora=True)
    wrapped, folders = two(tmp_path, stabilised, stabilised)
    wanted = weighted(wrapped, STRENGTHS)
    found = ours(folders, tmp_path / "out")
    assert error(found, wanted) < 1e-6
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text()).get("use_rslora")
    their = theirs(wrapped, "cat")
    over = {name: delta * math.sqrt(8) for name, delta in wanted.items()}
    assert error(their, over) < 1e-6


@pytest.mark.parametrize("method", ["linear", "svd", "dare", "knots", "tsv", "core", "iso-c"])
def test_adapters_of_other_modules_ranks_and_signs_merge_and_load(method, tmp_path) -> None:
    settings = config(target_modules=["q_proj", "up_proj"], r=3, rank_pattern={"up_proj": 5})
    wrapped, folders = two(tmp_path, config(), settings)
    found = ours(folders, tmp_path / "out", [0.8, -0.3], method=method, rule=RankRule(rank=32))
    wanted = weighted(wrapped, [0.8, -0.3])
    assert found.keys() == wanted.keys()
    if method in ("linear", "svd"):
        assert error(found, wanted) < 1e-5


def test_a_sum_with_loha_loads_as_lora(tmp_path) -> None:
    wrapped, (first, _) = two(tmp_path, config(), config())
    other = peft.get_peft_model(copy.deepcopy(base()), peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS))
    randomise(other, seed=5, chosen=lambda name: "hada_" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(str(tmp_path / "loha"))
    wanted = weighted(wrapped, [0.5, 0.0])
    for name, module in other.named_modules():
        if hasattr(module, "hada_w1_a"):
            wanted[name] = wanted[name] + 0.25 * module.get_delta_weight("default").detach().double()
    found = ours([first, tmp_path / "loha"], tmp_path / "out", [0.5, 0.25])
    assert error(found, wanted) < 1e-6


# --- diffusers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux", "sd3"])
@pytest.mark.parametrize("method", ["linear", "svd"])
def test_a_kohya_and_a_diffusers_file_become_one_that_diffusers_applies(family, method, tmp_path) -> None:
    """Fused weights of one, parts of the other; ranks, alphas and convolutions as they come."""
    pipe = pipeline(family)
    first, second = (train(pipe, FILES[family], seed=seed) for seed in (0, 1))
    for name, trained in (("a", first), ("b", second)):
        save_file(trained.tensors, tmp_path / f"{name}.safetensors")
    other = tmp_path / "b_diffusers.safetensors"
    convert(tmp_path / "b.safetensors", "diffusers", other, ConvertOptions(family=NAMES[family]))
    path = tmp_path / "merged.safetensors"
    rule = RankRule() if method == "linear" else RankRule(rank=64)
    settings = MergeOptions(method=method, to="diffusers", family=NAMES[family], verify="full")
    done = merge([tmp_path / "a.safetensors", other], [0.8, -0.3], path, rule, settings)
    assert done.measured < 1e-6
    wanted = {}
    for name, weight in first.weights.items():
        component, _, full = name.partition(":")
        before = dict(_weights(pipe, component))[full]
        wanted[name] = before + 0.8 * (weight - before) - 0.3 * (second.weights[name] - before)
    check_loads(family, path, Trained({}, wanted))


def _weights(pipe: Any, component: str) -> dict[str, Tensor]:
    from oracle_kohya import canonical
    from oracle_law import weights

    model = getattr(pipe, component)
    return dict(canonical(model, weights(model)))
