"""What is written is what was asked for, all of it, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapterkit.errors import StoreError
from adapterkit.stores import (
    DATA_SHA256,
    TensorInfo,
    Written,
    canonical_order,
    memory_store,
    open_store,
    write_json,
    write_safetensors,
)
from tests.test_stores_safetensors import every_dtype, same_bits


def write(
    path: Path, tensors: dict[str, torch.Tensor], *, overwrite: bool = False, **metadata: str
) -> Written:
    store = memory_store(tensors)
    header = canonical_order(store.tensors.values())
    contents = ((info.name, store.tensor(info.name)) for info in header)
    return write_safetensors(path, header, contents, metadata, overwrite=overwrite)


ONE = [TensorInfo("a", "U8", (4,))]


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_real_library_reads_back_every_bit(tmp_path: Path) -> None:
    tensors = every_dtype()
    done = write(tmp_path / "x.safetensors", tensors, format="pt", note="über\nzwei")
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "über\nzwei"}
    data = (tmp_path / "x.safetensors").read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert done.sha256 == hashlib.sha256(data).hexdigest()
    assert done.data_sha256 is None
    assert done.size == len(data)
    assert start % 8 == 0


def test_in_canonical_order_the_bytes_are_the_real_library_s(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path / "ours", tensors, k="v")
    save_file(tensors, tmp_path / "theirs", {"k": "v"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    write(tmp_path / "one", tensors, x="1", y="2")
    write(tmp_path / "two", dict(reversed(tensors.items())), y="2", x="1")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_keeps_the_order_it_is_given(tmp_path: Path) -> None:
    header = [TensorInfo("z", "U8", (2,)), TensorInfo("a", "U8", (1,)), TensorInfo("m", "U8", (0,))]
    write_safetensors(tmp_path / "x", header, [("z", b"zz"), ("a", memoryview(b"a")), ("m", b"")], {})
    with open_store(tmp_path / "x") as store:
        assert list(store.tensors.values()) == header
        assert bytes(store.read("z")) == b"zz"


def test_tensors_that_lie_oddly_are_written_in_row_major_order(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": base.t(),
        "part": base[1:3, ::2],
        "leaf": torch.nn.Parameter(base[0]),
        "conj": base * 1j,
    }
    tensors["conj"] = tensors["conj"].conj()
    write(tmp_path / "x", tensors)
    read = load_file(tmp_path / "x")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_hash_of_the_data_can_stand_in_front_of_it(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(1000.0)}
    done = write(tmp_path / "x", tensors, sshs_model_hash=DATA_SHA256, other=f"0x{DATA_SHA256}", plain="p")
    with open_store(tmp_path / "x") as store:
        assert store.metadata == {
            "sshs_model_hash": done.data_sha256, "other": f"0x{done.data_sha256}", "plain": "p",
        }  # fmt: skip
        assert torch.equal(store.tensor("a"), tensors["a"])
    assert done.data_sha256 == hashlib.sha256(tensors["a"].numpy().tobytes()).hexdigest()
    assert done.sha256 == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_large_tensors_are_written_without_a_copy(tmp_path: Path) -> None:
    tensor = torch.zeros(40_000_000, dtype=torch.uint8)
    raw = bytes(40_000_000)
    header = [TensorInfo("a", "U8", (40_000_000,)), TensorInfo("b", "U8", (40_000_000,))]
    write(tmp_path / "warm", {"a": torch.zeros(1)})
    tracemalloc.start()
    write_safetensors(tmp_path / "x", header, [("a", tensor), ("b", raw)], {"h": DATA_SHA256})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("header", "produced", "message"),
    [
        (ONE, [], "expected `a`"),
        (ONE, [("b", b"1234")], "expected `a`, was given `b`"),
        (ONE, [("a", b"123")], "`a` has 3 bytes, the header says 4"),
        (ONE, [("a", b"1234"), ("b", b"")], "was given `b` after the last tensor"),
        (ONE, [("a", torch.zeros(4))], "the header says"),
        (ONE, [("a", torch.zeros(2, 2, dtype=torch.uint8))], "the header says"),
        (ONE, [("a", torch.zeros(4, dtype=torch.uint8).to_sparse())], "no plain bytes"),
        (ONE * 2, [("a", b"1234")] * 2, "`a` cannot be written twice"),
        ([TensorInfo("__metadata__", "U8", (4,))], [], "`__metadata__` cannot be written"),
        ([TensorInfo("a\x1b[2J", "U8", (4,))], [], "invisible characters"),
        ([TensorInfo("\ud800", "U8", (4,))], [], "invisible characters"),
        ([TensorInfo("a", "F17", (4,))], [], "unknown dtype `F17`"),
        ([TensorInfo("a", "U8", (-4,))], [], "impossible shape"),
        ([TensorInfo("a", "F4", (3,))], [], "impossible shape"),
    ],
)
def test_contents_that_do_not_fit_leave_nothing(
    tmp_path: Path, header: list[TensorInfo], produced: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(StoreError, match=message.replace("(", "\\(")):
        write_safetensors(tmp_path / "x", header, produced, {})
    assert not contents_of(tmp_path)


@pytest.mark.parametrize(("key", "text"), [("a\0", ""), ("k", "\ud800")])
def test_metadata_no_reader_would_take_is_not_written(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(StoreError):
        write_safetensors(tmp_path / "x", ONE, [("a", b"1234")], {key: text})
    assert not contents_of(tmp_path)


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(StoreError, match="exists already") as caught:
        write(path, {"a": torch.ones(2)})
    assert "--force" in caught.value.hint
    assert contents_of(tmp_path) == {"x": b"old"}
    write(path, {"a": torch.ones(2)}, overwrite=True)
    assert load_file(path).keys() == {"a"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device"])
def test_what_is_no_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path(os.devnull)
        case _:
            path.symlink_to(os.devnull)
    before = path.stat().st_mode
    with pytest.raises(StoreError, match=r"is a folder|not a regular file"):
        write(path, {"a": torch.ones(2)}, overwrite=True)
    assert path.stat().st_mode == before


@pytest.mark.parametrize("name", ["missing/x", "x" * 300, "nul\0"])
def test_places_that_do_not_exist_are_store_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError):
        write(tmp_path / name, {"a": torch.ones(2)})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_a_store_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="permission denied"):
        write(tmp_path / "x", {"a": torch.ones(2)})
    tmp_path.chmod(0o700)


def test_permissions_are_those_the_umask_gives_or_those_before(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new", {"a": torch.ones(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write(tmp_path / "new", {"a": torch.ones(2)}, overwrite=True)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/real")
    write(tmp_path / "link", {"a": torch.ones(2)})
    assert (tmp_path / "link").is_symlink()
    assert load_file(tmp_path / "there" / "real").keys() == {"a"}


@pytest.mark.parametrize("way", ["the same path", "a link", "a hard link"])
def test_a_file_can_be_written_over_while_it_is_read(tmp_path: Path, way: str) -> None:
    """The saving that once filled files with zeros: safetensors issue 762."""
    path, other = tmp_path / "x", tmp_path / "y"
    tensors = {name: torch.randn(50_000) for name in "abc"}
    save_file(tensors, path)
    if way == "a link":
        other.symlink_to(path)
    elif way == "a hard link":
        other.hardlink_to(path)
    target = path if way == "the same path" else other
    with open_store(path) as store:
        kept = store.tensor("c")
        header = list(store.tensors.values())
        write_safetensors(target, header, ((i.name, store.read(i.name)) for i in header), {}, overwrite=True)
        assert torch.equal(kept, tensors["c"])
        assert torch.equal(store.tensor("a"), tensors["a"])
    for file in (path, target):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(file).items())


def failing(error: BaseException) -> Iterator[tuple[str, bytes]]:
    yield "a", b"1234"
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), StoreError("x"), OSError(5, "I/O")])
@pytest.mark.parametrize("old", [None, b"old"])
def test_contents_that_fail_half_way_leave_the_old_file(
    tmp_path: Path, error: BaseException, old: bytes | None
) -> None:
    if old:
        (tmp_path / "x").write_bytes(old)
    before = contents_of(tmp_path)
    expected = StoreError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_safetensors(
            tmp_path / "x", [*ONE, TensorInfo("b", "U8", (4,))], failing(error), {}, overwrite=True
        )
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize(
    "call", ["os.fsync", "os.fdopen", "os.open", "pathlib.Path.replace", "shutil.disk_usage"]
)
def test_any_step_that_the_system_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "x").write_bytes(b"old")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(call, refuse)
        with pytest.raises(StoreError, match="cannot be written: no space left on device"):
            write(tmp_path / "x", {"a": torch.ones(2)}, overwrite=True)
    assert contents_of(tmp_path) == {"x": b"old"}


WITHOUT_ROOM = """
import resource, sys; from pathlib import Path
from adapterkit.errors import StoreError
from adapterkit.stores import TensorInfo, write_safetensors
room = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
header = [TensorInfo(str(i), "U8", (10_000,)) for i in range(20)]
try:
    write_safetensors(Path(sys.argv[1]), header, ((i.name, bytes(10_000)) for i in header), {})
except StoreError as error:
    sys.exit("file too large" not in str(error))
sys.exit(2)
"""


@pytest.mark.parametrize("room", [10, 100, 5000, 100_000])
def test_a_limit_met_at_any_byte_leaves_nothing(tmp_path: Path, room: int) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_ROOM, str(tmp_path / "x"), str(room)], check=True)
    assert not contents_of(tmp_path)


def test_a_full_disk_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_100_000_000))
    header = [TensorInfo("a", "F32", (800_000_000,))]
    with pytest.raises(StoreError, match=r"needs 3\.2 GB, 1\.1 GB free"):
        write_safetensors(tmp_path / "x", header, [], {})
    assert not contents_of(tmp_path)


def test_a_check_sees_the_whole_file_and_can_refuse_it(tmp_path: Path) -> None:
    seen: list[Path] = []

    def look(path: Path) -> None:
        with open_store(path) as store:
            assert bytes(store.read("a")) == b"1234"
        seen.append(path)

    write_safetensors(tmp_path / "x", ONE, [("a", b"1234")], {}, check=look)
    assert contents_of(tmp_path).keys() == {"x"}
    assert seen[0].parent == tmp_path

    def refuse(path: Path) -> None:
        raise StoreError("not good enough")

    before = contents_of(tmp_path)
    with pytest.raises(StoreError, match="not good enough"):
        write_safetensors(tmp_path / "x", ONE, [("a", b"5678")], {}, overwrite=True, check=refuse)
    assert contents_of(tmp_path) == before


def test_leftovers_of_killed_programs_are_swept_away(tmp_path: Path) -> None:
    import fcntl

    left, locked = (tmp_path / f".adapterkit-{name}.tmp" for name in ("left", "locked"))
    for path in (left, locked, tmp_path / "other.tmp"):
        path.write_bytes(b"x")
    with locked.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(tmp_path / "x", {"a": torch.ones(2)})
    assert contents_of(tmp_path).keys() == {locked.name, "other.tmp", "x"}


WRITES = """
import sys; from pathlib import Path
from adapterkit.stores import TensorInfo, write_safetensors
path, times, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
header = [TensorInfo(str(i), "U8", (1_000_000,)) for i in range(count)]
print("started", flush=True)
for _ in range(times):
    contents = ((info.name, bytes(info.nbytes)) for info in header)
    write_safetensors(path, header, contents, {}, overwrite=True)
"""


def writer(path: Path, times: int, count: int) -> subprocess.Popen[bytes]:
    """A program that writes `count` tensors to the same file, `times` over."""
    command = [sys.executable, "-c", WRITES, str(path), str(times), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def check_killing_leaves_old_or_new(folder: Path, delay: float) -> None:
    path = folder / "x.safetensors"
    save_file({"old": torch.arange(10)}, path)
    with writer(path, 1000, 60) as program:
        assert program.stdout
        program.stdout.readline()
        time.sleep(delay)
        program.send_signal(signal.SIGKILL)
    names = load_file(path).keys()
    assert names in ({"old"}, {str(i) for i in range(60)})


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.11, 0.3])
def test_a_program_killed_while_writing_leaves_the_old_file_or_the_new(tmp_path: Path, delay: float) -> None:
    check_killing_leaves_old_or_new(tmp_path, delay)


@pytest.mark.slow
def test_a_program_killed_at_a_hundred_moments_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(100):
        check_killing_leaves_old_or_new(tmp_path, chance.random() / 2)


def test_two_programs_writing_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with writer(path, 3, 20) as one, writer(path, 3, 30) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert len(load_file(path)) in (20, 30)
    assert contents_of(tmp_path).keys() == {"x.safetensors"}


def test_json_is_written_whole_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1, 2.5, None], "a": "ü"})
    assert (tmp_path / "x.json").read_text("utf-8") == (
        '{\n  "b": [\n    1,\n    2.5,\n    null\n  ],\n  "a": "ü"\n}\n'
    )
    with pytest.raises(StoreError, match="exists already"):
        write_json(tmp_path / "x.json", {})
    write_json(tmp_path / "x.json", {}, overwrite=True)
    assert json.loads((tmp_path / "x.json").read_text()) == {}
