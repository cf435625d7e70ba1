"""Folders and indexes of shards: what belongs together is read together, and nothing outside is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapterkit.errors import Json, StoreError, UnsafeFile
from adapterkit.stores import Limits, open_store
from tests.test_stores_safetensors import check_store_holds

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}
CONFIG: dict[str, Json] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "base_model_name_or_path": "some/base",
}


def peft_folder(folder: Path, config: object = CONFIG, weights: str = "adapter_model.safetensors") -> Path:
    """A PEFT adapter; config is written as JSON, or as it stands if it is bytes; None leaves it out."""
    folder.mkdir(exist_ok=True)
    if weights.endswith(".safetensors"):
        save_file(TENSORS, folder / weights)
    else:
        torch.save(TENSORS, folder / weights)
    if config is not None:
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (folder / "adapter_config.json").write_bytes(raw)
    return folder


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt"])
def test_a_peft_folder_is_its_tensors_and_its_configuration(tmp_path: Path, weights: str) -> None:
    folder = peft_folder(tmp_path / "x", weights=weights)
    (folder / "README.md").write_text("hello")
    (folder / "training_args.bin").write_bytes(b"not for us")
    (folder / "._adapter_model.safetensors").write_bytes(b"left by another system")
    with open_store(folder) as store:
        check_store_holds(store, TENSORS)
        assert (store.kind, store.path) == ("folder", folder)
        assert store.size == (folder / weights).stat().st_size
        assert store.sidecars == {"adapter_config.json": CONFIG}
        assert not store.warnings
        assert store.scalar("b") == 1.0
    with pytest.raises(StoreError, match="already closed"):
        store.read("a")


def test_the_file_of_a_peft_folder_brings_its_configuration(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x")
    with open_store(folder / "adapter_model.safetensors") as store:
        assert store.kind == "safetensors"
        assert store.sidecars == {"adapter_config.json": CONFIG}
    save_file(TENSORS, folder / "other.safetensors")
    with open_store(folder / "other.safetensors") as store:
        assert not store.sidecars


def test_a_missing_configuration_is_a_warning(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x", config=None)
    with open_store(folder) as store:
        check_store_holds(store, TENSORS)
        assert "no adapter_config.json" in store.warnings[0]


@pytest.mark.parametrize("config", [{**CONFIG, "base_model_name_or_path": None}, {"r": 4}])
def test_a_configuration_without_a_base_is_a_warning(tmp_path: Path, config: object) -> None:
    with open_store(peft_folder(tmp_path / "x", config)) as store:
        assert store.warnings == ("adapter_config.json names no base model",)


def test_fields_nobody_knows_are_kept(tmp_path: Path) -> None:
    config = {**CONFIG, "invented": {"x": [1]}}
    with open_store(peft_folder(tmp_path / "x", config)) as store:
        assert store.sidecars["adapter_config.json"] == config


BROKEN_CONFIGS: list[tuple[str, object, str]] = [
    ("cut", b'{"r": 4,', "not valid JSON"),
    ("empty", b"", "an empty file"),
    ("a list", [1], "not a JSON object"),
    ("a key twice", b'{"lora_alpha": 1, "lora_alpha": 2}', "`lora_alpha` stands twice"),
    ("a pointer", b"version https://git-lfs.github.com/spec/v1\nsize 700\n", "a Git LFS pointer"),
    ("a web page", b"<!DOCTYPE html>", "a web page"),
    ("not UTF-8", b'{"r": "\xff"}', "not UTF-8"),
    ("deep", b'{"r":' * 9000 + b"1" + b"}" * 9000, "nested too deeply"),
    ("large", b'{"r":"' + b"x" * 10_000_001 + b'"}', "more than the limit of 10000000"),
]


@pytest.mark.parametrize(
    ("config", "message"), [case[1:] for case in BROKEN_CONFIGS], ids=[case[0] for case in BROKEN_CONFIGS]
)
@pytest.mark.parametrize("name", ["", "adapter_model.safetensors"])
def test_a_broken_configuration_is_refused_by_its_name(
    tmp_path: Path, config: object, message: str, name: str
) -> None:
    folder = peft_folder(tmp_path / "x", config)
    with pytest.raises(StoreError) as caught:
        open_store(folder / name)
    assert message in str(caught.value)
    assert str(folder / "adapter_config.json") in str(caught.value)


def test_the_limit_of_a_configuration_can_be_raised(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x")
    with pytest.raises(StoreError, match="more than the limit of 10"):
        open_store(folder, Limits(json_bytes=10))


def test_the_configuration_alone_is_not_the_adapter(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "x")
    with pytest.raises(StoreError, match="the configuration of an adapter") as caught:
        open_store(folder / "adapter_config.json")
    assert "folder" in caught.value.hint
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match="but no adapter_model"):
        open_store(folder)


@pytest.mark.parametrize(
    "files",
    [
        ["pytorch_lora_weights.safetensors", "other.safetensors", "x.bin"],
        ["pytorch_lora_weights.bin", "optimizer.bin"],
        ["only.safetensors", "optimizer.bin", "scheduler.pt"],
        ["only.ckpt"],
    ],
)
def test_a_folder_with_one_likely_file_is_that_file(tmp_path: Path, files: list[str]) -> None:
    for position, name in enumerate(files):
        tensors = {f"t{position}": torch.ones(2)}
        if name.endswith(".safetensors"):
            save_file(tensors, tmp_path / name)
        else:
            torch.save(tensors, tmp_path / name)
    with open_store(tmp_path) as store:
        assert list(store.tensors) == ["t0"]
        assert (store.kind, store.path) == ("folder", tmp_path)


def test_a_folder_with_several_files_lists_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / f"{name}.safetensors")
    with pytest.raises(StoreError, match=r"2 tensor files: `one\.safetensors`, `two\.safetensors`") as caught:
        open_store(tmp_path)
    assert caught.value.details["candidates"] == ["one.safetensors", "two.safetensors"]


def test_a_folder_of_adapters_lists_them(tmp_path: Path) -> None:
    for name in ("style", "subject"):
        peft_folder(tmp_path / name)
    (tmp_path / "docs").mkdir()
    with pytest.raises(StoreError, match="in its folders `style`, `subject`") as caught:
        open_store(tmp_path)
    assert str(tmp_path / "style") in caught.value.hint
    assert caught.value.details["candidates"] == ["style", "subject"]


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no tensor file in it"):
        open_store(tmp_path)


INDEX = "model.safetensors.index.json"
MAP = {"a": "one.safetensors", "b": "two.safetensors"}


def shards(folder: Path, weight_map: object = MAP, *, index: bytes | None = None) -> Path:
    """Two shards, `one` with a and `two` with b, and an index that may say otherwise."""
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors", {"format": "pt", "part": "1"})
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors", {"format": "pt", "part": "2"})
    raw = index if index is not None else json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    (folder / INDEX).write_bytes(raw)
    return folder / INDEX


@pytest.mark.parametrize("opened", ["index", "folder"])
def test_shards_are_read_as_one(tmp_path: Path, opened: str) -> None:
    index = shards(tmp_path)
    with open_store(index if opened == "index" else tmp_path) as store:
        check_store_holds(store, TENSORS)
        assert store.kind == ("sharded" if opened == "index" else "folder")
        assert store.size == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
        assert store.metadata == {"format": "pt", "part": "1"}
        assert store.warnings == ("metadata `part` differs between shards; the first one's is used",)
        assert store.scalar("b") == 1.0
        with pytest.raises(StoreError, match="no tensor is called `c`"):
            store.read("c")
    with pytest.raises(StoreError, match="already closed"):
        store.read("a")


def test_shards_of_torch_files_are_read_too(tmp_path: Path) -> None:
    for name, tensor in TENSORS.items():
        torch.save({name: tensor}, tmp_path / f"{name}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.bin" for name in TENSORS}}))
    with open_store(index) as store:
        check_store_holds(store, TENSORS)


def test_a_tensor_the_index_forgets_is_read_with_a_warning(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file({"b": TENSORS["b"], "c": torch.ones(1)}, tmp_path / "two.safetensors")
    with open_store(index) as store:
        assert store.tensors.keys() == {"a", "b", "c"}
        assert "`c` stands in a shard, but not in the index" in store.warnings


OUTSIDE = ["../one.safetensors", "/etc/passwd", "x/../../one", "..\\one", "C:one", "a\0b", "\x1b[2J"]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    (tmp_path / "x").mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")
    index = shards(tmp_path / "x", {**MAP, "a": shard})
    with pytest.raises(UnsafeFile, match="lies outside the folder") as caught:
        open_store(index)
    assert str(caught.value).isprintable()


def test_a_link_never_leads_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    index = shards(tmp_path / "x")
    (tmp_path / "x" / "one.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "x" / "one.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFile, match="lies outside the folder"):
        open_store(index)


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    index = shards(snapshot)
    for position, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(position))
        path.symlink_to(f"../../blobs/{position}")
    with open_store(index) as store:
        check_store_holds(store, TENSORS)
    with open_store(snapshot) as store:
        check_store_holds(store, TENSORS)
    (blobs / "1").rename(tmp_path / "elsewhere")
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFile, match="lies outside the folder"):
        open_store(snapshot)


BAD_INDEXES: list[tuple[str, object, str]] = [
    ("missing shards", {**MAP, "c": "three.safetensors", "d": "four.safetensors"},
     "2 of 4 shards are missing: `three.safetensors`, `four.safetensors`"),
    ("a shard that cannot be", {"a": "x" * 300}, "1 of 1 shards are missing"),
    ("a folder as a shard", {"a": "."}, "1 of 1 shards are missing"),
    ("itself as a shard", {"a": INDEX}, "JSON, not a tensor file"),
    ("a tensor that is elsewhere", {"a": "two.safetensors", "b": "one.safetensors"},
     "`a` should be in `two.safetensors`, and is not"),
    ("a tensor that is nowhere", {**MAP, "c": "one.safetensors"}, "`c` should be in `one.safetensors`"),
    ("no map", [1], "no `weight_map`"),
    ("a map to a number", {"a": 1}, "no `weight_map`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("weight_map", "message"), [case[1:] for case in BAD_INDEXES], ids=[case[0] for case in BAD_INDEXES]
)
def test_an_index_that_is_wrong_says_where(tmp_path: Path, weight_map: object, message: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(shards(tmp_path, weight_map))
    assert message in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file(TENSORS, tmp_path / "two.safetensors")
    with pytest.raises(StoreError, match=r"`a` stands in two shards, the second is `two\.safetensors`"):
        open_store(index)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "`a` stands twice"),
        (b'{"weight_map":', "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "a Git LFS pointer"),
        (b"{}", "no `weight_map`"),
    ],
)
def test_a_broken_index_is_refused_by_its_cause(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(shards(tmp_path, index=raw))
    assert message in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open files")
def test_a_broken_shard_closes_the_others(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"")
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(StoreError, match="an empty file"):
            open_store(index)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
