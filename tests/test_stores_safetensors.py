"""A safetensors file is read as the real library reads it, or refused by its true cause."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from adapterkit.errors import AdapterkitError, StoreError
from adapterkit.stores import (
    DTYPES,
    Limits,
    Store,
    TensorInfo,
    dtype_name,
    memory_store,
    open_store,
    torch_dtype,
)
from adapterkit.stores.header import parse_header
from adapterkit.stores.numbers import first_number
from tests import hostile


def written(folder: Path, data: bytes, name: str = "x.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def check_refused(path: Path, code: str, message: str, hint: str = "") -> None:
    """Refused with one of our errors, which names the file and the cause; the file stays as it was."""
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        open_store(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()
    assert path.read_bytes() == before
    json.dumps(caught.value.as_json())


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [case[1:] for case in hostile.BROKEN_SAFETENSORS],
    ids=[case[0] for case in hostile.BROKEN_SAFETENSORS],
)
def test_a_broken_header_is_refused(tmp_path: Path, data: bytes, code: str, message: str) -> None:
    check_refused(written(tmp_path, data), code, message)


@pytest.mark.parametrize(
    ("data", "code", "message", "hint"),
    [case[1:] for case in hostile.NOT_TENSORS],
    ids=[case[0] for case in hostile.NOT_TENSORS],
)
def test_what_is_not_a_tensor_file_is_called_by_its_name(
    tmp_path: Path, data: bytes, code: str, message: str, hint: str
) -> None:
    check_refused(written(tmp_path, data), code, message.replace("\\\\", "\\"), hint)


def test_a_cut_download_tells_how_much_is_missing(tmp_path: Path) -> None:
    whole = hostile.safetensors_bytes(
        {"a": {"dtype": "U8", "shape": [10_000], "data_offsets": [0, 10_000]}}, bytes(10_000)
    )
    path = written(tmp_path, whole[:503])
    check_refused(path, "truncated", f"the header promises {len(whole)} bytes, the file has 503 (4 %)")


def test_limits_can_be_raised(tmp_path: Path) -> None:
    path = written(tmp_path, hostile.one(shape=[1] * 8 + [24], dtype="U8"))
    with pytest.raises(StoreError, match="limit of 8"):
        open_store(path)
    with open_store(path, limits=Limits(dimensions=9)) as store:
        assert store.tensors["a"].shape == (1,) * 8 + (24,)
    with pytest.raises(StoreError, match="more than the limit of 10"):
        open_store(path, limits=Limits(header_bytes=10))
    with pytest.raises(StoreError, match="1 tensors, more than the limit of 0"):
        open_store(path, limits=Limits(tensors=0, dimensions=9))


def test_a_header_of_millions_of_tensors_is_refused_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, struct.pack("<Q", 92_000_000) + b"{" + bytes(10))
    with path.open("r+b") as file:
        file.truncate(92_000_100)
    start = time.perf_counter()
    with pytest.raises(StoreError, match="more than the limit of 25000000"):
        open_store(path)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "name", ["with space", "with\nnewline", "émoji 🎈", "-x", "x" * 243, "tab\t", "\x1b[31m", "con"]
)
def test_unusual_paths_are_read_and_shown_safely(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, hostile.safetensors_bytes(hostile.GOOD), f"{name}.safetensors"[:255])
    with open_store(path) as store:
        assert list(store.tensors) == ["a", "b"]
    path.write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        open_store(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "missing", "missing/x"])
def test_paths_that_lead_nowhere_are_store_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError):
        open_store(f"{tmp_path}/{name}")


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(StoreError, match="not a regular file"):
            open_store(path)


def test_a_suffix_that_lies_is_a_warning(tmp_path: Path) -> None:
    with open_store(written(tmp_path, hostile.safetensors_bytes(hostile.GOOD), "x.pt")) as store:
        assert store.kind == "safetensors"
        assert "named .pt" in store.warnings[0]


def test_a_file_without_tensors_or_metadata_is_a_file(tmp_path: Path) -> None:
    with open_store(written(tmp_path, hostile.safetensors_bytes("{}", b""))) as store:
        assert (dict(store.tensors), dict(store.metadata), store.size) == ({}, {}, 10)
    with open_store(written(tmp_path, hostile.safetensors_bytes('{"__metadata__":null}', b""))) as store:
        assert not store.metadata


def every_dtype() -> dict[str, torch.Tensor]:
    """Random bytes seen as each dtype safetensors' own torch module knows, and some shapes."""
    torch.manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype.torch and name != "F8_E8M0":
            high = 2 if name == "BOOL" else 256
            raw = torch.randint(0, high, (4 * 6 * dtype.bits // 8,), dtype=torch.uint8)
            tensors[f"x.{name}"] = raw.view(torch_dtype(name)).reshape(4, 6)
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "minus-0": torch.ones(3).half(),
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    first, second = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)


def check_store_holds(store: Store, tensors: dict[str, torch.Tensor]) -> None:
    assert store.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        info = store.tensors[name]
        assert info == TensorInfo(name, dtype_name(expected.dtype), tuple(expected.shape))
        assert info.elements == expected.numel()
        assert info.nbytes == expected.numel() * expected.element_size()
        assert same_bits(store.tensor(name), expected)
        assert bytes(store.read(name)) == bytes(memory_store({"x": expected}).read("x"))
        assert store.read(name).readonly


def test_files_of_the_real_library_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_dtype()
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"a": "1", "ü": "two\nlines"})
    with open_store(path) as store:
        check_store_holds(store, tensors)
        assert store.metadata == {"a": "1", "ü": "two\nlines"}
        assert (store.kind, store.path, store.size) == ("safetensors", path, path.stat().st_size)
        assert not store.warnings
        assert not store.sidecars


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header: dict[str, object] = {"b": hostile.GOOD["b"], "a": hostile.GOOD["a"]}
    with open_store(written(tmp_path, hostile.safetensors_bytes(header))) as store:
        assert list(store.tensors) == ["a", "b"]


def test_bytes_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    data = struct.pack("<Bfd", 7, 1.5, -2.5)
    header = {
        name: {"dtype": dtype, "shape": [1], "data_offsets": list(span)}
        for name, dtype, span in [("a", "U8", (0, 1)), ("b", "F32", (1, 5)), ("c", "F64", (5, 13))]
    }
    raw = json.dumps(header)
    for padding in range(8):
        path = written(tmp_path, hostile.safetensors_bytes(raw + " " * padding, data))
        with open_store(path) as store:
            assert [store.tensor(name).item() for name in "abc"] == [7, 1.5, -2.5]
            assert [store.scalar(name) for name in "abc"] == [7, 1.5, -2.5]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path, hostile.safetensors_bytes(hostile.GOOD))
    before = path.read_bytes()
    with open_store(path) as store:
        store.tensor("a").zero_()
    assert path.read_bytes() == before


def test_aligned_tensors_are_not_copied(tmp_path: Path) -> None:
    with open_store(written(tmp_path, hostile.safetensors_bytes(hostile.GOOD))) as store:
        assert store.tensor("a").data_ptr() == store.tensor("a").data_ptr()


def test_tensors_outlive_their_store(tmp_path: Path) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "x.safetensors")
    with open_store(tmp_path / "x.safetensors") as store:
        kept = store.tensor("a")
    assert torch.equal(kept, torch.arange(1000.0))
    for use in (store.read, store.tensor, store.scalar):
        with pytest.raises(StoreError, match="already closed"):
            use("a")


def test_a_name_that_is_not_there_is_a_store_error(tmp_path: Path) -> None:
    with open_store(written(tmp_path, hostile.safetensors_bytes(hostile.GOOD))) as store:
        for use in (store.read, store.tensor, store.scalar, store.info):
            with pytest.raises(StoreError, match="no tensor is called `c`"):
                use("c")


@pytest.mark.parametrize("change", ["cut", "grown", "touched"])
def test_a_file_that_changes_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path, change: str) -> None:
    save_file({"a": torch.zeros(100_000)}, tmp_path / "x.safetensors")
    with open_store(tmp_path / "x.safetensors") as store:
        if change == "touched":
            os.utime(tmp_path / "x.safetensors", (1, 1))
        else:
            os.truncate(tmp_path / "x.safetensors", 10 if change == "cut" else 900_000)
        with pytest.raises(StoreError, match="changed while it was being read"):
            store.read("a")


def test_where_mapping_is_refused_windows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    tensors = every_dtype()
    save_file(tensors, tmp_path / "x.safetensors")
    with open_store(tmp_path / "x.safetensors") as store:
        check_store_holds(store, tensors)
    torch.save(tensors, tmp_path / "x.pt")
    with open_store(tmp_path / "x.pt") as store:
        check_store_holds(store, tensors)


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.torch and name != "C64"])
def test_the_first_number_is_what_torch_says(name: str) -> None:
    dtype = torch_dtype(name)
    patterns = [bytes([low, high] * 4) for low in (0, 1, 0x7F, 0x80, 0xFF) for high in range(256)]
    if name == "BOOL":
        patterns = [bytes(8), b"\1" * 8]
    for pattern in patterns:
        expected = float(torch.frombuffer(bytearray(pattern), dtype=dtype)[0].to(torch.float64))
        found = first_number(memoryview(pattern), name)
        assert found == expected or (found != found and expected != expected), (name, pattern.hex())


def test_scalars_come_from_every_kind_of_store() -> None:
    store = memory_store({"alpha": torch.tensor(16, dtype=torch.int64), "none": torch.zeros(0)})
    assert store.scalar("alpha") == 16.0
    with pytest.raises(StoreError, match="is empty"):
        store.scalar("none")
    with pytest.raises(StoreError, match="not a real number"):
        memory_store({"z": torch.tensor(1j)}).scalar("z")


def test_a_store_in_memory_offers_what_it_was_given() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = every_dtype() | {"turned": base.t(), "part": base[1:3, ::2], "leaf": torch.nn.Parameter(base)}
    store = memory_store(tensors, {"k": "v"}, {"adapter_config.json": {"r": 4}})
    check_store_holds(store, tensors)
    assert (store.kind, store.path, store.metadata) == ("memory", None, {"k": "v"})
    assert store.sidecars == {"adapter_config.json": {"r": 4}}
    assert store.size == sum(x.numel() * x.element_size() for x in tensors.values())


def test_dtypes_without_a_name_are_refused() -> None:
    with pytest.raises(StoreError, match="complex128"):
        memory_store({"z": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(StoreError, match="no dtype for `F6_E2M3`"):
        torch_dtype("F6_E2M3")


def test_sub_byte_tensors_are_carried_as_bytes(tmp_path: Path) -> None:
    with open_store(written(tmp_path, hostile.one("F4", [6, 8], 0, 24))) as store:
        assert bytes(store.read("a")) == hostile.DATA
        with pytest.raises(StoreError, match="torch has no dtype for `F4`"):
            store.tensor("a")


def test_a_big_endian_machine_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(StoreError, match="big-endian machines are not supported"):
        open_store(written(tmp_path, hostile.safetensors_bytes(hostile.GOOD)))


def test_reading_headers_and_alphas_needs_no_torch(tmp_path: Path) -> None:
    tensors = {"alpha": torch.tensor(4.0).bfloat16(), "w": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    torch.save(tensors, tmp_path / "y.pt", _use_new_zipfile_serialization=False)
    program = (
        "import sys; from adapterkit.stores import open_store, write_safetensors\n"
        "for name in ('x.safetensors', 'x.pt', 'y.pt'):\n"
        f"    with open_store({str(tmp_path)!r} + '/' + name) as store:\n"
        "        assert store.scalar('alpha') == 4.0 and store.tensors['w'].shape == (2, 2)\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


WORDS = (
    rb'0 -0 1 -1 24 8 " { } [ ] , : null true 1e0 0.0 NaN 00 18446744073709551616 9223372036854775807'
    rb' F32 F4 F16 U8 __metadata__ "x":1, "a" [], {"k":"v"} \ud800 \u0000 \n'
)
TOKENS = [*WORDS.split(), b"", b" ", b"\n", b"\xff", b"\xc3\xa9", b"\0", b"\x0b"]


def mutated(header: bytes, chance: random.Random) -> bytes:
    """A header with a few places overwritten, cut or filled with what has meaning in JSON."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        start = chance.randrange(len(header) + 1)
        stop = start + chance.choice((0, 0, 1, 1, 2, 5))
        header = header[:start] + chance.choice(TOKENS) + header[stop:]
    return header


def test_what_we_accept_the_real_library_accepts_and_reads_alike() -> None:
    chance = random.Random(1)
    plain = json.dumps(hostile.GOOD).encode()
    rich = json.dumps(
        {
            "__metadata__": {"k": "v", "long": "some text here"},
            **hostile.GOOD,
            "e": {"dtype": "F32", "shape": [0], "data_offsets": [24, 24]},
        }
    ).encode()
    accepted = 0
    for _ in range(20_000):
        raw = mutated(chance.choice((plain, rich)), chance)
        try:
            ours = parse_header(raw, len(hostile.DATA), "x", Limits())
        except AdapterkitError:
            continue
        accepted += 1
        theirs = safetensors.deserialize(hostile.safetensors_bytes(raw))
        assert {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in theirs} == {
            name: (info.dtype, info.shape, hostile.DATA[slice(*ours.spans[name])])
            for name, info in ours.tensors.items()
        }
    assert accepted > 600


def test_damaged_files_never_end_in_a_foreign_error(tmp_path: Path) -> None:
    chance = random.Random(2)
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(2).half()}, path, {"k": "v"})
    good = path.read_bytes()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice((len(data), len(data), chance.randrange(len(data))))])
        try:
            with open_store(path) as store:
                for name in store.tensors:
                    store.read(name)
        except StoreError:
            continue
        assert load_file(path).keys() == store.tensors.keys()


def test_a_header_of_2500_tensors_is_checked_quickly() -> None:
    header = {
        f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": {
            "dtype": "F16",
            "shape": [16, 320],
            "data_offsets": [i * 10240, (i + 1) * 10240],
        }
        for i in range(2500)
    }
    raw = json.dumps(header).encode()
    spent = []
    for _ in range(5):
        start = time.process_time()
        parse_header(raw, 2500 * 10240, "x", Limits())
        spent.append(time.process_time() - start)
    # About 10 ms where this was written; the bound leaves room for slower machines.
    assert min(spent) < 0.05
