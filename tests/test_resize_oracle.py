"""Resized adapters as PEFT and diffusers load them: the best change of the new rank, without a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle_law import silence, weights
from safetensors.torch import save_file
from torch import Tensor

import adapterkit
from adapterkit import RankRule, ResizeOptions

pytestmark = pytest.mark.oracle

PLAIN = (
    "lora",
    "rslora",
    "patterns",
    "transposed layers",
    "an embedding",
    "encoder and decoder",
    "a mixture",
)
OTHERS = ("loha", "lokr", "lokr, both", "lokr, whole", "adalora", "vera")


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix.double().flatten(1), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(matrix.shape)


@pytest.mark.parametrize("name", PLAIN + OTHERS)
def test_peft_loads_the_best_change_of_the_rank(name: str, tmp_path: Path) -> None:
    oracle = pytest.importorskip("test_oracle_peft")
    case = oracle.CASES[name]
    wrapped = oracle.adapted(case)
    oracle.save(wrapped, tmp_path / "whole")
    done = adapterkit.resize(tmp_path / "whole", tmp_path / "small", RankRule(rank=2))
    with silence():
        found = oracle.merged(oracle.applied(case, tmp_path / "small"))
    before, after = weights(oracle.model(case.model)), oracle.merged(wrapped)
    changed, left, whole = 0, 0.0, 0.0
    for key, weight in before.items():
        delta = after[key] - weight
        expected = best(delta, 2) if delta.ndim > 1 else delta
        size = float(delta.norm()) or 1.0
        assert float((found[key] - weight - expected).norm()) <= 2e-5 * size, key
        left += float((found[key] - after[key]).double().square().sum())
        whole += float(delta.double().square().sum())
        changed += bool(delta.any())
    assert changed
    assert done.measured == pytest.approx((left / whole) ** 0.5, abs=1e-4)


@pytest.mark.parametrize("name", ["dora", "transposed layers, dora", "an embedding, dora"])
def test_peft_makes_of_a_resized_dora_a_weight_nearer_than_plain_truncation_would(
    name: str, tmp_path: Path
) -> None:
    """Truncating the factors and leaving the magnitudes is what there is to beat."""
    oracle = pytest.importorskip("test_oracle_peft")
    case = oracle.CASES[name]
    wrapped = oracle.adapted(case)
    oracle.save(wrapped, tmp_path / "whole")
    base = weights(oracle.model(case.model))
    done = adapterkit.resize(
        tmp_path / "whole", tmp_path / "small", RankRule(rank=2), ResizeOptions(base=dict(base))
    )
    plain = _truncated(tmp_path / "whole", tmp_path / "plain")
    after = oracle.merged(wrapped)
    errors = []
    for folder in (tmp_path / "small", plain):
        with silence():
            found = oracle.merged(oracle.applied(case, folder))
        squares = [
            (
                (found[key] - after[key]).double().square().sum(),
                (after[key] - base[key]).double().square().sum(),
            )
            for key in base
        ]
        errors.append(float((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5))
    assert errors[0] < errors[1]
    assert done.measured == pytest.approx(errors[0], rel=1e-3)


def _truncated(source: Path, target: Path) -> Path:
    """Each pair of factors cut to its best rank 2, all else as it was."""
    import json
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(("lora_A.weight", "lora_embedding_A"))]:
        other = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        u, s, vt = torch.linalg.svd(tensors[other].double() @ tensors[key].double(), full_matrices=False)
        tensors[other] = (u[:, :2] * s[:2].sqrt()).float().contiguous()
        tensors[key] = (s[:2, None].sqrt() * vt[:2]).float().contiguous()
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads((target / "adapter_config.json").read_text())
    config |= {"lora_alpha": 2 * config["lora_alpha"] / config["r"], "r": 2}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_diffusers_loads_the_best_change_of_the_rank(family: str, tmp_path: Path) -> None:
    """Convolutions and linear layers; FLUX's fused layers are cut before they are truncated."""
    oracle = pytest.importorskip("test_oracle_diffusers")
    names = oracle.denoiser_only(oracle.FILES[family])
    trained = oracle.train(oracle.pipeline(family), names)
    save_file(trained.tensors, tmp_path / "kohya.safetensors")
    options = ResizeOptions(to="diffusers", family=oracle.NAMES[family])
    adapterkit.resize(
        tmp_path / "kohya.safetensors", tmp_path / "small.safetensors", RankRule(rank=1), options
    )
    component = oracle.COMPONENTS[family][0]
    model = getattr(oracle.pipeline(family), component)
    with oracle.with_adapter(family, tmp_path, "small.safetensors") as pipe:
        found = dict(oracle.canonical(model, oracle.merged(getattr(pipe, component))))
    changed = 0
    for name, before in oracle.canonical(model, weights(model)):
        expected = trained.weights.get(f"{component}:{name}", before) - before
        if before.ndim > 1:
            expected = best(expected, 1)
        error = float((found[name] - before - expected).norm())
        assert error <= 2e-5 * (float(expected.norm()) or 1.0), name
        changed += bool(expected.any())
    assert changed
