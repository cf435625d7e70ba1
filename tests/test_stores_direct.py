"""Files written past the system's cache hold what was written, whatever the file system makes of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterkit.errors import StoreError
from adapterkit.stores import TensorInfo, direct, write_safetensors

BLOCK = 4096
Write = Callable[[int, memoryview], int]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_LARGE", 0)
    monkeypatch.setattr(direct, "_BUFFER", 2 * BLOCK)


def written(path: Path, pieces: list[bytes]) -> bytes:
    with path.open("w+b") as file:
        with direct.writing(file, sum(map(len, pieces))) as out:
            for piece in pieces:
                out.write(piece)
        assert file.tell() == sum(map(len, pieces))
    return path.read_bytes()


@pytest.mark.parametrize("length", [0, 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 7 * BLOCK + 5])
@pytest.mark.parametrize("piece", [1000, 2 * BLOCK, 5 * BLOCK + 3])
def test_a_file_holds_the_pieces_in_their_order(tmp_path: Path, length: int, piece: int) -> None:
    data = os.urandom(length)
    assert written(tmp_path / "file", [data[i : i + piece] for i in range(0, length, piece)]) == data


def test_a_file_system_without_such_writes_gets_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_set_direct", lambda descriptor, on: False)
    data = os.urandom(7 * BLOCK + 5)
    assert written(tmp_path / "file", [data]) == data


def refusing(write: Write) -> Write:
    """A file system that takes the flag, and then only whole writes without it."""
    import fcntl

    def some(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "as the test wants it")
        return write(descriptor, data)

    return some


def cutting(write: Write) -> Write:
    """A system that writes an odd part of what it was given."""
    return lambda descriptor, data: write(descriptor, bytes(data[:1001]))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no such writes")
@pytest.mark.parametrize("way", [refusing, cutting])
def test_what_is_not_written_directly_is_written_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Write], Write]
) -> None:
    monkeypatch.setattr(os, "write", way(os.write))
    data = os.urandom(7 * BLOCK + 5)
    assert written(tmp_path / "file", [data]) == data


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no such writes")
@pytest.mark.parametrize("blocks", [3, 9])
def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    info = TensorInfo("a", "U8", (blocks * BLOCK,))
    with pytest.raises(StoreError):
        write_safetensors(tmp_path / "file.safetensors", [info], [("a", bytes(info.nbytes))], {})
    assert not [*tmp_path.iterdir()]


def test_a_large_file_has_the_bytes_of_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(9 * BLOCK + 7)
    infos = [TensorInfo("a", "U8", (5 * BLOCK,)), TensorInfo("b", "U8", (4 * BLOCK + 7,))]
    contents = [("a", data[: 5 * BLOCK]), ("b", data[5 * BLOCK :])]
    large = write_safetensors(tmp_path / "large", infos, contents, {"k": "v"})
    monkeypatch.setattr(direct, "_LARGE", 1 << 30)
    assert write_safetensors(tmp_path / "small", infos, contents, {"k": "v"}) == large
    assert (tmp_path / "large").read_bytes() == (tmp_path / "small").read_bytes()
