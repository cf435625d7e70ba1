"""Several changes of one weight: their turn, their strength, their rows, and their chance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bake_cases import LAYERS, adapter, base_tensors, loaded, lora, model_folder, numbers
from torch import Tensor

from adapterkit.errors import Refused
from adapterkit.operations.bake import BakeOptions, bake
from adapterkit.operations.unbake import require_additive, restore

WORDS = "model.embed_tokens"
FRONT = f"base_model.model.{WORDS}"


def of_words(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A LoRA of the embedding in PEFT's names, and its delta at its scale of 1.5."""
    down, up = numbers(2, 12, seed=seed), numbers(8, 2, seed=seed + 1)
    return {f"{FRONT}.lora_embedding_A": down, f"{FRONT}.lora_embedding_B": up}, 1.5 * (up @ down).T


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_numbers_in_the_place_of_the_bases_get_what_the_same_adapter_adds(
    strength: float, tmp_path: Path
) -> None:
    base = base_tensors(torch.float32)
    tensors, delta = of_words(3)
    placed = numbers(12, 8, seed=9)
    path = adapter(tmp_path / "a", {**tensors, f"{FRONT}.weight": placed}, modules_to_save=["embed_tokens"])
    bake(model_folder(tmp_path / "base", base), [(path, strength)], tmp_path / "out")
    old = base[f"{WORDS}.weight"]
    wanted = old.lerp(placed, strength) + strength * delta
    assert torch.allclose(loaded(tmp_path / "out")[f"{WORDS}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_rows_of_tokens_hold_against_what_is_added(strength: float, tmp_path: Path) -> None:
    base = base_tensors(torch.float32)
    tensors, delta = of_words(4)
    rows = numbers(2, 8, seed=8)
    words = adapter(tmp_path / "words", tensors)
    tokens = adapter(
        tmp_path / "tokens",
        {f"{FRONT}.token_adapter.trainable_tokens_delta": rows},
        peft_type="TRAINABLE_TOKENS",
        token_indices=[7, 2],
        target_modules=["embed_tokens"],
    )
    wanted = base[f"{WORDS}.weight"] + delta
    wanted[[7, 2]] = base[f"{WORDS}.weight"][[7, 2]].lerp(rows, strength)
    folder = model_folder(tmp_path / "base", base)
    for name, given in (("one", [(tokens, strength), words]), ("two", [words, (tokens, strength)])):
        bake(folder, given, tmp_path / name)
        after = loaded(tmp_path / name)[f"{WORDS}.weight"]
        assert torch.allclose(after, wanted, atol=1e-5)
        if strength == 1.0:
            assert torch.equal(after[[7, 2]], rows)


def test_numbers_at_strength_1_are_the_numbers_themselves(tmp_path: Path) -> None:
    base = base_tensors(torch.float32)
    base["lm_head.weight"] *= 1e4
    placed = numbers(12, 8, seed=9)
    path = adapter(
        tmp_path / "a", {**lora(1), "base_model.model.lm_head.weight": placed}, modules_to_save=["lm_head"]
    )
    bake(model_folder(tmp_path / "base", base), [path], tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")["lm_head.weight"], placed)


def test_a_replacement_holds_against_what_another_adapter_adds(tmp_path: Path) -> None:
    base = base_tensors(torch.float32)
    tensors, _ = of_words(3)
    placed = numbers(12, 8, seed=9)
    words = adapter(tmp_path / "words", {**lora(1), **tensors})
    saved = adapter(
        tmp_path / "saved", {**lora(2), f"{FRONT}.weight": placed}, modules_to_save=["embed_tokens"]
    )
    done = bake(model_folder(tmp_path / "base", base), [words, saved], tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")[f"{WORDS}.weight"], placed)
    assert done.plan.outcomes == {"applied": 9, "replaced": 1}


def test_tensors_alike_are_rounded_by_chances_of_their_own(tmp_path: Path) -> None:
    base = base_tensors(torch.bfloat16)
    tensors = lora(1)
    one, two = LAYERS[:2]
    base[f"{two}.weight"] = base[f"{one}.weight"].clone()
    for part in ("A", "B"):
        tensors[f"base_model.model.{two}.lora_{part}.weight"] = tensors[
            f"base_model.model.{one}.lora_{part}.weight"
        ].clone()
    folder, path = model_folder(tmp_path / "base", base), adapter(tmp_path / "a", tensors)
    bake(folder, [path], tmp_path / "out", BakeOptions(rounding="stochastic", seed=1))
    after = loaded(tmp_path / "out")
    assert not torch.equal(after[f"{one}.weight"], after[f"{two}.weight"])


def test_blocks_of_one_tensor_are_rounded_by_chances_of_their_own(tmp_path: Path) -> None:
    """A tensor of several blocks whose rows are all the same."""
    rows, columns = 4096, 1024
    base = {"model.layers.0.attn.q_proj.weight": torch.full((rows, columns), 1.0, dtype=torch.bfloat16)}
    name = "base_model.model.model.layers.0.attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.full((2, columns), 0.01),
        f"{name}.lora_B.weight": torch.full((rows, 2), 0.1),
    }
    folder, path = model_folder(tmp_path / "base", base), adapter(tmp_path / "a", tensors)
    bake(folder, [path], tmp_path / "out", BakeOptions(rounding="stochastic", seed=1))
    (after,) = loaded(tmp_path / "out").values()
    parts = after.float().reshape(8, -1)
    assert len({part.double().mul(torch.arange(part.numel())).sum().item() for part in parts}) == len(parts)
    assert after.float().mean() == pytest.approx(1.003, abs=1e-4)


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    base = base_tensors()
    base[f"{LAYERS[0]}.weight"][0, 0] = 65000.0
    tensors = lora(1)
    for part in ("A", "B"):
        tensors[f"base_model.model.{LAYERS[0]}.lora_{part}.weight"].abs_().add_(30)
    folder, path = model_folder(tmp_path / "base", base), adapter(tmp_path / "a", tensors)
    with pytest.raises(Refused, match="too large for the dtype") as error:
        bake(folder, [path], tmp_path / "out")
    assert error.value.code == "precision"
    assert error.value.details["dtype"] in ("bf16", "fp32")


def test_what_is_subtracted_has_to_be_additive_magnitudes_included(tmp_path: Path) -> None:
    from adapterkit.operations.bake import plan_baking

    name = f"base_model.model.{LAYERS[0]}"
    tensors = {**lora(1, LAYERS[:1]), f"{name}.lora_magnitude_vector": numbers(16, seed=3).abs() + 1}
    folder = model_folder(tmp_path / "base", base_tensors())
    plan = plan_baking(folder, [adapter(tmp_path / "a", tensors, use_dora=True)])
    with pytest.raises(Refused):
        require_additive(plan)


def test_an_undo_file_is_for_the_bytes_that_it_was_written_with(tmp_path: Path) -> None:
    from adapterkit.errors import StoreError

    folder = model_folder(tmp_path / "base", base_tensors())
    options = BakeOptions(keep_undo=True)
    bake(folder, [adapter(tmp_path / "a", lora(1))], tmp_path / "out", options)
    bake(folder, [adapter(tmp_path / "b", lora(2))], tmp_path / "other")
    with pytest.raises(StoreError) as error:
        restore(tmp_path / "other", tmp_path / "out.undo", tmp_path / "again")
    assert error.value.code == "undo-other"
    assert not (tmp_path / "again").exists()
