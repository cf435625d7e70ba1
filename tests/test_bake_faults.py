"""What goes wrong leaves the old or the new, never a mixture, and what was finished is not done again."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bake_cases import adapter, base_tensors, loaded, lora, model_folder
from checkpoints import full_size
from safetensors.torch import save_file

from adapterkit.baking import stream as bake_stream
from adapterkit.baking.plan import Baked, BakePlan
from adapterkit.errors import Mismatch, StoreError
from adapterkit.operations import bake_files
from adapterkit.operations.bake import BakeOptions, bake
from adapterkit.stores import TensorInfo, partial
from adapterkit.stores.header import build_header

BAKE = "import sys; from adapterkit.operations.bake import *; bake(sys.argv[1], [sys.argv[2]], sys.argv[3])"


class Stopped(BaseException):
    """Stands in for Ctrl-C."""


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stop before the n-th file is written; 0 lets all be written."""
    write = bake_files._write
    left: list[int] = [0]

    def counted(*args: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise Stopped
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bake_files, "_write", counted)
    return lambda number: left.__setitem__(0, number)


@pytest.fixture
def case(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = model_folder(tmp_path / "base", base_tensors(), shards=3)
    return base, adapter(tmp_path / "a", lora(1)), tmp_path / "out"


def test_finished_shards_are_kept_and_gone_on_with(
    case: tuple[Path, Path, Path], stop_at: Callable[[int], None]
) -> None:
    base, path, out = case
    stop_at(3)
    with pytest.raises(Stopped):
        bake(base, [path], out)
    assert not out.exists()
    assert len(list((out.parent / "out.partial").glob("*.safetensors"))) == 2
    done = bake(base, [path], out, BakeOptions(resume=True))
    assert len(done.resumed) == 2
    assert done.total.ratio == pytest.approx(1.0, abs=0.01)
    assert len(done.kept) == 4
    whole = bake(base, [path], out.parent / "whole")
    assert [one.sha256 for one in done.written] == [one.sha256 for one in whole.written]
    assert {entry.name for entry in out.iterdir()} == {entry.name for entry in base.iterdir()}
    assert not (out.parent / "out.partial").exists()


def test_a_finished_shard_that_was_damaged_since_is_done_again(
    case: tuple[Path, Path, Path], stop_at: Callable[[int], None]
) -> None:
    base, path, out = case
    stop_at(3)
    with pytest.raises(Stopped):
        bake(base, [path], out)
    first = sorted((out.parent / "out.partial").glob("*.safetensors"))[0]
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    done = bake(base, [path], out, BakeOptions(resume=True))
    assert len(done.resumed) == 1
    bake(base, [path], out.parent / "whole")
    for name, tensor in loaded(out.parent / "whole").items():
        assert tensor.equal(loaded(out)[name])


def test_another_request_does_not_go_on_with_it_and_no_request_begins_anew(
    case: tuple[Path, Path, Path], stop_at: Callable[[int], None]
) -> None:
    base, path, out = case
    stop_at(3)
    with pytest.raises(Stopped):
        bake(base, [path], out)
    with pytest.raises(StoreError) as error:
        bake(base, [(path, 0.5)], out, BakeOptions(resume=True))
    assert error.value.code == "resume"
    assert bake(base, [(path, 0.5)], out).resumed == ()
    assert not (out.parent / "out.partial").exists()


def test_nothing_is_left_where_nothing_was_finished(
    case: tuple[Path, Path, Path], stop_at: Callable[[int], None]
) -> None:
    base, path, out = case
    stop_at(1)
    with pytest.raises(Stopped):
        bake(base, [path], out)
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["a", "base"]


def test_a_file_that_is_there_is_not_replaced_unasked(case: tuple[Path, Path, Path]) -> None:
    base, path, out = case
    bake(base, [path], out)
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    with pytest.raises(StoreError, match="exists already"):
        bake(base, [(path, 0.5)], out)
    assert before == {entry.name: entry.read_bytes() for entry in out.iterdir()}
    bake(base, [(path, 0.5)], out, BakeOptions(force=True))
    assert before != {entry.name: entry.read_bytes() for entry in out.iterdir()}


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base_tensors(), base)
    path = adapter(tmp_path / "a", lora(1))
    out.write_bytes(b"old")

    def small() -> None:
        # Writing beyond it fails as on a full disk, once the signal is ignored.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = BAKE[:-1] + ", options=BakeOptions(force=True))"
    command = [sys.executable, "-c", code, str(base), str(path), str(out)]
    done = subprocess.run(command, preexec_fn=small, capture_output=True, text=True)
    assert "cannot be written: file too large" in done.stderr
    assert out.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base.safetensors", "out.safetensors"]


def sparse(path: Path, infos: Iterator[TensorInfo]) -> Path:
    """A file with this header whose tensors are holes: full-size models that take no space."""
    header = list(infos)
    raw = build_header(header, {"format": "pt"})
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + sum(info.nbytes for info in header))
    return path


def infos(name: str) -> Iterator[TensorInfo]:
    for key, tensor in full_size(name).items():
        yield TensorInfo(key, "F16", tuple(tensor.shape))


@pytest.fixture
def strangers(tmp_path: Path) -> tuple[Path, Path]:
    """A full-size SDXL, and an adapter for Stable Diffusion 1.5."""
    base = sparse(tmp_path / "sdxl.safetensors", infos("sdxl"))
    shapes = {}
    for block, width in ((1, 320), (4, 640), (7, 1280)):
        front = f"lora_unet_input_blocks_{block}_1_transformer_blocks_0_attn2_to_k"
        shapes |= {f"{front}.lora_down.weight": (4, 768), f"{front}.lora_up.weight": (width, 4)}
        shapes |= {f"{front}.alpha": ()}
    path = tmp_path / "sd15.safetensors"
    return base, sparse(path, (TensorInfo(key, "F16", shape) for key, shape in shapes.items()))


def test_an_adapter_for_another_model_is_refused_from_headers_alone(
    strangers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, path = strangers
    with pytest.raises(Mismatch) as error:
        bake(base, [path], tmp_path / "out.safetensors")
    assert error.value.code == "base-family"
    body = BAKE.replace("; ", "\n    ")
    code = f"try:\n    {body}\nexcept Exception as error:\n    print(error.code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        [*command, str(base), str(path), str(tmp_path / "out.safetensors")], capture_output=True, text=True
    )
    assert done.stdout.split() == ["base-family", "False"]


def test_a_journal_says_what_was_kept(case: tuple[Path, Path, Path], stop_at: Callable[[int], None]) -> None:
    base, path, out = case
    stop_at(2)
    with pytest.raises(Stopped):
        bake(base, [path], out)
    journal = json.loads((out.parent / "out.partial" / ".adapterkit-journal.json").read_text())
    (facts,) = journal["files"].values()
    assert set(facts) == {"sha256", "size", "kept", "would_keep"}


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged on Linux")
def test_a_folder_in_place_changes_at_once_and_keeps_what_else_is_there(
    case: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path, out = case
    bake(base, [path], out)
    (base / "notes").mkdir()
    (base / "notes" / "mine.txt").write_text("mine")
    (base / ".hidden").symlink_to("config.json")

    def one_by_one(*args: object) -> None:
        raise AssertionError("files are put in place one after another")

    monkeypatch.setattr(partial, "put", one_by_one)
    bake(base, [path], base, BakeOptions(in_place=True))
    expected = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    assert (base / "notes" / "mine.txt").read_text() == "mine"
    assert (base / ".hidden").is_symlink()
    found = {e.name: e.read_bytes() for e in base.iterdir() if e.is_file() and not e.is_symlink()}
    assert found == expected
    assert {entry.name for entry in out.parent.iterdir()} == {"a", "base", "out"}


def test_files_are_put_in_place_where_folders_cannot_be_exchanged(
    case: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path, out = case
    bake(base, [path], out)
    monkeypatch.setattr(partial, "exchange", lambda one, other: False)
    bake(base, [path], base, BakeOptions(in_place=True))
    assert {e.name: e.read_bytes() for e in base.iterdir()} == {e.name: e.read_bytes() for e in out.iterdir()}
    assert {entry.name for entry in out.parent.iterdir()} == {"a", "base", "out"}


def test_a_folder_of_somebody_elses_is_not_taken_for_an_unfinished_one(
    case: tuple[Path, Path, Path],
) -> None:
    base, path, out = case
    theirs = out.parent / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("theirs")
    for resume in (False, True):
        with pytest.raises(StoreError, match="holds something else"):
            bake(base, [path], out, BakeOptions(resume=resume))
    assert (theirs / "thesis.txt").read_text() == "theirs"


def test_the_folder_one_is_in_can_be_the_output_and_the_base(
    case: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path, out = case
    bake(base, [path], out)
    new = out.parent / "new"
    new.mkdir()
    monkeypatch.chdir(new)
    bake(base, [path], ".", BakeOptions(keep_undo=True))
    assert {e.name: e.read_bytes() for e in new.iterdir()} == {e.name: e.read_bytes() for e in out.iterdir()}
    assert (out.parent / "new.undo").exists()


def test_an_index_is_its_folder_where_the_base_may_not_be_replaced(case: tuple[Path, Path, Path]) -> None:
    base, path, _ = case
    with pytest.raises(StoreError, match="is the base itself"):
        bake(base / "model.safetensors.index.json", [path], base, BakeOptions(force=True))


@pytest.mark.parametrize("output", ["a file", "in a file"])
def test_a_file_where_a_folder_is_to_be_is_refused_at_once(
    output: str, case: tuple[Path, Path, Path]
) -> None:
    base, path, out = case
    out.write_text("a file")
    with pytest.raises(StoreError) as error:
        bake(base, [path], out / "model" if output != "a file" else out, BakeOptions(force=True))
    assert error.value.code == "special-file"
    assert {entry.name for entry in out.parent.iterdir()} == {"a", "base", "out"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_that_may_not_be_written_is_refused_and_nothing_is_left(
    kind: str, case: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, path, out = case
    if kind == "file":
        base = base / "model.safetensors"
        save_file(base_tensors(), base)
    place = out.parent / "closed"
    place.mkdir()

    def closed(real: Callable[..., object]) -> Callable[..., object]:
        # root may write anywhere: the system's answer to everybody else.
        def call(target: object, *args: object, **more: object) -> object:
            if Path(str(target)).parent == place:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
            return real(target, *args, **more)

        return call

    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, closed(getattr(os, name)))
    with pytest.raises(StoreError) as error:
        bake(base, [path], place / "out")
    assert error.value.code == "system"
    assert "permission denied" in error.value.message
    assert not list(place.iterdir())


@pytest.mark.parametrize("moment", ["before it is read", "while it is read"])
def test_a_base_cut_short_while_it_is_mapped_is_an_error(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(base_tensors(), base)
    path = adapter(tmp_path / "a", lora(1))
    finite, tensor = BakePlan.require_finite, bake_stream.Stream.tensor
    size = base.stat().st_size

    def cut(plan: BakePlan) -> None:
        finite(plan)
        os.truncate(base, size // 2)

    def cut_late(stream: bake_stream.Stream, baked: Baked) -> torch.Tensor:
        made = tensor(stream, baked)
        os.truncate(base, size // 2)
        return made

    if moment == "before it is read":
        monkeypatch.setattr(BakePlan, "require_finite", cut)
    else:
        monkeypatch.setattr(bake_stream.Stream, "tensor", cut_late)
    with pytest.raises(StoreError) as error:
        bake(base, [path], out)
    assert error.value.code == "changed"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "base.safetensors"]
