"""Heads that share the numbers of an embedding: when they go on doing so, and when they get their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bake_cases import adapter, base_tensors, loaded, lora, model_folder, numbers
from torch import Tensor

from adapterkit.errors import Refused
from adapterkit.operations.bake import bake

WORDS, HEAD = "model.embed_tokens", "lm_head"
FRONT = "base_model.model."


def tied(folder: Path, **config: object) -> tuple[Path, dict[str, Tensor]]:
    """A base without a head of its own, and with an embedding of places that is as wide and shorter."""
    tensors = base_tensors(torch.float32)
    del tensors["lm_head.weight"]
    tensors["model.embed_positions.weight"] = numbers(6, 8, seed=70)
    return model_folder(folder, tensors, **{"tie_word_embeddings": True, **config}), tensors


def head(rank: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    down, up = numbers(rank, 8, seed=5), numbers(12, rank, seed=6)
    return {
        f"{FRONT}{HEAD}.lora_A.weight": down,
        f"{FRONT}{HEAD}.lora_B.weight": up,
    }, 1.5 * up @ down


def test_a_head_that_is_changed_begins_as_the_embedding_of_words(tmp_path: Path) -> None:
    base, tensors = tied(tmp_path / "base")
    factors, delta = head()
    bake(base, [adapter(tmp_path / "a", {**lora(1), **factors})], tmp_path / "out")
    after = loaded(tmp_path / "out")
    assert torch.allclose(after["lm_head.weight"], tensors[f"{WORDS}.weight"] + delta, atol=1e-6)
    assert torch.equal(after[f"{WORDS}.weight"], tensors[f"{WORDS}.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_base_that_ties_nothing_has_no_head_to_change(tmp_path: Path) -> None:
    base, _ = tied(tmp_path / "base", tie_word_embeddings=False)
    with pytest.raises(Refused) as error:
        bake(base, [adapter(tmp_path / "a", {**lora(1), **head()[0]})], tmp_path / "out")
    assert error.value.code == "absent"


def test_rows_of_tokens_are_for_the_head_as_well(tmp_path: Path) -> None:
    base, tensors = tied(tmp_path / "base")
    rows = numbers(2, 8, seed=8)
    tokens = adapter(
        tmp_path / "tokens",
        {f"{FRONT}{WORDS}.token_adapter.trainable_tokens_delta": rows},
        peft_type="TRAINABLE_TOKENS",
        token_indices=[7, 2],
        target_modules=["embed_tokens"],
    )
    done = bake(base, [tokens], tmp_path / "out")
    after = loaded(tmp_path / "out")
    assert after.keys() == tensors.keys()
    assert torch.equal(after[f"{WORDS}.weight"][[7, 2]], rows)
    assert not done.plan.edits


def test_an_embedding_that_is_saved_unchanged_beside_its_lora_replaces_nothing(tmp_path: Path) -> None:
    """PEFT saves it with any LoRA of an embedding."""
    tensors = base_tensors(torch.float32)
    base, word = model_folder(tmp_path / "base", tensors), f"{FRONT}{WORDS}"
    paths, wanted = [], tensors[f"{WORDS}.weight"].clone()
    for index in (1, 2):
        down, up = numbers(2, 12, seed=index), numbers(8, 2, seed=10 + index)
        factors = {f"{word}.lora_embedding_A": down, f"{word}.lora_embedding_B": up}
        wanted += 1.5 * (up @ down).T
        saved = {f"{word}.base_layer.weight": tensors[f"{WORDS}.weight"].clone()}
        paths.append(adapter(tmp_path / f"a{index}", {**lora(index), **factors, **saved}))
    bake(base, paths, tmp_path / "out")
    assert torch.allclose(loaded(tmp_path / "out")[f"{WORDS}.weight"], wanted, atol=1e-5)
