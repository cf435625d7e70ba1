"""Undo gives the base back byte for byte, or says that it cannot."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapterkit.baking.undo import UndoWriter, apply_undo
from adapterkit.baking.undo_format import Block, pack, unpack
from adapterkit.errors import StoreError
from adapterkit.stores import Store, open_store
from adapterkit.stores.views import bytes_of

Tensors = dict[str, torch.Tensor]


def base_tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.weight": torch.randn(64, 32, generator=generator).half(),
        "blocks.1.weight": torch.randn(16, 8, generator=generator).bfloat16(),
        "norm.bias": torch.randn(7, generator=generator),
        "odd": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
    }


def changed(tensors: Tensors) -> Tensors:
    """Two tensors otherwise, the rest as it was."""
    baked = {key: tensor.clone() for key, tensor in tensors.items()}
    baked["blocks.0.weight"] += 0.01
    baked["norm.bias"][3] += 1
    return baked


def write_undo(
    path: Path,
    base: Path,
    baked: Path,
    rows: int = 8,
    edit: Callable[[list[tuple[str, int]]], None] = lambda blocks: None,
) -> None:
    """An undo file of two safetensors files, by row blocks, in an order of the caller's."""
    with open_store(base) as old, open_store(baked) as new, UndoWriter(path) as writer:
        writer.begin("model.safetensors", base)
        blocks = [
            (key, first) for key, info in old.tensors.items() for first in range(0, (*info.shape, 1)[0], rows)
        ]
        edit(blocks)
        for key, first in blocks:
            before, after = (_rows(store, key, first, rows) for store in (old, new))
            start = first * (old.info(key).nbytes // (*old.info(key).shape, 1)[0])
            writer.add("model.safetensors", key, before, after, start)
        writer.finish({"model.safetensors": baked})


def _rows(store: Store, key: str, first: int, rows: int) -> memoryview:
    height = store.info(key).nbytes // (*store.info(key).shape, 1)[0]
    return store.read(key)[first * height : (first + rows) * height]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, baked = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    save_file(base_tensors(), base, {"title": "a base", "z": "1"})
    save_file(changed(base_tensors()), baked, {"title": "baked", "strength": "0.8"})
    return base, baked


def test_the_base_comes_back_byte_for_byte_with_its_own_header(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, baked = pair
    undo, output = tmp_path / "undo", tmp_path / "restored.safetensors"
    write_undo(undo, base, baked)
    written = apply_undo(baked, undo, output)
    assert output.read_bytes() == base.read_bytes()
    assert written["model.safetensors"].sha256 == hashlib.sha256(base.read_bytes()).hexdigest()


def test_only_what_changed_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    write_undo(tmp_path / "undo", *pair)
    with open_store(tmp_path / "undo") as store:
        assert set(store.tensors) == {
            "index",
            "0/head",
            "0/tensor/blocks.0.weight",
            "0/tensor/norm.bias",
        }


def test_blocks_in_any_order_and_from_any_thread_give_the_same_file(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, baked = pair
    write_undo(tmp_path / "a", base, baked)
    write_undo(tmp_path / "b", base, baked, edit=random.Random(1).shuffle)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open_store(base) as old, open_store(baked) as new, UndoWriter(tmp_path / "c") as writer:
        writer.begin("model.safetensors", base)
        name = "blocks.0.weight"
        with ThreadPoolExecutor(4) as pool:
            cuts = [
                (at, old.read(name)[at : at + 512], new.read(name)[at : at + 512])
                for at in range(0, 4096, 512)
            ]
            list(pool.map(lambda cut: writer.add("model.safetensors", name, cut[1], cut[2], cut[0]), cuts))
        writer.add("model.safetensors", "norm.bias", old.read("norm.bias"), new.read("norm.bias"))
        writer.finish({"model.safetensors": baked})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_change_of_any_bytes_is_taken_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    sizes = st.integers(0, 40)
    dtype = st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64])
    old = {
        f"t{i}": _bytes(data, data.draw(sizes), data.draw(dtype)) for i in range(data.draw(st.integers(1, 4)))
    }
    new = {key: _bytes(data, t.numel(), t.dtype) if data.draw(st.booleans()) else t for key, t in old.items()}
    base, baked = folder / "base.safetensors", folder / "baked.safetensors"
    save_file(old, base)
    save_file(new, baked, {"extra": "x" * data.draw(st.integers(0, 99))})
    write_undo(folder / "undo", base, baked, rows=data.draw(st.integers(1, 16)))
    apply_undo(baked, folder / "undo", folder / "out")
    assert (folder / "out").read_bytes() == base.read_bytes()


def _bytes(data: st.DataObject, count: int, dtype: torch.dtype) -> torch.Tensor:
    size = count * dtype.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_another_dtype_is_taken_back_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """Zeros have the same bytes in fp16 and bf16, which is no reason to miss them."""
    base, baked = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    weight = torch.cat([torch.zeros(8, 8), torch.randn(8, 8)]).half()
    save_file({"w": weight, "b": torch.ones(4)}, base)
    save_file({"w": weight.to(dtype), "b": torch.ones(4)}, baked)
    write_undo(tmp_path / "undo", base, baked, rows=4)
    apply_undo(baked, tmp_path / "undo", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == base.read_bytes()


def test_rows_that_were_put_on_are_taken_off(tmp_path: Path) -> None:
    base, baked = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    weight = torch.randn(8, 4)
    save_file({"wte": weight}, base)
    save_file({"wte": torch.cat([weight, torch.randn(3, 4)])}, baked)
    with UndoWriter(tmp_path / "undo") as writer:
        writer.begin("m", base)
        writer.finish({"m": baked})
    apply_undo(baked, tmp_path / "undo", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == base.read_bytes()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base of two shards, its bake and the undo file."""
    base, baked, undo = tmp_path / "base", tmp_path / "baked", tmp_path / "baked.undo"
    for folder in (base, baked):
        (folder / "unet").mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    for number in (1, 2):
        save_file(base_tensors(number), base / f"unet/m-{number}.safetensors")
        save_file(changed(base_tensors(number)), baked / f"unet/m-{number}.safetensors", {"a": "b"})
    (base / "unet/config.json").write_text('{"vocab_size": 10}')
    (baked / "unet/config.json").write_text('{"vocab_size": 11}')
    (base / "unet/notes.txt").write_text("left out by baking")
    (baked / "receipt.json").write_text("{}")
    with UndoWriter(undo) as writer:
        for number in (1, 2):
            name = f"unet/m-{number}.safetensors"
            writer.begin(name, base / name)
            with open_store(base / name) as old, open_store(baked / name) as new:
                for key in ("blocks.0.weight", "norm.bias"):
                    writer.add(name, key, old.read(key), new.read(key))
        writer.keep("unet/config.json", (base / "unet/config.json").read_bytes())
        writer.keep("unet/notes.txt", b"left out by baking")
        writer.keep("receipt.json", None)
        made = ("unet/m-1.safetensors", "unet/m-2.safetensors", "unet/config.json", "receipt.json")
        writer.finish({name: baked / name for name in made})
    return base, baked, undo


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_folder_comes_back_with_all_its_files_and_no_others(folders: tuple[Path, Path, Path]) -> None:
    base, baked, undo = folders
    output = base.parent / "restored"
    written = apply_undo(baked, undo, output)
    assert contents(output) == contents(base)
    assert set(written) == {
        "unet/m-1.safetensors", "unet/m-2.safetensors", "unet/config.json", "unet/notes.txt",
    }  # fmt: skip


def test_a_folder_is_restored_whole_or_not_at_all(folders: tuple[Path, Path, Path]) -> None:
    base, baked, undo = folders
    shard = baked / "unet/m-2.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(StoreError, match="changed since") as caught:
        apply_undo(baked, undo, base.parent / "restored")
    assert caught.value.code == "undo-other"
    assert sorted(path.name for path in base.parent.iterdir()) == ["baked", "baked.undo", "base"]


def test_several_files_are_not_restored_from_one(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, baked, undo = folders
    with pytest.raises(StoreError, match="is one") as caught:
        apply_undo(baked / "unet/m-1.safetensors", undo, tmp_path / "out")
    assert caught.value.code == "undo-other"


def test_another_file_than_the_baked_one_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, baked = pair
    write_undo(tmp_path / "undo", base, baked)
    with pytest.raises(StoreError, match="not the file") as caught:
        apply_undo(base, tmp_path / "undo", tmp_path / "out")
    assert caught.value.code == "undo-other"
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_unasked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, baked = pair
    write_undo(tmp_path / "undo", base, baked)
    with pytest.raises(StoreError, match="exists already"):
        apply_undo(baked, tmp_path / "undo", base)
    with pytest.raises(StoreError, match="exists already"):
        UndoWriter(tmp_path / "undo")
    original = base.read_bytes()
    apply_undo(baked, tmp_path / "undo", baked, overwrite=True)
    assert baked.read_bytes() == original


def test_every_damage_to_an_undo_file_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, baked = pair
    write_undo(tmp_path / "undo", base, baked)
    whole = (tmp_path / "undo").read_bytes()
    chance = random.Random(0)
    for _ in range(150):
        raw = bytearray(whole)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (tmp_path / "bent").write_bytes(raw)
        try:
            apply_undo(baked, tmp_path / "bent", tmp_path / "out", overwrite=True)
        except StoreError:
            assert not (tmp_path / "out").exists()
        else:
            # Such as a bit of the metadata or of a name that says nothing about the contents.
            assert (tmp_path / "out").read_bytes() == base.read_bytes()
            (tmp_path / "out").unlink()
    (tmp_path / "bent").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="cut short"):
        apply_undo(baked, tmp_path / "bent", tmp_path / "out")


def edited(undo: Path, edit: Callable[[dict[str, object]], None]) -> Path:
    """The undo file with its index changed."""
    with open_store(undo) as store:
        index = json.loads(bytes(store.read("index")))
        edit(index)
        tensors = {key: store.tensor(key).clone() for key in store.tensors if key != "index"}
    raw = bytearray(json.dumps(index).encode())
    path = undo.with_name("edited")
    save_file({**tensors, "index": torch.frombuffer(raw, dtype=torch.uint8)}, path)
    return path


def _first(index: dict[str, object]) -> dict[str, object]:
    return index["files"][0]  # type: ignore[index,no-any-return]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.update(version=2), "version 2"),
        (lambda index: index.update(files=None), "not one of an undo file"),
        (lambda index: index.update(files=[{}]), "says too little"),
        (lambda index: index["files"].append(index["files"][0]), "stands twice"),
        (lambda index: _first(index).update(name="../other"), "leads out"),
        (lambda index: _first(index).update(name="/etc/passwd"), "leads out"),
        (lambda index: _first(index).update(name="c:\\x"), "leads out"),
        (lambda index: _first(index).update(base=None), "and not both"),
        (lambda index: _first(index).update(base={"size": 1}), "hash or size"),
        (lambda index: _first(index).update(head=[0, 1]), "makes no sense"),
        (lambda index: _first(index).update(head=[0, 1 << 60, 5, 1, 0]), "not there"),
        (lambda index: _first(index).update(tensors={"norm.bias": []}), "do not follow"),
        (lambda index: _first(index).update(tensors={"norm.bias": [[0, 4, 9, 1, 1]] * 2}), "do not follow"),
        (lambda index: _first(index).update(tensors={"other": [[0, 4, 9, 1, 1]]}), "not there"),
        (lambda index: _first(index)["head"].__setitem__(1, 10), "as long as"),  # type: ignore[attr-defined]
        (lambda index: _first(index)["tensors"].clear(), "does not give the bytes"),  # type: ignore[attr-defined]
        (
            lambda index: _first(index)["tensors"]["norm.bias"][0].__setitem__(0, 999),  # type: ignore[index]
            "not as long as its index says",
        ),
    ],
)
def test_an_index_that_lies_restores_nothing(
    edit: Callable[[dict[str, object]], None], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, baked = pair
    write_undo(tmp_path / "undo", base, baked)
    with pytest.raises(StoreError, match=message) as caught:
        apply_undo(baked, edited(tmp_path / "undo", edit), tmp_path / "out")
    assert caught.value.code == "undo"
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_no_undo_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no index"):
        apply_undo(pair[1], pair[0], tmp_path / "out")


def test_a_pickle_cannot_be_put_together_again(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "base.ckpt")
    with UndoWriter(tmp_path / "undo") as writer, pytest.raises(StoreError) as caught:
        writer.begin("base.ckpt", tmp_path / "base.ckpt")
    assert caught.value.code == "undo-base"


def test_a_tensor_written_otherwise_and_not_added_is_noticed_before_the_base_is_gone(tmp_path: Path) -> None:
    base, baked = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    save_file({"w": torch.ones(4, 4)}, base)
    for other in ({"w": torch.ones(4, 4).half()}, {"w": torch.ones(2, 4)}, {"v": torch.ones(4, 4)}):
        save_file(other, baked)
        with UndoWriter(tmp_path / "undo") as writer:
            writer.begin("m", base)
            with pytest.raises(StoreError, match="written otherwise"):
                writer.finish({"m": baked})
        assert not (tmp_path / "undo").exists()


def test_nothing_is_left_when_it_is_not_finished(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with UndoWriter(tmp_path / "undo") as writer:
        writer.begin("m", pair[0])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 4096])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_block_unpacks_to_what_was_packed(size: int, width: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    packed = pack(data, width)
    assert np.array_equal(unpack(packed, Block(0, size, len(packed), width, True), "x"), data)


def test_bits_of_small_changes_take_little_room() -> None:
    weight = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 0.02
    old = weight.bfloat16()
    new = (old.float() + 1e-5 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(1))).bfloat16()
    difference = np.frombuffer(bytes_of(old), np.uint8) ^ np.frombuffer(bytes_of(new), np.uint8)
    assert len(pack(difference, 2)) < 0.15 * difference.size
