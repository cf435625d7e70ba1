"""The base comes back: byte for byte where its bits were kept, nearly where an adapter is subtracted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bake_cases import LAYERS, adapter, base_tensors, loaded, lora, model_folder, numbers
from safetensors.torch import save_file

from adapterkit.errors import Json, Refused, StoreError
from adapterkit.operations.bake import BakeOptions, bake
from adapterkit.operations.unbake import error_of, restore, subtract
from adapterkit.stores.partial import Partial

KEEP = BakeOptions(keep_undo=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_file_comes_back_byte_for_byte(dtype: str | None, tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base_tensors(torch.bfloat16), base)
    done = bake(base, [adapter(tmp_path / "a", lora(1))], out, BakeOptions(keep_undo=True, dtype=dtype))
    assert done.undo == tmp_path / "out.safetensors.undo"
    restore(out, None, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("change", ["LoRA", "more tokens", "a head of its own"])
def test_a_folder_comes_back_byte_for_byte(change: str, tmp_path: Path) -> None:
    tensors = base_tensors()
    if change == "a head of its own":
        del tensors["lm_head.weight"]
    base = model_folder(tmp_path / "base", tensors, shards=3, tie_word_embeddings=change[0] == "a")
    more = {
        "LoRA": {},
        "more tokens": {"base_model.model.model.embed_tokens.weight": numbers(15, 8, seed=1)},
        "a head of its own": {"base_model.model.lm_head.weight": numbers(12, 8, seed=2)},
    }
    path = adapter(tmp_path / "a", {**lora(1), **more[change]}, modules_to_save=["lm_head", "embed_tokens"])
    bake(base, [path], tmp_path / "out", KEEP)
    assert contents(base) != contents(tmp_path / "out")
    restore(tmp_path / "out", None, tmp_path / "again")
    assert contents(base) == contents(tmp_path / "again")


def test_a_base_that_was_baked_in_place_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(base_tensors(), path)
    before = path.read_bytes()
    bake(path, [adapter(tmp_path / "a", lora(1))], path, BakeOptions(keep_undo=True, in_place=True))
    assert path.read_bytes() != before
    restore(path, None, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == before


def test_subtracting_comes_near_and_says_how_near(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors(torch.bfloat16))
    path = adapter(tmp_path / "a", lora(1))
    bake(base, [(path, 0.8)], tmp_path / "out")
    done = subtract(tmp_path / "out", [(path, 0.8)], tmp_path / "near")
    before, after = loaded(base), loaded(tmp_path / "near")
    names = [f"{name}.weight" for name in LAYERS]
    error = sum(float((after[name].double() - before[name].double()).square().sum()) for name in names) ** 0.5
    assert 0 < error <= 2 * error_of(done) * done.total.norm
    assert error < 0.1 * done.total.norm


@pytest.mark.parametrize("kind", ["DoRA", "replacement"])
def test_what_cannot_be_subtracted_is_refused(kind: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors())
    tensors, name = lora(1, LAYERS[:1]), f"base_model.model.{LAYERS[0]}"
    if kind == "DoRA":
        tensors[f"{name}.lora_magnitude_vector"] = numbers(16, seed=3).abs() + 1
    else:
        tensors["base_model.model.lm_head.weight"] = numbers(12, 8, seed=2)
    path = adapter(tmp_path / "a", tensors, use_dora=kind == "DoRA")
    bake(base, [path], tmp_path / "out")
    with pytest.raises(Refused) as error:
        subtract(tmp_path / "out", [(path, 1.0)], tmp_path / "near")
    assert error.value.code == "not-additive"


def test_there_is_nothing_to_restore_from_without_an_undo_file(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors())
    with pytest.raises(StoreError, match=r"there is no `base\.undo`"):
        restore(base, None, tmp_path / "again")


def test_an_undo_file_of_a_bake_that_was_resumed_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = model_folder(tmp_path / "base", base_tensors(), shards=3)
    path = adapter(tmp_path / "a", lora(1))
    finish = Partial.finish

    def stopped(self: Partial, name: str, facts: dict[str, Json]) -> None:
        finish(self, name, facts)
        if len(self.finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partial, "finish", stopped)
        bake(base, [path], tmp_path / "out", KEEP)
    done = bake(base, [path], tmp_path / "out", replace(KEEP, resume=True))
    assert len(done.resumed) == 2
    restore(tmp_path / "out", None, tmp_path / "again")
    assert contents(base) == contents(tmp_path / "again")


def test_the_undo_file_of_a_folder_that_is_not_there_yet_lies_beside_it(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors())
    done = bake(base, [adapter(tmp_path / "a", lora(1))], tmp_path / "new" / "out", KEEP)
    assert done.undo == tmp_path / "new" / "out.undo"
    restore(tmp_path / "new" / "out", None, tmp_path / "again")
    assert contents(base) == contents(tmp_path / "again")


def test_an_adapters_tokenizer_goes_again_with_its_tokens(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", base_tensors())
    name = "base_model.model.model.embed_tokens.weight"
    grown = {
        name: numbers(15, 8, seed=1),
        name.replace("model.embed_tokens", "lm_head"): numbers(15, 8, seed=2),
    }
    path = adapter(tmp_path / "a", {**lora(1), **grown}, modules_to_save=["embed_tokens", "lm_head"])
    for file in ("tokenizer.json", "added_tokens.json"):
        (path / file).write_text(f"the adapter's {file}")
    done = bake(base, [path], tmp_path / "out", KEEP)
    for file in ("tokenizer.json", "added_tokens.json"):
        assert (tmp_path / "out" / file).read_bytes() == (path / file).read_bytes()
    assert any("tokenizer.json, added_tokens.json" in note for note in done.notes)
    restore(tmp_path / "out", None, tmp_path / "again")
    assert contents(base) == contents(tmp_path / "again")
