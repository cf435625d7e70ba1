"""Files of torch.save are read as torch reads them, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from adapterkit.errors import StoreError, UnsafeFile
from adapterkit.stores import Limits, open_store
from tests.hostile_pickles import BOMBS, attacks, state_dict, tensor, text, torch_legacy, torch_zip
from tests.test_stores_safetensors import check_store_holds, every_dtype, same_bits

WAYS = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])


def saved(path: Path, value: object, as_zip: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=as_zip, pickle_protocol=protocol)
    return path


def odd_views() -> dict[str, torch.Tensor]:
    """Tensors that share storages, lie across them, or carry more than numbers."""
    torch.manual_seed(1)
    base = torch.randn(8, 6)
    noted = torch.ones(2)
    noted.note = "a Python attribute"  # type: ignore[attr-defined]
    return {
        "base": base,
        "rows": base[2:5],
        "turned": base.t(),
        "every other": base[::2, 1::3],
        "one": base[3, 4],
        "column": base[:, 2:3],
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "noted": noted,
        "one element, odd strides": torch.as_strided(torch.ones(4), (1, 4), (12345, 1)),
    }


@WAYS
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_tensor_is_what_torch_loads(tmp_path: Path, as_zip: bool, protocol: int) -> None:
    tensors = OrderedDict(every_dtype() | odd_views())
    if not as_zip:
        # torch itself cannot load these from its old format.
        newer = ("F8", "U16", "U32", "U64")
        tensors = OrderedDict((name, t) for name, t in tensors.items() if not any(x in name for x in newer))
    tensors._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    # torch warns when it loads any other protocol than 2.
    expected = torch.load(saved(tmp_path / "y.pt", tensors, as_zip, 2), weights_only=True)
    path = saved(tmp_path / "x.pt", tensors, as_zip, protocol)
    with open_store(path) as store:
        assert list(store.tensors) == list(expected)
        check_store_holds(store, expected)
        assert (store.kind, store.path, store.size) == ("pickle", path, path.stat().st_size)
        assert not store.warnings


def test_a_tensor_that_lies_in_order_is_not_copied(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(4, 4), "b": torch.ones(4, 4).t()})
    with open_store(path) as store:
        assert store.tensor("a").data_ptr() == store.tensor("a").data_ptr()
        one, other = store.tensor("b"), store.tensor("b")
        assert one.data_ptr() != other.data_ptr()


@WAYS
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path, as_zip: bool) -> None:
    path = saved(tmp_path / "x.pt", {"a": torch.ones(4, 4)}, as_zip)
    before = path.read_bytes()
    with open_store(path) as store:
        store.tensor("a").zero_()
    assert path.read_bytes() == before


def test_a_compressed_file_is_read_too(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000.0), "b": torch.ones(3).half()}
    source = zipfile.ZipFile(saved(tmp_path / "x.pt", tensors))
    with source, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with open_store(tmp_path / "y.pt") as store:
        check_store_holds(store, tensors)


X = torch.ones(2)
NUMBERS = [0, -1, 255, 256, 70_000, -(1 << 31), 1 << 40, -(1 << 70), 1e300]
CHECKPOINTS: list[tuple[str, object, dict[str, torch.Tensor], dict[str, object], int]] = [
    ("a state dict in a checkpoint", {"state_dict": {"w": X}, "epoch": 5, "lr": 0.5, "name": "n"},
     {"w": X}, {"epoch": 5, "lr": 0.5, "name": "n"}, 0),
    ("wrapped twice", {"model": {"state_dict": {"w": X}, "step": 3}}, {"w": X}, {"step": 3}, 0),
    ("an optimizer beside", {"module": {"w": X}, "optimizer": {"state": {0: {"m": X}}}}, {"w": X}, {}, 1),
    ("two that could be meant", {"model": {"w": X}, "lora": {"w": X}}, {"model.w": X, "lora.w": X}, {}, 0),
    ("a tensor beside the wrapper", {"model": {"w": X}, "v": X}, {"model.w": X, "v": X}, {}, 0),
    ("dicts in dicts", {"unet": {"b": {"w": X}}, "te": [X, {"v": X}]},
     {"unet.b.w": X, "te.0": X, "te.1.v": X}, {}, 0),
    ("a wrapper's word for something else", {"model": {"name": "x"}, "lora": {"w": X}},
     {"w": X}, {"model": {"name": "x"}}, 0),
    ("long texts and bytes", {"w": X, "long": "ü" * 70_000, "raw": b"\x00" * 300},
     {"w": X}, {"long": "ü" * 70_000, "raw": "00" * 300}, 0),
    ("numbers of every size", {"w": X, "n": NUMBERS}, {"w": X}, {"n": NUMBERS}, 0),
    ("numbers as keys", {1: X, "t": {True: X}}, {"1": X, "t.True": X}, {}, 0),
    ("settings", {"w": X, "cfg": {"r": 4, "targets": ["q", None]}, "size": torch.Size([2, 3]), "none": None},
     {"w": X}, {"cfg": {"r": 4, "targets": ["q", None]}, "size": [2, 3], "none": None}, 0),
    ("numpy numbers, dtypes, devices, bytes",
     {"w": X, "f": np.float64(2.5), "i": np.int32(-3), "b": np.bool_(True), "dtype": torch.float16,
      "device": torch.device("cuda:1"), "raw": b"\x00\xff"}, {"w": X},
     {"f": 2.5, "i": -3, "b": True, "dtype": "torch.float16", "device": "cuda:1", "raw": "00ff"}, 0),
    ("nothing but settings", {"a": 1}, {}, {"a": 1}, 0),
]  # fmt: skip


@WAYS
@pytest.mark.parametrize(
    ("value", "tensors", "settings", "warnings"),
    [case[1:] for case in CHECKPOINTS],
    ids=[case[0] for case in CHECKPOINTS],
)
def test_tensors_get_names_and_the_rest_is_metadata(
    tmp_path: Path,
    as_zip: bool,
    value: object,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, object],
    warnings: int,
) -> None:
    with open_store(saved(tmp_path / "x.ckpt", value, as_zip)) as store:
        check_store_holds(store, tensors)
        plain = {key: v if isinstance(v, str) else json.dumps(v) for key, v in settings.items()}
        assert store.metadata == plain
        assert len(store.warnings) == warnings


@pytest.mark.parametrize(("file", "component"), [("x.pt", "unet"), ("x.text_encoder.pt", "text_encoder")])
def test_a_bare_list_is_ups_and_downs_in_turn(tmp_path: Path, file: str, component: str) -> None:
    ups_and_downs = [torch.full((2, 1), float(i)) for i in range(4)]
    with open_store(saved(tmp_path / file, ups_and_downs)) as store:
        roles = [f"{component}:0:up", f"{component}:0:down", f"{component}:1:up", f"{component}:1:down"]
        check_store_holds(store, dict(zip(roles, ups_and_downs, strict=True)))


@pytest.mark.parametrize("value", [[X], [X, 1], X, 5, "text", None])
def test_tensors_without_names_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(saved(tmp_path / "x.pt", value))
    assert caught.value.code == "no-names"


@pytest.mark.parametrize("value", [{1: X, "1": X}, {"a": {"b": X}, "a.b": X}])
def test_names_that_meet_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(StoreError, match="stands twice"):
        open_store(saved(tmp_path / "x.pt", value))


def test_a_name_that_drives_a_terminal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"invisible characters"):
        open_store(saved(tmp_path / "x.pt", {"\x1b[2J": X}))


def test_a_pickle_named_safetensors_is_read_with_a_warning(tmp_path: Path) -> None:
    with open_store(saved(tmp_path / "x.safetensors", {"a": X})) as store:
        assert (store.kind, list(store.tensors)) == ("pickle", ["a"])
        assert "a pickle named .safetensors" in store.warnings[0]


@WAYS
@pytest.mark.parametrize("name", attacks(Path("canary")))
def test_an_attack_is_refused_and_named_and_nothing_is_run(tmp_path: Path, as_zip: bool, name: str) -> None:
    canary = tmp_path / "canary"
    pickled, wanted = attacks(canary)[name]
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(pickled) if as_zip else torch_legacy(pickled))
    modules = set(sys.modules)
    with pytest.raises(UnsafeFile) as caught:
        open_store(path)
    assert wanted in str(caught.value)
    assert str(caught.value).startswith(f"{path}: refused")
    assert not canary.exists()
    assert set(sys.modules) == modules


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), {"s": {1}}, {"p": Path("x")}, {"a": np.zeros(2)}])
def test_values_that_are_no_tensors_are_refused_by_name(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsafeFile, match=r"torch\.nn|set|pathlib|_reconstruct"):
        open_store(saved(tmp_path / "x.pt", value))


def test_a_plain_attack_without_torch_around_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(attacks(tmp_path / "canary")["os.system"][0])
    with pytest.raises(UnsafeFile, match=r"os\.system"):
        open_store(tmp_path / "x.bin")
    (tmp_path / "y.bin").write_bytes(pickle.dumps({"a": 1}, 4))
    with pytest.raises(StoreError, match=r"not one of torch\.save"):
        open_store(tmp_path / "y.bin")


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_time(tmp_path: Path, name: str) -> None:
    pickled, message = BOMBS[name]
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(pickled, {"0": bytes(4)}))
    start = time.process_time()
    with pytest.raises(StoreError) as caught:
        open_store(path, Limits(tensors=10_000))
    assert message in str(caught.value)
    assert time.process_time() - start < 2


def test_a_pickle_of_endless_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(torch_zip(b"\x80\x02}" + b"q\x00" * 10_000 + b"."))
    with pytest.raises(StoreError, match="more than 1000 steps"):
        open_store(tmp_path / "x.pt", Limits(opcodes=1000))
    with pytest.raises(StoreError, match="more than the limit of 1000"):
        open_store(tmp_path / "x.pt", Limits(header_bytes=1000))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (3, 1), 1),
        ((7,), (1,), 0),
        ((2,), (6,), 0),
        ((1 << 40,), (0,), 0),
        ((2,), (1 << 62,), 0),
        ((1 << 62, 1 << 62), (0, 0), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 3),
        ((2,), (1,), -1),
        ((2,), (1, 1), 0),
        ((0, 1 << 62, 1 << 62), (1, 1, 1), 0),
        ((1,) * 9, (1,) * 9, 0),
    ],
)
def test_a_tensor_never_reaches_out_of_its_storage(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(torch_zip(state_dict(tensor(shape, strides, 6, offset)), {"0": bytes(24)}))
    with pytest.raises(StoreError):
        open_store(path)


def test_a_storage_is_as_large_as_its_member(tmp_path: Path) -> None:
    for size in (0, 20, 28):
        (tmp_path / "x.pt").write_bytes(torch_zip(state_dict(tensor((1,), (1,), 6)), {"0": bytes(size)}))
        with pytest.raises(StoreError, match="another size than its member"):
            open_store(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(torch_zip(state_dict(tensor((1,), (1,), 6))))
    with pytest.raises(StoreError, match="no member holds storage 0"):
        open_store(tmp_path / "x.pt")


GOOD = state_dict(tensor((6,), (1,), 6))


def zip_of(*members: tuple[str, bytes], **options: int) -> bytes:
    """An archive of these members; options are set on the directory's entry of the last one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            if name in archive.namelist():
                archive.filelist.pop()
            archive.writestr(name, data)
        for key, value in options.items():
            setattr(archive.filelist[-1], key, value)
    return buffer.getvalue()


BASE = [("x/data.pkl", GOOD), ("x/data/0", bytes(24))]


def twice() -> bytes:
    """Two members of one name, which the zipfile module warns of when writing."""
    data = zip_of(*BASE, ("x/data/1", bytes(24)))
    return data.replace(b"x/data/1", b"x/data/0")


def overlapping() -> bytes:
    """A directory in which two members share their bytes, as in a bomb."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in [*BASE, ("x/data/1", bytes(24))]:
            archive.writestr(name, data)
        archive.filelist[-1].header_offset = archive.filelist[-2].header_offset
    return buffer.getvalue()


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "a second pickle": (zip_of(*BASE, ("x/other.pkl", GOOD)), "holds more than tensors: `x/other.pkl`"),
    "a second data.pkl": (zip_of(*BASE, ("y/data.pkl", GOOD)), "torch.save writes no `y/data.pkl`"),
    "a TorchScript program": (zip_of(*BASE, ("x/constants.pkl", GOOD)), "a TorchScript program"),
    "a member outside the folder": (zip_of(*BASE, ("z", b"")), "torch.save writes no `z`"),
    "a pickle deep down": (zip_of(("x/y/data.pkl", GOOD)), "torch.save writes no `x/y/data.pkl`"),
    "a way out": (zip_of(*BASE, ("x/../../etc/passwd", b"")), "its name leaves the archive"),
    "an absolute name": (zip_of(*BASE, ("/etc/passwd", b"")), "its name leaves the archive"),
    "a Windows way out": (zip_of(*BASE, ("x/..\\y", b"")), "its name leaves the archive"),
    "a link": (zip_of(*BASE, external_attr=0o120777 << 16), "it is a link"),
    "an encrypted member": (zip_of(*BASE, flag_bits=1), "its flags are 0x0001"),
    "a masked directory": (zip_of(*BASE, flag_bits=0x2000), "its flags are 0x2000"),
    "an unknown compression": (zip_of(*BASE, compress_type=zipfile.ZIP_LZMA), "its compression is 14"),
    "sizes that disagree": (zip_of(*BASE, file_size=1 << 30), "its sizes disagree"),
    "a member twice": (twice(), "it is there twice"),
    "members that overlap": (overlapping(), "members overlap"),
    "a header that is gone": (
        zip_of(*BASE).replace(b"PK\3\4", b"PK\0\0").replace(b"PK\0\0", b"PK\3\4", 1), "it has no header"),
    "a header of another name": (zip_of(*BASE).replace(b"x/data/0", b"x/data/9", 1), "disagree"),
    "a header of other flags": (zip_of(*BASE, flag_bits=0x0008), "its header and the directory disagree"),
    "a member into the directory": (zip_of(*BASE, compress_size=60, file_size=60), "runs into the directory"),
    "something before the archive": (b"PK\x03\x04junk" + zip_of(*BASE), "something lies before the first"),
    "something behind the pickle": (torch_zip(GOOD + GOOD, {"0": bytes(24)}), "something follows the pickle"),
    "an inflated size that lies": (
        torch_zip(GOOD, {"0": bytes(24)}, method=zipfile.ZIP_DEFLATED).replace(
            struct.pack("<I", len(GOOD)), struct.pack("<I", len(GOOD) - 1)), "another size than it says"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_torch_would_not_write_is_refused(tmp_path: Path, name: str) -> None:
    data, message = ARCHIVES[name]
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UnsafeFile) as caught:
        open_store(tmp_path / "x.pt")
    assert message in str(caught.value)


def test_a_zip_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    pickled = state_dict(tensor((1,), (1,), 25_000_000))
    data = torch_zip(pickled, {"0": bytes(100_000_000)}, method=zipfile.ZIP_DEFLATED)
    assert len(data) < 200_000
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(StoreError, match="would be 100000000 bytes, more than the limit of 1000000"):
        open_store(tmp_path / "x.pt", Limits(inflated_bytes=1_000_000))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zip_of(("a.safetensors", b"x")), "a zip archive, not a tensor file; it holds `a.safetensors`"),
        (zip_of(), "not a tensor file"),
        (zip_of(*BASE)[:-30], "damaged or cut torch file"),
        (zip_of(*BASE)[:60], "damaged or cut torch file"),
        (zip_of(*BASE, ("x/byteorder", b"big")), "written on a big-endian machine"),
    ],
    # Archives hold the time they were made, so their bytes are no names for tests.
    ids=["of a tensor file", "empty", "without its end", "a beginning", "big-endian"],
)
def test_other_archives_are_called_by_their_name(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path / "x.pt")
    assert message in str(caught.value)


def test_a_legacy_file_fills_its_bytes_exactly(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": X, "b": torch.ones(3)}, as_zip=False)
    good = path.read_bytes()
    for data, message in [(good[:-1], "cut short"), (good[:-20], "cut short"), (good + b"x", "more follows")]:
        path.write_bytes(data)
        with pytest.raises(StoreError, match=message) as caught:
            open_store(path)
        assert caught.value.code == ("trailing-bytes" if message == "more follows" else "truncated")
    pickled = state_dict(tensor((6,), (1,), 6, view=b"N"))
    path.write_bytes(torch_legacy(pickled, bytes(8 + 24), ("0",)))
    with pytest.raises(StoreError, match="another size than it says"):
        open_store(path)
    for keys in (("1",), (), ("0", "0"), ("0", ("0",)), None, 5):
        path.write_bytes(torch_legacy(pickled, struct.pack("<q", 6) + bytes(24), keys))
        with pytest.raises(StoreError, match="list of storages is wrong"):
            open_store(path)


@WAYS
def test_damaged_files_never_end_in_a_foreign_error(tmp_path: Path, as_zip: bool) -> None:
    chance = random.Random(4)
    path = saved(tmp_path / "x.pt", {"a": torch.ones(3), "b": {"c": X.half()}, "d": 4, "e": "text"}, as_zip)
    good = path.read_bytes()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        try:
            with open_store(path, Limits(opcodes=10_000)) as store:
                for name in store.tensors:
                    store.read(name)
        except StoreError:
            continue


def test_a_large_checkpoint_opens_quickly(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {f"layer.{i}.weight": torch.zeros(2, 2) for i in range(2500)})
    start = time.process_time()
    with open_store(path) as store:
        assert len(store.tensors) == 2500
    # About 0.15 s where this was written.
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(("first", "count"), [(2, 3), (0, 6), (0, 3), (3, 3)])
def test_views_of_old_files_are_read(tmp_path: Path, first: int, count: int) -> None:
    """torch before 0.4 wrote a storage that is part of another one as a view of it."""
    numbers = torch.arange(6.0)
    made = tensor((count,), (1,), 6, view=b"(" + text("view") + bytes([75, first, 75, count]) + b"t")
    data = struct.pack("<q6f", 6, *numbers.tolist())
    (tmp_path / "x.pt").write_bytes(torch_legacy(state_dict(made), data, ("0",)))
    with open_store(tmp_path / "x.pt") as store:
        assert same_bits(store.tensor("a"), numbers[first : first + count])


@pytest.mark.parametrize(
    "view", [b"K\x04K\x03", b"J\xff\xff\xff\xffK\x01", b"NK\x01", b"K\x04J\xff\xff\xff\xff"]
)
def test_views_that_leave_their_storage_are_refused(tmp_path: Path, view: bytes) -> None:
    made = tensor((1,), (1,), 6, view=b"(" + text("view") + view + b"t")
    (tmp_path / "x.pt").write_bytes(torch_legacy(state_dict(made), bytes(32), ("0",)))
    with pytest.raises(StoreError, match="a view that leaves its storage"):
        open_store(tmp_path / "x.pt")


def test_a_storage_described_twice_is_refused(tmp_path: Path) -> None:
    one, other = tensor((1,), (1,), 6, view=b"N"), tensor((1,), (1,), 7, view=b"N")
    pickled = b"\x80\x02}" + text("a") + one + b"s" + text("b") + other + b"s."
    (tmp_path / "x.pt").write_bytes(torch_legacy(pickled, bytes(40), ("0",)))
    with pytest.raises(StoreError, match="described twice"):
        open_store(tmp_path / "x.pt")
