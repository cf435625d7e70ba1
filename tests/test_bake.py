"""The laws of baking: what comes out, what stays as it was, and what is refused before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from bake_cases import CONFIG, LAYERS, adapter, base_tensors, loaded, lora, model_folder, numbers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.errors import Conflict, Mismatch, Refused, StoreError, UsageError
from adapterkit.operations.bake import BakeOptions, bake, plan_baking
from adapterkit.operations.merge import MergeOptions, merge
from adapterkit.stores import memory_store


def expected(base: Mapping[str, Tensor], *adapters: tuple[Mapping[str, Tensor], float]) -> dict[str, Tensor]:
    """Base + Σ strength · 1.5 · up @ down in double, rounded once: the definition."""
    result = dict(base)
    for name in LAYERS:
        total = base[f"{name}.weight"].double()
        for tensors, strength in adapters:
            front = f"base_model.model.{name}"
            if f"{front}.lora_A.weight" in tensors:
                up, down = tensors[f"{front}.lora_B.weight"], tensors[f"{front}.lora_A.weight"]
                total = total + strength * 1.5 * (up.double() @ down.double())
        result[f"{name}.weight"] = total.to(base[f"{name}.weight"].dtype)
    return result


def check_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


def is_near(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Equal, but for a last digit where float32 and float64 round a tie differently."""
    return all(
        torch.allclose(t.double(), two[name].double(), rtol=2**-9, atol=1e-7) for name, t in one.items()
    )


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base, one, two = base_tensors(), lora(1000), lora(2000)
    folder = model_folder(tmp_path / "base", base, shards=3)
    first, second = adapter(tmp_path / "a", one), adapter(tmp_path / "b", two)
    bake(folder, [(first, 0.7), (second, -0.4)], tmp_path / "out")
    assert is_near(loaded(tmp_path / "out"), expected(base, (one, 0.7), (two, -0.4)))


def test_the_order_of_adapters_does_not_matter(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    paths = [adapter(tmp_path / f"a{index}", lora(1000 * index)) for index in (1, 2, 3)]
    given = [(path, 0.3 * index) for index, path in enumerate(paths, 1)]
    first = bake(folder, given, tmp_path / "one")
    second = bake(folder, given[::-1], tmp_path / "two")
    check_equal(loaded(tmp_path / "one"), loaded(tmp_path / "two"))
    assert first.plan.changed == second.plan.changed == 4


def test_strength_0_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors(torch.bfloat16), shards=2)
    done = bake(folder, [(adapter(tmp_path / "a", lora(1)), 0.0)], tmp_path / "out")
    assert done.plan.changed == 0
    assert set(done.plan.outcomes) == {"at strength 0"}
    check_equal(loaded(folder), loaded(tmp_path / "out"))


@pytest.mark.parametrize("change", ["more tokens", "a head of its own", "an embedding of its own"])
def test_strength_0_changes_no_shape_and_parts_no_head(change: str, tmp_path: Path) -> None:
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    folder = model_folder(tmp_path / "base", tensors, tie_word_embeddings=True)
    key, rows = {
        "more tokens": ("model.embed_tokens", 15),
        "a head of its own": ("lm_head", 12),
        "an embedding of its own": ("model.embed_tokens", 12),
    }[change]
    saved = {f"base_model.model.{key}.weight": numbers(rows, 8, seed=1)}
    path = adapter(tmp_path / "a", {**lora(1), **saved}, modules_to_save=["lm_head", "embed_tokens"])
    done = bake(folder, [(path, 0.0)], tmp_path / "out")
    assert (done.plan.changed, done.plan.new, done.plan.edits) == (0, {}, {})
    assert set(done.plan.outcomes) == {"at strength 0"}
    check_equal(loaded(folder), loaded(tmp_path / "out"))


def test_untouched_tensors_files_and_metadata_stay_as_they_are(tmp_path: Path) -> None:
    base = base_tensors()
    folder = model_folder(tmp_path / "base", base, shards=3)
    bake(folder, [adapter(tmp_path / "a", lora(1, LAYERS[:1]))], tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as old, safe_open(tmp_path / "out" / path.name, "pt") as new:
            assert list(old.keys()) == list(new.keys())
            assert new.metadata()["format"] == "pt"
            assert json.loads(new.metadata()["adapterkit"])[0]["operation"] == "bake"
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((folder / index).read_text())
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    after = loaded(tmp_path / "out")
    changed = [name for name, tensor in base.items() if not torch.equal(tensor, after[name])]
    assert changed == [f"{LAYERS[0]}.weight"]


def test_a_bake_in_memory_is_the_bake_in_files(tmp_path: Path) -> None:
    base = base_tensors()
    folder = model_folder(tmp_path / "base", base)
    path = adapter(tmp_path / "a", lora(5))
    bake(folder, [path], tmp_path / "out")
    done = bake(memory_store(base, {}, {"config.json": CONFIG}), [path])
    check_equal(loaded(tmp_path / "out"), done.tensors)
    assert done.tensors["places"] is base["places"]
    check_equal(base, base_tensors())


def test_the_receipt_comes_out_even(tmp_path: Path) -> None:
    base = base_tensors()
    folder = model_folder(tmp_path / "base", base)
    several = [adapter(tmp_path / "a", lora(5)), (adapter(tmp_path / "b", lora(6, LAYERS[:2])), 0.0)]
    plan = plan_baking(folder, several)
    assert plan.changed + plan.untouched == len(base)
    assert sum(plan.outcomes.values()) == 6
    assert plan.outcomes == {"applied": 4, "at strength 0": 2}


def test_blocks_have_strengths_of_their_own(tmp_path: Path) -> None:
    base, one, two = base_tensors(), lora(1), lora(2)
    folder = model_folder(tmp_path / "base", base)
    paths = [adapter(tmp_path / "a", one), adapter(tmp_path / "b", two)]
    options = BakeOptions(blocks=["2:layers.0=0.5", "layers.1=0"])
    bake(folder, paths, tmp_path / "out", options)
    halves = {name: t for name, t in two.items() if "layers.0" in name}
    ones = {name: t for name, t in one.items() if "layers.0" in name}
    assert is_near(loaded(tmp_path / "out"), expected(base, (ones, 1.0), (halves, 0.5)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_dtype_is_that_of_changed_tensors_only(dtype: str, tmp_path: Path) -> None:
    base = base_tensors()
    folder = model_folder(tmp_path / "base", base)
    bake(folder, [adapter(tmp_path / "a", lora(1))], tmp_path / "out", BakeOptions(dtype=dtype))
    after = loaded(tmp_path / "out")
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert all(after[f"{name}.weight"].dtype == names[dtype] for name in LAYERS)
    assert after["model.norm.weight"].dtype == torch.float16


def test_chance_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors(torch.bfloat16), shards=2)
    path = adapter(tmp_path / "a", lora(1))
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        bake(folder, [path], tmp_path / name, BakeOptions(rounding="stochastic", seed=seed))
    check_equal(loaded(tmp_path / "one"), loaded(tmp_path / "same"))
    one, other = loaded(tmp_path / "one"), loaded(tmp_path / "other")
    assert not all(torch.equal(one[name], other[name]) for name in one)


def small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t * (1e-4 if "lora_B" in name else 1) for name, t in tensors.items()}


def test_a_change_that_rounding_loses_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors(torch.bfloat16), shards=2)
    path = adapter(tmp_path / "a", small(lora(1)))
    with pytest.raises(Refused, match="rounding leaves") as error:
        bake(folder, [path], tmp_path / "out")
    assert error.value.code == "precision"
    assert error.value.details["dtype"] == "fp32"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]
    done = bake(folder, [path], tmp_path / "out", BakeOptions(allow={"precision"}))
    assert done.total.ratio < 0.5
    kept = bake(folder, [path], tmp_path / "wide", BakeOptions(dtype="fp32"))
    assert kept.total.ratio == pytest.approx(1.0)
    single = tmp_path / "base.safetensors"
    save_file(base_tensors(torch.bfloat16), single)
    with pytest.raises(Refused):
        bake(single, [path], tmp_path / "single.safetensors")
    assert not (tmp_path / "single.safetensors").exists()


def bad_shape(folder: Path) -> Path:
    return adapter(folder, lora(1, width=10))


def bad_name(folder: Path) -> Path:
    return adapter(folder, lora(1, ["model.layers.7.attn.q_proj"]))


def bad_number(folder: Path) -> Path:
    tensors = lora(1)
    next(iter(tensors.values()))[0, 0] = torch.nan
    return adapter(folder, tensors)


def pissa(folder: Path) -> Path:
    return adapter(folder, lora(1), init_lora_weights="pissa")


@pytest.mark.parametrize(
    ("make", "kind", "code"),
    [
        (bad_shape, Mismatch, "weight-shape"),
        (bad_name, Refused, "absent"),
        (bad_number, Refused, "nonfinite"),
        (pissa, Refused, "config-needed"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_cannot_be_baked_is_refused_by_name(
    make: Callable[[Path], Path], kind: type[Exception], code: str, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    path = make(tmp_path / "a")
    with pytest.raises(kind) as error:
        bake(folder, [path], tmp_path / "out")
    assert getattr(error.value, "code", "") == code
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base"]


def test_what_the_base_lacks_is_left_out_by_consent(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    path = adapter(tmp_path / "a", lora(1, [*LAYERS[:1], "model.layers.7.attn.q_proj"]))
    done = bake(folder, [path], tmp_path / "out", BakeOptions(allow={"absent"}))
    assert done.plan.outcomes == {"applied": 1, "absent": 1}


def test_two_replacements_conflict_unless_they_are_the_same(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    key = "base_model.model.lm_head.weight"
    one, two = ({key: numbers(12, 8, seed=seed)} for seed in (1, 2))
    config = {"modules_to_save": ["lm_head"]}
    paths = [
        adapter(tmp_path / name, {**lora(1), **given}, **config) for name, given in (("a", one), ("b", two))
    ]
    with pytest.raises(Conflict) as error:
        bake(folder, paths, tmp_path / "out")
    assert error.value.code == "two-replacements"
    bake(folder, [paths[0], paths[0]], tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")["lm_head.weight"], one[key].half())


def test_the_output_is_not_the_base_unless_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(base_tensors(), path)
    given = [adapter(tmp_path / "a", lora(1))]
    with pytest.raises(StoreError, match="is the base itself"):
        bake(path, given, path, BakeOptions(force=True))
    bake(path, given, tmp_path / "out.safetensors")
    bake(path, given, path, BakeOptions(in_place=True))
    assert path.read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_a_resized_vocabulary_is_taken_over(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    grown = {
        f"base_model.model.{name}.weight": numbers(14, 8, seed=index, dtype=torch.float16)
        for index, name in enumerate(("model.embed_tokens", "lm_head"))
    }
    path = adapter(tmp_path / "a", {**lora(1), **grown}, modules_to_save=["embed_tokens", "lm_head"])
    bake(folder, [path], tmp_path / "out")
    after = loaded(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], grown["base_model.model.lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 14


@pytest.mark.parametrize("text", ["3:layers.0=1", "0:layers.0=1"])
def test_strengths_of_an_adapter_that_is_not_there_are_refused(text: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", base_tensors())
    with pytest.raises(UsageError):
        plan_baking(folder, [adapter(tmp_path / "a", lora(1))], BakeOptions(blocks=[text]))


def test_strengths_of_parts_are_multiplied_as_a_merge_multiplies_them(tmp_path: Path) -> None:
    base = base_tensors(torch.float32)
    folder = model_folder(tmp_path / "base", base)
    paths = [adapter(tmp_path / name, lora(seed)) for name, seed in (("a", 1000), ("b", 2000))]
    blocks = ["layers.0=0.5", "2:layers.0=0.5,layers.1=0", "1:0.25"]
    bake(folder, paths, tmp_path / "out", BakeOptions(blocks=blocks))
    merge(paths, [1.0, 1.0], tmp_path / "merged", options=MergeOptions(blocks=blocks))
    bake(folder, [tmp_path / "merged"], tmp_path / "again")
    one, two = loaded(tmp_path / "out"), loaded(tmp_path / "again")
    assert all(torch.allclose(tensor, two[name], atol=1e-6) for name, tensor in one.items())
