"""What the other tests stand on: the manifests say what files hold, and the small models fit them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from manifests import FOLDER, Manifest, manifests, materialise, read_manifest
from models import MODELS, llama
from torch import nn

PEFT_MANIFESTS = [path.stem for path in manifests() if path.stem.startswith("peft_")]


def test_every_manifest_has_its_row_in_the_readme() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+\.txt) \|.*\| (\d+) \|", readme, re.MULTILINE)
    assert rows == [(path.name, str(len(read_manifest(path).tensors))) for path in manifests()]


@pytest.mark.parametrize("path", manifests(), ids=lambda path: path.stem)
def test_a_manifest_is_read_line_by_line(path: Path) -> None:
    manifest = read_manifest(path)
    text = path.read_text(encoding="utf-8")
    lines = [f"{t.name} {t.dtype} {'x'.join(map(str, t.shape)) or 'scalar'}" for t in manifest.tensors]
    assert lines and set(lines) <= set(text.splitlines())
    assert len(manifest.names) == len(lines) == text.count(" F32 ")
    assert "format" in manifest.metadata or "ss_network_dim" in manifest.metadata


def test_weights_come_from_the_seed_alone() -> None:
    manifest = read_manifest("peft_llama_lora")
    first, again, other = (materialise(manifest, seed, torch.bfloat16) for seed in (1, 1, 2))
    assert {t.name: t.shape for t in manifest.tensors} == {name: tuple(t.shape) for name, t in first.items()}
    assert all(
        torch.equal(first[name], again[name]) and first[name].dtype == torch.bfloat16 for name in first
    )
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.oracle
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_is_made_from_the_seed_alone(build: Callable[..., nn.Module]) -> None:
    before = torch.random.get_rng_state()
    first, again = build(1).state_dict(), build(1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", PEFT_MANIFESTS)
def test_peft_loads_what_the_manifest_lists(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    manifest = read_manifest(name)
    weights = materialise(manifest)
    save_as_peft(manifest, weights, tmp_path)
    model = peft.PeftModel.from_pretrained(model_of(manifest), tmp_path)
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def save_as_peft(manifest: Manifest, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "adapter_model.safetensors", metadata=manifest.metadata)
    for name, value in manifest.sidecars.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def model_of(manifest: Manifest) -> nn.Module:
    name = manifest.header.partition("model: llm:")[2].removesuffix(" (reduced width)")
    return llama(tied=True) if name == "llama-tied" else MODELS[name]()
